"""The last layer's gradient: where the head is, iDLG's rule, and iLRG's steps against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradguard import InputError, LossGradient, UnsupportedModelError
from gradguard.attacks._labels.classification_head import ClassificationHead, check_cross_entropy, classification_head
from gradguard.attacks._labels.counts import (
    centred_class_embeddings,
    class_embeddings,
    class_probabilities,
    head_mismatch,
    idlg_label,
    label_system,
    labels_of,
    restore_label_counts,
    round_counts,
    solve_label_counts,
)
from gradguard.leakage.labels import count_labels


def head_gradients(features, labels, weight, bias):
    """The definition: autograd of the mean cross-entropy of a linear head."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(features, weight, bias), labels)
    return torch.autograd.grad(loss, (weight, bias))


def problem(classes=6, width=5, batch=9, spread=0.3, scale=0.5, seed=0):
    """A float64 head, features around a common point, labels: gradients, parameters, features, true counts."""
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    bias = scale * torch.randn(classes, generator=generator, dtype=torch.float64)
    features = torch.randn(width, generator=generator, dtype=torch.float64)
    features = features + spread * torch.randn(batch, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    gradients = head_gradients(features, labels, weight, bias)
    return *gradients, weight, bias, features, count_labels(labels, classes)


# ---------------------------------------------------------------------- the same in plain loops


def plain_embeddings(weight_gradient, bias_gradient):
    return [[w / b for w in row] for row, b in zip(weight_gradient.tolist(), bias_gradient.tolist(), strict=True)]


def plain_probabilities(embeddings, weight, bias):
    result = []
    for e in embeddings:
        scores = [
            sum(w * x for w, x in zip(row, e, strict=True)) + b
            for row, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        largest = max(scores)
        powers = [math.exp(s - largest) for s in scores]
        result.append([p / sum(powers) for p in powers])
    return result


def plain_system(probabilities, bias_gradient, batch_size):
    classes = len(probabilities)
    coefficients, values = [[1.0] * classes], [float(batch_size)]
    for i in range(classes):
        coefficients.append([probabilities[j][i] - (1.0 if i == j else 0.0) for j in range(classes)])
        values.append(batch_size * bias_gradient[i].item())
    return np.array(coefficients), np.array(values)


def plain_centred(weight_gradient, bias_gradient, counts, batch_size):
    rows, slopes = weight_gradient.tolist(), bias_gradient.tolist()
    n = [max(c, 0.0) for c in counts.tolist()]
    below = sum(b * b / (c + 1) for b, c in zip(slopes, n, strict=True))
    width = range(len(rows[0]))
    centre = [sum(b * row[k] / (c + 1) for row, b, c in zip(rows, slopes, n, strict=True)) / below for k in width]
    # What the regression leaves over, per degree of freedom, against what it explains.
    left = [
        sum((row[k] - b * centre[k]) ** 2 for k in width) / (c + 1) for row, b, c in zip(rows, slopes, n, strict=True)
    ]
    variance = sum(left) / (len(rows) - 1) / below
    factor = max(0.0, 1 - variance / sum(a * a for a in centre))
    centre = [factor * a for a in centre]
    result = []
    for row, b, c in zip(rows, slopes, n, strict=True):
        factor = batch_size / max(c, 1) if c > 0.5 else 0.0
        result.append([a - factor * (w - b * a) for w, a in zip(row, centre, strict=True)])
    return result


def plain_mismatch(counts, embeddings, probabilities, weight_gradient, bias_gradient, batch_size):
    """The gradient of a batch of `counts[c]` examples that look like `embeddings[c]`, example by example."""
    own_weight, own_bias = torch.zeros_like(weight_gradient), torch.zeros_like(bias_gradient)
    for c, n in enumerate(counts.tolist()):
        for _ in range(n):
            k = probabilities[c].clone()
            k[c] -= 1
            own_weight += torch.outer(k, embeddings[c]) / batch_size
            own_bias += k / batch_size
    off = ((own_weight - weight_gradient) ** 2).sum() + ((own_bias - bias_gradient) ** 2).sum()
    return (off / ((weight_gradient**2).sum() + (bias_gradient**2).sum())).sqrt()


@pytest.mark.parametrize("seed", range(4))
def test_each_step_equals_plain_loops(seed):
    weight_gradient, bias_gradient, weight, bias, _, true = problem(seed=seed)
    batch = int(true.sum())
    embeddings = class_embeddings(weight_gradient, bias_gradient)
    plain = plain_embeddings(weight_gradient, bias_gradient)
    torch.testing.assert_close(embeddings, torch.tensor(plain, dtype=torch.float64))
    probabilities = class_probabilities(embeddings, weight, bias)
    plain = plain_probabilities(plain, weight, bias)
    torch.testing.assert_close(probabilities, torch.tensor(plain, dtype=torch.float64))
    coefficients, values = label_system(probabilities, bias_gradient, batch)
    plain_coefficients, plain_values = plain_system(plain, bias_gradient, batch)
    np.testing.assert_allclose(coefficients, plain_coefficients, atol=1e-12)
    np.testing.assert_allclose(values, plain_values, atol=1e-12)
    solution = solve_label_counts(probabilities, bias_gradient, batch)
    np.testing.assert_allclose(solution, np.linalg.pinv(plain_coefficients) @ plain_values, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_centred_embeddings_equal_plain_loops(seed):
    weight_gradient, bias_gradient, *_, true = problem(seed=seed)
    counts = true + torch.linspace(-0.4, 0.4, len(true), dtype=torch.float64)
    ours = centred_class_embeddings(weight_gradient, bias_gradient, counts, 9)
    plain = plain_centred(weight_gradient, bias_gradient, counts, 9)
    torch.testing.assert_close(ours, torch.tensor(plain, dtype=torch.float64))


def test_mismatch_equals_plain_loops_and_vanishes_on_the_truth():
    weight_gradient, bias_gradient, weight, bias, features, true = problem(spread=0)
    embeddings = features[:1].expand(len(true), -1)
    probabilities = class_probabilities(embeddings, weight, bias)
    assert head_mismatch(true, embeddings, probabilities, weight_gradient, bias_gradient, 9) < 1e-12
    wrong = true.roll(1)
    ours = head_mismatch(wrong, embeddings, probabilities, weight_gradient, bias_gradient, 9)
    torch.testing.assert_close(
        ours, plain_mismatch(wrong, embeddings, probabilities, weight_gradient, bias_gradient, 9)
    )
    assert ours > 0.1


def test_the_least_squares_solution_when_the_gradient_was_perturbed():
    # Noise takes the bias gradient out of the vectors of sum zero; the square system must still solve the tall one.
    _, bias_gradient, weight, bias, features, _ = problem()
    noisy = bias_gradient + 0.1 * torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probabilities = class_probabilities(features[:6], weight, bias)
    coefficients, values = label_system(probabilities, noisy, 9)
    expected = torch.linalg.lstsq(coefficients, values[:, None]).solution[:, 0]
    torch.testing.assert_close(solve_label_counts(probabilities, noisy, 9), expected)


def test_a_singular_system_gets_the_solution_of_least_norm():
    # Classes 0 and 1 are certain of themselves: their columns vanish, and only their sum is determined.
    probabilities = torch.full((4, 4), 0.25, dtype=torch.float64)
    probabilities[0], probabilities[1] = torch.eye(4, dtype=torch.float64)[0], torch.eye(4, dtype=torch.float64)[1]
    bias_gradient = torch.tensor([0.1, 0.1, -0.15, -0.05], dtype=torch.float64)
    coefficients, values = label_system(probabilities, bias_gradient, 10)
    expected = np.linalg.pinv(coefficients.numpy(), rcond=1e-12) @ values.numpy()
    np.testing.assert_allclose(solve_label_counts(probabilities, bias_gradient, 10), expected, atol=1e-9)


def test_images_under_the_head_serve_as_well():
    weight_gradient, bias_gradient, weight, _, _, true = problem()
    image = weight_gradient @ weight.T
    torch.testing.assert_close(
        class_embeddings(image, bias_gradient), class_embeddings(weight_gradient, bias_gradient) @ weight.T
    )
    # But for the shrinkage of the centre, which is measured in the space at hand and is next to nothing here.
    torch.testing.assert_close(
        centred_class_embeddings(image, bias_gradient, true.double(), 9),
        centred_class_embeddings(weight_gradient, bias_gradient, true.double(), 9) @ weight.T,
        rtol=0,
        atol=1e-3,
    )


# ---------------------------------------------------------------------- the counts


@pytest.mark.parametrize("refinements", [0, 2])
def test_exact_where_all_examples_are_alike(refinements):
    weight_gradient, bias_gradient, weight, bias, _, true = problem(spread=0, batch=40)
    found = restore_label_counts(weight_gradient, bias_gradient, weight, bias, 40, refinements=refinements)
    torch.testing.assert_close(found.solution, true.double(), atol=1e-8, rtol=0)
    assert torch.equal(found.counts, true)
    assert found.mismatch < 1e-8


@pytest.mark.parametrize("seed", range(3))
def test_classes_as_frequent_as_expected_spoil_the_quotient_only(seed):
    """Where `grad b_c` vanishes iLRG's quotient explodes; the centred features do not."""
    generator = torch.Generator().manual_seed(seed)
    classes, width, each = 5, 30, 6
    weight = 0.1 * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    bias = torch.zeros(classes, dtype=torch.float64)
    features = 1 + 0.2 * torch.randn(classes * each, width, generator=generator, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(each)
    weight = weight - weight.mean(1, keepdim=True)  # scores near 0: every class is expected as often as it comes
    weight_gradient, bias_gradient = head_gradients(features, labels, weight, bias)
    true = count_labels(labels, classes)
    means = torch.stack([features[labels == c].mean(0) for c in range(classes)])
    off = class_embeddings(weight_gradient, bias_gradient) - means
    centred_off = centred_class_embeddings(weight_gradient, bias_gradient, true.double(), len(labels)) - means
    assert off.norm(dim=1).max() > 5 * centred_off.norm(dim=1).max()
    paper = restore_label_counts(weight_gradient, bias_gradient, weight, bias, len(labels), refinements=0)
    ours = restore_label_counts(weight_gradient, bias_gradient, weight, bias, len(labels))
    assert not torch.equal(paper.counts, true)
    assert torch.equal(ours.counts, true)
    assert ours.refinement > 0
    assert ours.mismatch < paper.mismatch


@pytest.mark.parametrize("scale", [20.0, 1e3, 1e6])
def test_saturated_heads_still_give_counts(scale):
    """On a trained model probabilities are 0 and 1, the system is singular, and nothing may break."""
    weight_gradient, bias_gradient, weight, bias, _, _ = problem(scale=scale, spread=2.0, classes=8, batch=16)
    for refinements in (0, 2):
        found = restore_label_counts(weight_gradient, bias_gradient, weight, bias, 16, refinements=refinements)
        assert found.counts.sum() == 16
        assert found.counts.min() >= 0
        assert torch.isfinite(found.probabilities).all()


def test_a_vanishing_bias_gradient_gives_the_empty_embedding():
    weight_gradient = torch.ones(3, 2, dtype=torch.float64)
    bias_gradient = torch.tensor([0.5, 0.0, 1e-320], dtype=torch.float64)
    assert class_embeddings(weight_gradient, bias_gradient).tolist() == [[2, 2], [0, 0], [0, 0]]


def test_rounding_is_the_nearest_by_enumeration():
    generator = torch.Generator().manual_seed(0)
    for trial in range(300):
        classes, batch = 2 + trial % 3, 1 + trial % 6
        x = (1 + trial % 4) * torch.randn(classes, generator=generator, dtype=torch.float64)
        if trial % 2:
            x = x + (batch - x.sum()) / classes  # what the solver gives: the right sum
        counts = round_counts(x, batch)
        candidates = [v for v in itertools.product(range(batch + 1), repeat=classes) if sum(v) == batch]
        nearest = min(sum((a - b) ** 2 for a, b in zip(v, x.tolist(), strict=True)) for v in candidates)
        assert counts.dtype == torch.int64
        assert counts.sum() == batch
        assert counts.min() >= 0
        assert ((counts - x) ** 2).sum().item() == pytest.approx(nearest, abs=1e-9)


def test_rounding_keeps_what_is_whole():
    x = torch.tensor([3.0, 0.0, 2.0, 1.0]) + 1e-9 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert round_counts(x, 6).tolist() == [3, 0, 2, 1]


def test_ties_go_to_the_first_classes():
    assert round_counts(torch.full((4,), 0.5), 2).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("x", [[float("nan"), 1.0, 2.0], [float("inf"), float("-inf"), 2.0], [1e300, 3.0, 3.0]])
def test_rounding_survives_a_broken_solution(x):
    counts = round_counts(torch.tensor(x, dtype=torch.float64), 5)
    assert counts.sum() == 5
    assert counts.min() >= 0


def test_labels_of_counts():
    assert labels_of(torch.tensor([2, 0, 1])).tolist() == [0, 0, 2]


# ---------------------------------------------------------------------- one example


@pytest.mark.parametrize("classes", [3, 5, 100])
def test_idlg_both_forms_tell_every_label(classes):
    generator = torch.Generator().manual_seed(classes)
    for label in range(0, classes, max(1, classes // 10)):
        weight = torch.randn(classes, 7, generator=generator, dtype=torch.float64)
        features = torch.randn(1, 7, generator=generator, dtype=torch.float64)  # of either sign
        bias = torch.zeros(classes, dtype=torch.float64)
        weight_gradient, bias_gradient = head_gradients(features, torch.tensor([label]), weight, bias)
        assert idlg_label(weight_gradient) == label
        assert idlg_label(-weight_gradient) == label  # features of the other sign
        assert idlg_label(bias_gradient=bias_gradient) == label
        # The rule in the paper's words: the row whose products with all others are not positive.
        products = weight_gradient @ weight_gradient.T
        opposed = [c for c in range(classes) if all(products[c, j] <= 0 for j in range(classes) if j != c)]
        assert opposed == [label]


def test_idlg_with_two_classes_needs_the_bias():
    weight_gradient, bias_gradient = head_gradients(
        torch.ones(1, 3), torch.tensor([1]), torch.zeros(2, 3), torch.zeros(2)
    )
    assert idlg_label(weight_gradient, bias_gradient) == 1
    with pytest.raises(InputError, match=r"each other's negatives\. Give the bias's gradient"):
        idlg_label(weight_gradient)


def test_idlg_needs_one_of_the_two():
    with pytest.raises(InputError, match="weight gradient or its bias gradient"):
        idlg_label()


# ---------------------------------------------------------------------- where the head is


class HeadFirst(nn.Module):
    """The head registered before the body, and a decoy of its shape after it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh())
        self.decoy = nn.Linear(6, 4)

    def forward(self, x):
        features = self.body(x)
        self.decoy(features)
        return self.head(features)


class Custom(nn.Module):
    """A body and a head, and `forward` as given."""

    def __init__(self, forward, head=None):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = head or nn.Linear(4, 4)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def test_head_of_a_sequential():
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    expected = ClassificationHead(weight="3.weight", bias="3.bias", num_classes=4, num_features=6, nonnegative=True)
    assert classification_head(model, (2, 4)) == expected
    assert classification_head(LossGradient(model, nn.CrossEntropyLoss()), (2, 4)) == expected


def test_features_of_both_signs_are_seen():
    for body in (nn.Tanh(), nn.SiLU(), nn.Identity()):
        assert not classification_head(nn.Sequential(nn.Linear(8, 6), body, nn.Linear(6, 4)), (8,)).nonnegative


def test_head_is_found_by_what_comes_out_not_by_its_place():
    assert classification_head(HeadFirst(), (8,)).weight == "head.weight"


@pytest.mark.parametrize("tail", [nn.LogSoftmax(dim=1), nn.Identity(), nn.Dropout(0.5)])
def test_head_before_a_harmless_tail(tail):
    model = nn.Sequential(nn.Linear(4, 3), tail).eval()
    head = classification_head(model, (4,))
    assert head.weight == "0.weight"
    assert head.log_softmax == isinstance(tail, nn.LogSoftmax)


def test_head_without_a_bias_or_with_a_frozen_one():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    assert classification_head(model, (4,)).bias is None
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    assert classification_head(model, (4,)).bias is None


def test_finding_the_head_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    classification_head(model, (4,))
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def twice(self, x):
    return self.head(self.head(self.body(x)))


def shared_head():
    model = Custom(lambda self, x: self.head(self.body(x)))
    model.head.weight = model.body.weight
    return model


def frozen_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight.requires_grad_(False)
    return model


REFUSED = {
    "convolution": (
        nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (1, 4, 4),
        r"the last layer that ran is '2' \(Flatten\)",
    ),
    "softmax": (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), (4,), "leave the softmax to the loss"),
    "in-place activation": (
        nn.Sequential(nn.Linear(4, 3), nn.Threshold(1e3, 0.0, inplace=True)),
        (4,),
        "not those of an nn.Linear",
    ),
    "scaled": (
        Custom(lambda self, x: 2 * self.head(self.body(x))),
        (4,),
        r"not those of an nn.Linear.*'head' \(Linear\)",
    ),
    "functional": (Custom(lambda self, x: x @ self.head.weight), (4,), "no module at all"),
    "sequence": (nn.Sequential(nn.Linear(4, 3)), (5, 4), r"shape \(2, 5, 3\)"),
    "tuple": (Custom(lambda self, x: (self.head(self.body(x)), x)), (4,), "give tuple"),
    "used twice": (Custom(twice), (4,), "'head': its weight is used in more than one place"),
    "shared": (shared_head(), (4,), "'head': its weight is used in more than one place"),
    "frozen": (frozen_head(), (4,), "'1': its weight is frozen"),
    "weight norm": (
        nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
        (4,),
        "'1': its weight is computed from other parameters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_without_a_head(case):
    model, shape, message = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=message):
        classification_head(model, shape)


def test_train_mode_batchnorm_is_refused_where_the_gradient_refuses_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="'1' \\(BatchNorm1d\\) is in training mode"):
        classification_head(LossGradient(model, nn.CrossEntropyLoss()), (4,))


def test_a_wrong_input_shape_says_so():
    with pytest.raises(InputError, match=r"Inputs of shape \(2, 5\) do not go through Sequential"):
        classification_head(nn.Sequential(nn.Linear(4, 3)), (5,))


# ---------------------------------------------------------------------- the loss


def checked(loss_fn, *tail):
    function = LossGradient(nn.Sequential(nn.Linear(4, 5), *tail), loss_fn)
    check_cross_entropy(function, classification_head(function, (4,)))


@pytest.mark.parametrize(
    "loss_fn",
    [nn.CrossEntropyLoss(), F.cross_entropy, lambda z, y: F.nll_loss(z.log_softmax(1), y)],
    ids=["module", "function", "own"],
)
def test_any_mean_cross_entropy_passes(loss_fn):
    checked(loss_fn)


def test_negative_log_likelihood_passes_after_a_log_softmax_only():
    checked(nn.NLLLoss(), nn.LogSoftmax(dim=1))
    with pytest.raises(InputError, match="is not"):
        checked(nn.NLLLoss())


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), r"is not \(softmax\(z\) - onehot\(y\)\) / B.*without class weights"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1, 1, 1, 2])), r"is not \(softmax\(z\) - onehot\(y\)\) / B"),
        (nn.CrossEntropyLoss(reduction="sum"), "sums over the batch.*divide the sent gradient by the batch size"),
        (nn.MultiMarginLoss(), r"is not \(softmax\(z\) - onehot\(y\)\) / B"),
        (nn.BCEWithLogitsLoss(), "does not take class scores and class indices"),
    ],
)
def test_other_losses_are_refused(loss_fn, message):
    with pytest.raises(InputError, match=message):
        checked(loss_fn)
