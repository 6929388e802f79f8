"""Losses: weights, padding, reductions, targets, functions of every form, and losses that couple examples."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_kinds.case import Case, case, labels, pictures


def mlp(classes: int = 3, inputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, classes))


def vectors(batch: int = 3, size: int = 4) -> Tensor:
    return torch.rand(batch, size)


def with_loss(loss_fn, targets=None, *, classes=3, batch=3):
    """An MLP under `loss_fn`; `targets`: a function of nothing, default class indices."""

    def make():
        model, inputs = mlp(classes), vectors(batch)
        return model, loss_fn(), inputs, labels(batch, classes) if targets is None else targets()

    return make


class Tokens(nn.Module):
    """Scores `(B, T, V)` from vectors `(B, T, E)`."""

    def __init__(self, transpose: bool = False) -> None:
        super().__init__()
        self.inner, self.head, self.transpose = nn.Linear(3, 4), nn.Linear(4, 5), transpose

    def forward(self, x):
        scores = self.head(torch.tanh(self.inner(x)))
        return scores.mT if self.transpose else scores


def padded() -> Tensor:
    return torch.tensor([[0, 1, 2, 3], [4, 0, -100, -100], [1, -100, -100, -100]])


def token_loss(scores, targets):
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def shifted_loss(scores, targets):
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def masked_mean(scores, targets):
    each = F.cross_entropy(scores.mT, targets.clamp_min(0), reduction="none")
    mask = (targets >= 0).to(each)
    return (each * mask).sum() / mask.sum()


def reduction_changed():
    loss_fn = nn.CrossEntropyLoss()
    loss_fn(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    loss_fn.reduction = "sum"
    return loss_fn


class Trainer:
    """A loss that is a method of something."""

    scale = 0.5

    def loss(self, outputs, targets):
        return self.scale * F.cross_entropy(outputs, targets)


WEIGHTS = torch.tensor([1.0, 9.0, 3.0])


def fixed_weights(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=WEIGHTS)


class LearnedScale(nn.Module):
    """A loss with state of its own that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, outputs, targets):
        return F.mse_loss(self.scale * outputs, targets)


class LearnedTemperature(nn.Module):
    """A loss with a parameter of its own, which is no parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs / self.temperature, targets)


def margins(outputs, targets):
    below = F.relu(1 - outputs.gather(1, targets[:, None]) + outputs)
    return (below.sum(1) - 1).mean() / outputs.shape[1]


def nce(outputs, targets):
    z = F.normalize(outputs, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, targets)


def supervised_contrastive(outputs, targets):
    z = F.normalize(outputs, dim=1)
    similarity = (z @ z.T - 10 * torch.eye(len(z), dtype=z.dtype)).log_softmax(1)
    same = (targets[:, None] == targets[None]).to(z) - torch.eye(len(z), dtype=z.dtype)
    return -(similarity * same).sum() / same.sum()


def covariance(outputs, targets):
    centred = outputs - outputs.mean(0)
    return (centred.T @ centred / (len(outputs) - 1)).square().sum() + F.cross_entropy(outputs, targets)


def pairwise_ranking(outputs, targets):
    difference = outputs[:, :1] - outputs[:, :1].T
    return F.softplus(-difference * torch.sign(targets[:, None] - targets[None])).mean()


def hardest_half(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none").topk(2).values.mean()


def rescaled(outputs, targets):
    return (F.cross_entropy(outputs, targets, reduction="none").square().mean() + 1e-3).sqrt()


class PairOfViews(nn.Module):
    """Two views of each example side by side, encoded by one network."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(4)

    def forward(self, x):
        return self.encoder(x[:, 0]), self.encoder(x[:, 1])


def views_nce(outputs, targets):
    a, b = (F.normalize(z, dim=1) for z in outputs)
    return F.cross_entropy(a @ b.T / 0.2, targets)


def zero_head(loss_fn):
    def make():
        model = mlp()
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model, loss_fn(), vectors(), labels()

    return make


def small_head():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
        model[2].bias.mul_(1e-6)
    return model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 3.0])), vectors(), torch.tensor([0, 1, 1])


def two_of_one_class():
    return (
        nn.Sequential(nn.Linear(1, 2)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0])),
        torch.tensor([[0.3], [0.8]]),
        torch.tensor([0, 1]),
    )


def per_token(loss_fn, transpose=False, targets=padded):
    def make():
        return Tokens(transpose), loss_fn(), torch.rand(3, 4, 3), targets()

    return make


def binary(loss_fn, dtype=torch.float32):
    return with_loss(loss_fn, lambda: torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 0]]).to(dtype))


def probabilities():
    return torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])


def real():
    return torch.randn(3, 3)


