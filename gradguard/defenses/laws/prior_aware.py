"""Prior-aware noise: where pictures have energy, and the gradient shows little."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradguard.defenses.draws import randn
from gradguard.defenses.laws.in_range import Displacement, InRange
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.leakage.influence import fits_dense
from gradguard.leakage.spectrum import dense_eigenpairs
from gradguard.linalg import LinearOperator, function_product
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.linalg.lanczos import krylov_space

#: Halvings of the interval of the water level: past the precision of float64.
HALVINGS = 80


@dataclass(frozen=True, kw_only=True)
class PriorAware(InRange):
    """`d ~ N(0, C^{1/2} f(W) C^{1/2})`, `W = C^{1/2} J J^T C^{1/2}`, `f(w) = max(0, tau sqrt(c / w) - 1)`.

    Reverse water-filling: of all laws of `d` in the eigenvectors `u` of `W` it leaves an attacker who knows the prior
    `C` and this law the highest Bayes floor at the same expected norm of `J^T d`; `c = u^T C u`, and the water level
    `tau` is set by that norm, summed over the batch's examples. (The floor is `sum c f / (1 + f)`, the norm
    `sum f w`; setting the derivative to zero gives the rule.) With `C = I` it is the paper's small-eigenvalue rule
    (Zhang et al. 2023, section 5), derived.

    Small inputs: exact. Large ones: `c = 1` and a function of `W` by `steps` Lanczos steps, `tau` from the same Krylov
    space; its floor is a little higher.

    Args:
        prior: The covariance `C`: anything with `sqrt(x)`, `(N, *input_shape)`.
        steps: Of Lanczos, at least 1.

    Raises:
        InputError: If `steps` is below 1.
    """

    prior: PowerLawPrior = field(default_factory=PowerLawPrior)
    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"`steps` must be at least 1, got {self.steps}.")

    def displacement(self, jacobian: InputJacobian, source: torch.Generator, size: float) -> Displacement:
        """Gaussian, by the rule.

        Args:
            jacobian: Per example.
            source: Draws the noise.
            size: The norm that `J^T d` is to have, which the shape depends on.

        Returns:
            `d` and its covariance.

        Raises:
            InputError: If the Jacobian is the joint operator of a batch.
        """
        self._require_per_example(jacobian)
        noise = randn(jacobian.inputs.shape, jacobian.inputs, source, "inputs").flatten(1)
        return self._exact(jacobian, noise, size) if fits_dense(jacobian) else self._by_lanczos(jacobian, noise, size)

    def _exact(self, jacobian: InputJacobian, noise: Tensor, size: float) -> Displacement:
        exact = jacobian.in_dtype(torch.float64)
        shape = jacobian.inputs.shape
        transpose = self._root(torch.linalg.qr(exact.dense().mT, mode="r").R, shape)
        w, vectors = dense_eigenpairs(transpose, full=True)
        images = self._root(vectors, shape)
        c = images.square().sum(-1)
        # What the gradient does not show cannot be moved: `J^T` would return its rounding errors.
        seen = w > (torch.finfo(w.dtype).eps * w.shape[-1]) ** 2 * w[:, :1]
        factor = torch.where(seen, water_filling(c, w, w * seen, size**2), torch.zeros_like(w))
        value = torch.einsum("rk,rkn->rn", factor.sqrt() * noise.double(), images)

        def covariance(u: Tensor) -> Tensor:
            flat = u.double().flatten(1)
            product = torch.einsum("rk,rkn->rn", factor * torch.einsum("rkn,rn->rk", images, flat), images)
            return product.reshape(u.shape).to(u)

        return Displacement(value.to(noise).reshape(shape), covariance)

    def _by_lanczos(self, jacobian: InputJacobian, noise: Tensor, size: float) -> Displacement:
        shape = jacobian.inputs.shape
        gram = jacobian.gram_operator()

        def product(u: Tensor) -> Tensor:
            return self._root(gram.matvec(self._root(u, shape)), shape)

        whitened = LinearOperator(product, product, gram.shape, jacobian.inputs)
        space = krylov_space(whitened, min(self.steps, jacobian.size), start=noise)
        nodes, rotation = torch.linalg.eigh(space.tridiagonal().double())
        nodes = nodes.clamp_min(torch.finfo(nodes.dtype).tiny)
        length = noise.double().norm(dim=-1, keepdim=True)
        weights = length.square() * rotation[:, 0].square()
        level = water_level(torch.ones_like(nodes), nodes, weights * nodes, size**2)

        def spread(w: Tensor) -> Tensor:
            return (level / w.clamp_min(torch.finfo(w.dtype).tiny).sqrt() - 1).clamp_min(0)

        coefficients = torch.einsum("rjk,rk->rj", rotation, spread(nodes).sqrt() * rotation[:, 0]) * length
        value = self._root(torch.einsum("rj,rjn->rn", coefficients.to(space.basis), space.basis), shape)

        def covariance(u: Tensor) -> Tensor:
            whole = function_product(whitened, spread, self._root(u.flatten(1), shape), steps=self.steps).product
            return self._root(whole, shape).reshape(u.shape)

        return Displacement(value.reshape(shape), covariance)

    def _root(self, vectors: Tensor, shape: torch.Size) -> Tensor:
        """`C^{1/2}` on vectors `(..., n)` of inputs of `shape`."""
        return self.prior.sqrt(vectors.reshape(-1, *shape[1:])).reshape(vectors.shape)


def water_level(c: Tensor, w: Tensor, energy: Tensor, budget: float) -> Tensor:
    """`tau` with `sum energy max(0, tau sqrt(c / w) - 1) = budget`, by halving; nothing is read from the device.

    Args:
        c: What a direction is worth, positive.
        w: Its price, not negative.
        energy: What noise of factor 1 in it costs of the budget; 0 for directions that are left out.
        budget: Over all directions, positive.

    Returns:
        A scalar.
    """
    slope = _slope(c, w, energy)
    # At this level the direction that is filled first alone takes the whole budget.
    first = (1 + budget / energy.clamp_min(torch.finfo(w.dtype).tiny)) / slope.clamp_min(torch.finfo(w.dtype).tiny)
    high = torch.where(energy > 0, first, torch.full_like(first, torch.inf)).min()
    low = torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = (energy * (middle * slope - 1).clamp_min(0)).sum() > budget
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return high


def water_filling(c: Tensor, w: Tensor, energy: Tensor, budget: float) -> Tensor:
    """`f = max(0, tau sqrt(c / w) - 1)` at the water level of `budget`.

    Args:
        c: As in `water_level`.
        w: The same.
        energy: The same.
        budget: The same.

    Returns:
        The factor of each direction, the shape of `w`; 0 for directions that are left out.
    """
    return (water_level(c, w, energy, budget) * _slope(c, w, energy) - 1).clamp_min(0)


def _slope(c: Tensor, w: Tensor, energy: Tensor) -> Tensor:
    """`sqrt(c / w)`, 0 for directions that are left out."""
    return torch.where(energy > 0, (c / w.clamp_min(torch.finfo(w.dtype).tiny)).sqrt(), torch.zeros_like(w))
