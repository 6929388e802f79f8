"""The contract of layers: `check_layer(MyModule(3), (3,))` in a test of your own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.layers import LAYERS, layer_of
from gradguard.functional.loss_gradient import LossGradient
from gradguard.testing.unchanged import unchanged

#: Largest index that a module of the examples takes, and one more.
INDICES = 5


def check_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Check that a registered module's products are those of plain double backward, in float64, to 1e-9.

    The module stands between two others, so that its input and its output move; batches of 1 and of 3 examples, as one
    problem and as many; `J^T u` and `J delta`. The reference is autograd alone. In float32 the module goes the same
    way. A subclass with a forward pass of its own must not pass for it.

    Args:
        module: of a registered type.
        shape: of one example that it takes; for a module that takes indices, those are below 5.

    Raises:
        AssertionError: naming what is wrong.
    """
    kind = type(module).__name__
    assert type(module) in LAYERS, f"{kind} is not registered: `@register_layer({kind}, examples=...)`"
    assert layer_of(module, "weight", "bias") is not None, f"the function of {kind} refuses this one: {module}"
    other = type(f"Other{kind}", (type(module),), {})
    assert other not in LAYERS, f"a subclass of {kind} may compute something else and must not be registered with it"
    takes_indices = isinstance(module, nn.Embedding)
    for count in (1, 3):
        for dtype in (torch.float64, torch.float32):
            model = _around(module, shape, takes_indices).to(dtype).eval()
            _check_products(model, shape, count)


class _Indexed(nn.Module):
    """A table of positions beside the private input: what an embedding within a model does."""

    def __init__(self, table: nn.Module, positions: int) -> None:
        super().__init__()
        self.table, self.indices = table, torch.arange(positions) % INDICES

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x[..., None] * self.table(self.indices)).flatten(1)


def _around(module: nn.Module, shape: tuple[int, ...], takes_indices: bool) -> nn.Sequential:
    """The module between an elementwise scale of the inputs and a smooth head."""
    module = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0.5, 0.5)
        inner: nn.Module = _Indexed(module, shape[0]) if takes_indices else module
        size = inner.eval()(torch.rand(1, *shape)).numel()
        head = nn.Linear(size, 3)
        return nn.Sequential(nn.Softplus(), inner, nn.Tanh(), nn.Flatten(), head)


def _check_products(model: nn.Sequential, shape: tuple[int, ...], count: int) -> None:
    kind = type(model[1]).__name__
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(count)
    x, u = (torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    targets = torch.arange(count) % 3
    function = LossGradient(model, nn.CrossEntropyLoss())
    names, parameters = zip(*model.named_parameters(), strict=True)
    delta = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for n, p in zip(names, parameters, strict=True)
    }
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    with unchanged(model, x, targets):
        jacobian = InputJacobian(function, x, targets)
        assert jacobian.way == "layer by layer", f"a model with {kind} goes {jacobian.way}"
        image, images = jacobian.matvec(delta), jacobian.rmatvec(u)
        whole = jacobian.joint().rmatvec(u)
    leaf = x.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(model(leaf), targets)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    product = torch.stack([(g * delta[n]).sum() for n, g in zip(names, gradients, strict=True)]).sum()
    (by_input,) = torch.autograd.grad(product, leaf, retain_graph=True)
    _same(f"J delta of {kind}, {count} examples", image, by_input.reshape(image.shape), tolerance)
    for row in range(count):
        mine = torch.zeros_like(x)
        mine[row] = u[row]
        moved = _directional(model, x, targets, mine)
        for name, value in zip(names, moved, strict=True):
            _same(f"J^T u of {kind}, {name!r}, example {row} of {count}", images[name][row], value, tolerance)
    for name, value in zip(names, _directional(model, x, targets, u), strict=True):
        _same(f"J^T u of {kind}, {name!r}, the batch of {count}", whole[name].reshape(value.shape), value, tolerance)


def _directional(model: nn.Module, x: Tensor, targets: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """`d/de grad(x + e u)`, by autograd through autograd: the derivative of `<grad, v>` by `v` along `u`."""
    leaf = x.clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(model(leaf), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    weights = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    (by_input,) = torch.autograd.grad(gradients, leaf, grad_outputs=weights, create_graph=True)
    return torch.autograd.grad((by_input * u).sum(), weights, allow_unused=True, materialize_grads=True)


def _same(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    gap = (found - expected).abs().max().item() if found.numel() else 0.0
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert gap <= tolerance * max(size, 1e-3), f"{what}: off by {gap:.3g}, of {size:.3g}"