def segmentation():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 3, 1))
    targets = torch.arange(48).reshape(3, 4, 4) % 3
    targets[0, :3] = 255
    return model, nn.CrossEntropyLoss(ignore_index=255), pictures(), targets


def ctc_loss(outputs, targets):
    lengths = torch.full((len(targets),), outputs.shape[1]), torch.full((len(targets),), targets.shape[1])
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), targets, *lengths)


def ctc_by_hand(outputs, targets):
    """The forward recursion of Graves et al. 2006, Eq. 6, in log space; no label follows itself here."""
    each = []
    for scores, target in zip(outputs.log_softmax(-1), targets, strict=True):
        padded = [0, *(p for label in target.tolist() for p in (label, 0))]
        none = scores.new_tensor(-1e4)
        alpha = [scores[0, k] if i < 2 else none for i, k in enumerate(padded)]
        for step in scores[1:]:
            before = [alpha[i : i + 1] + alpha[max(i - 1, 0) : i] for i in range(len(padded))]
            skips = [[alpha[i - 2]] if i > 1 and k else [] for i, k in enumerate(padded)]
            ways = [torch.stack(b + s).logsumexp(0) for b, s in zip(before, skips, strict=True)]
            alpha = [w + step[k] for w, k in zip(ways, padded, strict=True)]
        each.append(-torch.logaddexp(alpha[-1], alpha[-2]) / len(target))
    return torch.stack(each).mean()


def ctc(loss_fn):
    def make():
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        return model, loss_fn, torch.rand(2, 5, 3), torch.tensor([[1, 2], [3, 1]])

    return make


