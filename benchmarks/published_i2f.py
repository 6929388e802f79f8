"""The published influence method written plainly, for others to be compared with (Zhang et al. 2023 and their code).

`lambda_max` by SciPy's `eigsh` on `J^T J` in parameter space, each product two double backward passes and two copies
between NumPy and torch; the exact form by gradient descent on `|J^T b - delta|^2`. Not a benchmark by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class PlainJacobian:
    """`J` of one batch by double backward, taken anew for every product."""

    def __init__(self, model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.loss_fn, self.inputs, self.targets = model, loss_fn, inputs, targets
        self.parameters = list(model.parameters())
        self.sizes = [p.numel() for p in self.parameters]

    def matvec(self, delta: Tensor) -> Tensor:
        """`J delta` for one vector `(P,)`: shape of the inputs."""
        x = self.inputs.clone().requires_grad_(True)
        loss = self.loss_fn(self.model(x), self.targets)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        pieces = delta.split(self.sizes)
        product = sum((g * v.view_as(g)).sum() for g, v in zip(gradients, pieces, strict=True))
        return torch.autograd.grad(product, x)[0]

    def rmatvec(self, u: Tensor) -> Tensor:
        """`J^T u`: `(P,)`."""
        x = self.inputs.clone().requires_grad_(True)
        (by_input,) = torch.autograd.grad(self.loss_fn(self.model(x), self.targets), x, create_graph=True)
        pieces = torch.autograd.grad((by_input * u).sum(), self.parameters, materialize_grads=True)
        return torch.cat([p.flatten() for p in pieces])


def largest_eigenvalue(jacobian: PlainJacobian, *, tolerance: float, seed: int) -> tuple[float, int]:
    """`lambda_max(J^T J)` by ARPACK in parameter space, and how many products it took."""
    like, products = jacobian.parameters[0], 0

    def product(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        vector = torch.from_numpy(v.ravel()).to(like)
        return jacobian.rmatvec(jacobian.matvec(vector)).cpu().numpy()

    size = sum(jacobian.sizes)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    operator = LinearOperator((size, size), matvec=product, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    values = eigsh(operator, k=1, which="LM", tol=tolerance, v0=start, return_eigenvectors=False)
    return float(values[0]), products


def lower_bound(jacobian: PlainJacobian, delta: Tensor, *, tolerance: float, seed: int) -> tuple[float, float]:
    """`|J delta| / lambda_max` and `lambda_max`."""
    largest, _ = largest_eigenvalue(jacobian, tolerance=tolerance, seed=seed)
    return float(jacobian.matvec(delta).norm()) / largest, largest


def gradient_descent(jacobian: PlainJacobian, delta: Tensor, step: float, iterations: int) -> Tensor:
    """`b` after so many steps of gradient descent on `|J^T b - delta|^2 / 2` from zero."""
    b = torch.zeros_like(jacobian.inputs)
    for _ in range(iterations):
        b = b - step * jacobian.matvec(jacobian.rmatvec(b) - delta)
    return b


def gradient_descent_iterations(singular: Sequence[float] | Tensor, coefficients: Tensor, accuracy: float) -> int:
    """How many steps of `1 / lambda_max` bring `|b|` within `accuracy` of its limit.

    After `n` steps the part of `b` along the singular vector of `sigma` is its limit times
    `1 - (1 - sigma^2 / sigma_max^2)^n`, so the steps can be counted without being taken. `singular`: `(D,)`;
    `coefficients`: `(D,)`, the limit's parts.
    """
    ratio = (torch.as_tensor(singular, dtype=torch.float64) / max(singular)) ** 2
    limit = coefficients.double()

    def short(n: float) -> bool:
        part = limit * -torch.expm1(n * torch.log1p(-ratio.clamp_max(1 - 1e-15)))
        return bool(part.norm() < (1 - accuracy) * limit.norm())

    high = 1.0
    while short(high):
        high *= 2
    low = high / 2
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if short(middle) else (low, middle)
    return int(high)
