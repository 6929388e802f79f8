"""Clipping against plain autograd, example by example, in float64."""

import copy

import pytest
import torch
from torch import nn

from gradguard.defenses.clipping import ClipPerExample, ClipUpdate
from gradguard.defenses.release import Release
from gradguard.errors import InputError, UnsupportedModelError
from gradguard.functional.loss_gradient import LossGradient


class Bare(nn.Module):
    """Parameters that no known layer uses."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return torch.tanh(x.flatten(1) @ self.w.T)[:, :3] * self.w.sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x.flatten(1))))


MODELS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
    ),
    "bare": Bare,
    "tied": Tied,
}
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 1.0][:3], dtype=torch.float64)),
    "ignored": nn.CrossEntropyLoss(ignore_index=1),
}


def setting(model="dense", seed=0):
    torch.manual_seed(seed)
    net = MODELS[model]().double()
    return net, torch.randn(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 2])


def shares(net, loss_fn, x, y):
    """Each example's share: the batch's loss with the other rows of the outputs held."""
    held = net(x).detach()
    found = []
    for r in range(len(x)):
        row = torch.arange(len(x))[:, None] == r
        loss = loss_fn(torch.where(row, net(x), held), y)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_layer", [False, True])
def test_is_the_sum_of_the_clipped_shares(model, loss, per_layer):
    net, x, y = setting(model)
    if loss == "weights" and model == "tied":
        pytest.skip("three weights, four classes")
    loss_fn, limit = LOSSES[loss], 0.7 / 5
    before = copy.deepcopy(net.state_dict())
    sent = (
        ClipPerExample(max_norm=0.7, per_layer=per_layer)
        .start()
        .protect(Release(loss_gradient=LossGradient(net, loss_fn), inputs=x, targets=y))
    )
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for share in shares(net, loss_fn, x, y):
        for i, g in enumerate(share):
            length = g.norm() if per_layer else torch.cat([s.flatten() for s in share]).norm()
            bound = limit / len(share) ** 0.5 if per_layer else limit
            expected[i] = expected[i] + g * min(1.0, (bound / length.clamp_min(1e-300)).item())
    for got, want in zip(sent.message.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert sent.sensitivity == (pytest.approx(limit) if loss in ("mean", "sum") else None)


def test_a_large_norm_is_the_identity():
    net, x, y = setting()
    function = LossGradient(net, nn.CrossEntropyLoss())
    sent = ClipPerExample(max_norm=1e6).start().protect(Release(loss_gradient=function, inputs=x, targets=y))
    for n, g in function(x, y).items():
        torch.testing.assert_close(sent.message[n], g)
    assert sent.cost["clipped"] == 0


def test_no_parameter_sized_tensor_per_example():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
            return out

    net = nn.Sequential(nn.Linear(784, 784), nn.ReLU(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    x, y = torch.randn(64, 784), torch.randint(10, (64,))
    release = Release(loss_gradient=LossGradient(net, nn.CrossEntropyLoss()), inputs=x, targets=y)
    ClipPerExample(max_norm=1.0).start().protect(release)  # what is remembered of a model is found out once
    with Largest() as largest:
        ClipPerExample(max_norm=1.0).start().protect(release)
    assert sum(p.numel() for p in net.parameters()) > 1e6
    assert largest.size <= 784 * 784


def test_examples_that_the_model_mixes_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    function = LossGradient(net, nn.CrossEntropyLoss(), train_mode="as sent")
    release = Release(
        loss_gradient=function, inputs=torch.randn(5, 4, dtype=torch.float64), targets=torch.tensor([0, 1, 2, 0, 2])
    )
    with pytest.raises(UnsupportedModelError, match="mixes"):
        ClipPerExample(max_norm=1.0).start().protect(release)


def test_another_message_is_refused():
    net, x, y = setting()
    function = LossGradient(net, nn.CrossEntropyLoss())
    wrong = {n: 2 * g for n, g in function(x, y).items()}
    with pytest.raises(InputError, match="not the gradient of the batch"):
        ClipPerExample(max_norm=1.0).start().protect(Release(wrong, loss_gradient=function, inputs=x, targets=y))


def test_the_norm_follows_the_quantile_and_can_be_taken_back():
    net, x, y = setting()
    release = Release(loss_gradient=LossGradient(net, nn.CrossEntropyLoss()), inputs=x, targets=y)
    protector = ClipPerExample(max_norm=100.0, quantile=0.5).start()
    for _ in range(150):
        protector.protect(release)
    norms = torch.stack(
        [torch.cat([g.flatten() for g in s]).norm() * 5 for s in shares(net, nn.CrossEntropyLoss(), x, y)]
    )
    assert norms.min() < protector.max_norm < norms.max()
    now = protector.max_norm
    protector.protect(release)
    protector.withdraw()
    assert protector.max_norm == now


def test_one_example_is_clipped_as_its_declaration_says():
    net, x, y = setting()
    function = LossGradient(net, nn.CrossEntropyLoss())
    sent = ClipPerExample(max_norm=0.1).start().protect(Release(loss_gradient=function, inputs=x[:1], targets=y[:1]))
    again = sent.knowledge.transforms[0](function(x[:1], y[:1]))
    for n, g in sent.message.items():
        torch.testing.assert_close(again[n], g)
    assert sent.knowledge.scale is None


def test_an_update_is_scaled_down():
    gradient = {"a": torch.full((4,), 3.0)}
    sent = ClipUpdate(max_norm=1.5).start().protect(Release(gradient))
    assert torch.allclose(sent.message["a"], torch.full((4,), 0.75))
    assert sent.sensitivity == 1.5