CASES: list[Case] = [
    case("mean cross-entropy", with_loss(nn.CrossEntropyLoss), "loss"),
    case("sum cross-entropy", with_loss(lambda: nn.CrossEntropyLoss(reduction="sum")), "loss"),
    case(
        "class weights",
        with_loss(lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 3.0])), lambda: torch.tensor([0, 1, 1])),
        "loss",
    ),
    case("class weights, linear", two_of_one_class, "loss"),
    case("class weights, zero head", zero_head(lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9, 3]))), "loss"),
    case("class weights, small head", small_head, "loss"),
    case(
        "ignore_index",
        with_loss(lambda: nn.CrossEntropyLoss(ignore_index=2), lambda: torch.tensor([0, 2, 1])),
        "loss",
    ),
    case("label smoothing", with_loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.1)), "loss"),
    case(
        "label smoothing, class weights",
        with_loss(lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0, 3.0]), label_smoothing=0.2)),
        "loss",
    ),
    case("reduction changed later", with_loss(reduction_changed), "loss"),
    case("half the mean", with_loss(lambda: lambda o, t: 0.5 * F.cross_entropy(o, t)), "loss"),
    case("bound method", with_loss(lambda: Trainer().loss), "loss"),
    case("partial", with_loss(lambda: partial(F.cross_entropy, reduction="sum", label_smoothing=0.1)), "loss"),
    case("soft targets", with_loss(nn.CrossEntropyLoss, probabilities), "loss"),
    case("NLL", with_loss(lambda: lambda o, t: F.nll_loss(o.log_softmax(1), t)), "loss"),
    case(
        "NLL module with weights",
        lambda: (
            nn.Sequential(*mlp(), nn.LogSoftmax(1)),
            nn.NLLLoss(weight=torch.tensor([0.2, 2, 1])),
            vectors(),
            labels(),
        ),
        "loss",
    ),
    case(
        "KLDiv",
        with_loss(lambda: lambda o, t: nn.KLDivLoss(reduction="batchmean")(o.log_softmax(1), t), probabilities),
        "loss",
    ),
    case("MSE mean", with_loss(nn.MSELoss, real), "loss"),
    case("MSE sum", with_loss(lambda: nn.MSELoss(reduction="sum"), real), "loss"),
    case("Huber", with_loss(lambda: nn.HuberLoss(delta=0.7), real), "loss"),
    case("SmoothL1", with_loss(nn.SmoothL1Loss, real), "loss"),
    case("L1", with_loss(nn.L1Loss, real), "loss"),
    case("Gaussian NLL", with_loss(lambda: lambda o, t: F.gaussian_nll_loss(o, t, o.exp()), real), "loss"),
    case(
        "Poisson NLL", with_loss(nn.PoissonNLLLoss, lambda: torch.tensor([[1.0, 0, 2], [3, 1, 0], [0, 0, 1]])), "loss"
    ),
    case("BCE with logits, multi-label", binary(nn.BCEWithLogitsLoss), "loss"),
    case("BCE with pos_weight", binary(lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 5, 2]))), "loss"),
    case(
        "BCE on probabilities",
        lambda: (
            nn.Sequential(*mlp(1), nn.Sigmoid()),
            nn.BCELoss(),
            vectors(),
            torch.tensor([[0.0], [1.0], [1.0]]),
        ),
        "loss",
    ),
    case("multi-label soft margin", binary(nn.MultiLabelSoftMarginLoss), "loss"),
    case(
        "multi-margin",
        with_loss(nn.MultiMarginLoss),
        "loss",
        plain=with_loss(lambda: margins),
        may_refuse="(?i)multi_?margin",
    ),
    case("hinge by hand", with_loss(lambda: lambda o, t: F.relu(1 - o.gather(1, t[:, None])).square().mean()), "loss"),
    case(
        "focal",
        with_loss(
            lambda: (
                lambda o, t: (
                    (1 - (-F.cross_entropy(o, t, reduction="none")).exp()) ** 2
                    * F.cross_entropy(o, t, reduction="none")
                ).mean()
            )
        ),
        "loss",
    ),
    case("cosine to targets", with_loss(lambda: lambda o, t: 1 - F.cosine_similarity(o, t).mean(), real), "loss"),
    case("loss module with a parameter", with_loss(LearnedTemperature), "loss", may_refuse="(?i)loss.*parameter"),
    case("loss module with a buffer", with_loss(LearnedScale, real), "loss"),
    case(
        "per-example weights in the targets",
        with_loss(
            lambda: lambda o, t: (F.cross_entropy(o, t[:, 0].long(), reduction="none") * t[:, 1]).mean(),
            lambda: torch.tensor([[0.0, 0.2], [1.0, 3.0], [2.0, 1.0]]),
        ),
        "loss",
    ),
    case("tokens (B, T, V), padded", per_token(lambda: token_loss), "loss", "tokens"),
    case("tokens (B, V, T), padded", per_token(nn.CrossEntropyLoss, transpose=True), "loss", "tokens"),
    case("tokens, shifted", per_token(lambda: shifted_loss), "loss", "tokens"),
    case("tokens, masked mean by hand", per_token(lambda: masked_mean), "loss", "tokens"),
    case(
        "tokens, an example all padding",
        per_token(lambda: token_loss, targets=lambda: torch.tensor([[0, 1, 2, 3], [-100] * 4, [1, 4, -100, 2]])),
        "loss",
        "tokens",
    ),
    case("segmentation, ignore_index 255", segmentation, "loss"),
    case("batch of one", with_loss(nn.CrossEntropyLoss, batch=1), "loss"),
    case(
        "duplicates in the batch",
        lambda: (mlp(), nn.CrossEntropyLoss(), vectors(1).repeat(3, 1), torch.tensor([1, 1, 0])),
        "loss",
    ),
    case("zero head", zero_head(nn.CrossEntropyLoss), "loss"),
    case("InfoNCE within the batch", with_loss(lambda: nce), "coupled"),
    case("InfoNCE of two views", lambda: (PairOfViews(), views_nce, torch.rand(3, 2, 4), labels()), "coupled"),
    case(
        "supervised contrastive",
        with_loss(lambda: supervised_contrastive, lambda: torch.tensor([0, 0, 1, 1]), batch=4),
        "coupled",
    ),
    case("mean-centred", with_loss(lambda: lambda o, t: F.mse_loss(o - o.mean(0), t), real), "coupled"),
    case("covariance", with_loss(lambda: covariance), "coupled"),
    case("pairwise ranking", with_loss(lambda: pairwise_ranking), "coupled"),
    case("hardest half of the batch", with_loss(lambda: hardest_half), "coupled"),
    case("root of the mean square", with_loss(lambda: rescaled), "coupled"),
    case(
        "standardised by the batch's targets",
        with_loss(lambda: lambda o, t: F.mse_loss(o, (t - t.mean(0)) / t.std(0)), real),
        "loss",
    ),
    case(
        "float32 weights in a lambda",
        with_loss(lambda: fixed_weights),
        "loss",
        plain=with_loss(lambda: nn.CrossEntropyLoss(weight=WEIGHTS)),
        may_refuse="(?i)dtype|float|double",
    ),
    case(
        "sum over some, no label but ignored ones",
        with_loss(lambda: nn.CrossEntropyLoss(reduction="sum"), lambda: torch.tensor([0, -100, -100])),
        "loss",
    ),
    case(
        "every label ignored",
        with_loss(nn.CrossEntropyLoss, lambda: torch.tensor([-100, -100, -100])),
        "loss",
        refused="(?i)nan|finite",
    ),
    case(
        "loss per example, not one number",
        with_loss(lambda: nn.CrossEntropyLoss(reduction="none")),
        "loss",
        refused="reduction",
    ),
    case("CTC", ctc(ctc_loss), "loss", plain=ctc(ctc_by_hand), may_refuse="(?i)ctc"),
]
