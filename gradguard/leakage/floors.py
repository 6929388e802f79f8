"""Floors under the error of an attacker who inverts a perturbed gradient: what no reconstruction gets below.

To first order the attacker sees `J^T x + noise`. With noise `n ~ N(0, N)` on the gradient the error of any unbiased
estimate of `x` is at least `tr((J N^{-1} J^T)^{-1})` (Cramer-Rao; Hannun et al. 2021, arXiv 2102.11673). Real attackers
know what pictures look like; with `x ~ N(mu, C)` and an observation that is off by `d ~ N(0, K)`, the error of any
estimate whatever is at least `tr(C - C (C + K)^{-1} C)` (Bayes). Noise on the gradient has `K = (J N^{-1} J^T)^{-1}`;
noise `J^T d` inside the range of `J^T` has the covariance of `d` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.restriction import sent_only
from gradguard.functional.vectors import Gradient, flatten
from gradguard.leakage.influence import fits_dense
from gradguard.leakage.spectrum import GRAM_SIZE, dense_eigenpairs, gram_eigenpairs, gram_matrix, probe
from gradguard.linalg import LinearOperator, mean_and_error, random_signs
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.linalg.operator import safe_inverse

Variance = float | Mapping[str, float | Tensor]
Method = Literal["auto", "dense", "gram", "lanczos"]
Precision = float | Gradient | None
Product = Callable[[Tensor], Tensor]


class Prior(Protocol):
    """What inputs look like: a covariance `C` of one example, known by its products."""

    def sqrt(self, x: Tensor) -> Tensor:
        """`C^{1/2} x`, symmetric.

        Args:
            x: Shape `(N, *input_shape)`.

        Returns:
            The shape of `x`.
        """


@dataclass(frozen=True, kw_only=True)
class Floor:
    """`R` floors under the error of an attacker: one per example, or one for the joint operator.

    Args:
        mse: Mean squared error per input element, shape `(R,)`, squared input units.
        standard_error: Of `mse`, shape `(R,)`, from the random probes (a fair one from 16 of them on); 0 where none
            were needed.
        prior_mse: `tr(C) / D`, shape `(R,)`, the error without any gradient; `None` for the Cramer-Rao floor.
        undetermined: Shape `(R,)`: how many directions of the input the gradient does not show at all; `None` for the
            Bayes floor, or where it was not looked at. The Cramer-Rao floor does not count them: it is that of an
            attacker who is told them, and no unbiased attacker exists who is not.
        method: "dense" (from `J`), "gram" (from `J J^T`) or "lanczos" (neither is formed).
        iterations: Lanczos steps.
        converged: Shape `(R,)`; where false, more steps would change `mse`.
    """

    mse: Tensor
    standard_error: Tensor
    prior_mse: Tensor | None
    undetermined: Tensor | None
    method: Literal["dense", "gram", "lanczos"]
    iterations: int
    converged: Tensor

    @property
    def psnr(self) -> Tensor:
        """`(R,)`, dB for inputs in a range of 1: no attacker's expected error is a better one."""
        return _psnr(self.mse)

    @property
    def prior_psnr(self) -> Tensor | None:
        """`(R,)`, dB: what the prior alone gives, without any gradient; `None` for the Cramer-Rao floor."""
        return None if self.prior_mse is None else _psnr(self.prior_mse)


def exact_floor(
    mse: Tensor,
    method: Literal["dense", "gram"] = "dense",
    *,
    prior_mse: Tensor | None = None,
    undetermined: Tensor | None = None,
) -> Floor:
    """A floor from matrices, without probes and steps.

    Args:
        mse: As in `Floor`.
        method: The same.
        prior_mse: The same.
        undetermined: The same.

    Returns:
        The floor, converged and without a standard error.
    """
    return Floor(
        mse=mse,
        standard_error=torch.zeros_like(mse),
        prior_mse=prior_mse,
        undetermined=undetermined,
        method=method,
        iterations=0,
        converged=torch.ones_like(mse, dtype=torch.bool),
    )


def cramer_rao_floor(
    jacobian: InputJacobian,
    variance: Variance | None = None,
    *,
    covariance: Product | None = None,
    rounds: int = 1,
    method: Method = "auto",
    probes: int = 32,
    steps: int = 300,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Floor:
    """The least mean squared error of an unbiased attacker: `tr((J N^{-1} J^T)^{-1}) / D` (Hannun et al. 2021).

    Give one of `variance` and `covariance`. There is no damping: an attacker who damps is biased. What that attacker is
    bound by is `bayes_floor`.

    Args:
        jacobian: `R` problems.
        variance: Of the noise on the (batch's) gradient: a number, or a dictionary with a number or a tensor in the
            parameter's shape for each parameter (`inf`, or no entry: not sent).
        covariance: `u -> K u`, shape of the inputs, for noise `J^T d`, `d ~ N(0, K)`: the floor is `tr(K) / D`.
        rounds: Gradients of the same example under fresh noise, which divide the noise by as many.
        method: "dense" takes the singular values of `J`, "gram" the eigenvalues of `J J^T` (`n` products; those below
            its rounding count as undetermined), both in float64. "lanczos" forms neither: stochastic quadrature. Then
            `undetermined` is an estimate, and quadrature lies below the true value (up to the probes' noise), so that a
            floor that has not converged is too low, never too high. "auto" chooses by size.
        probes: Of "lanczos": random vectors, at least 2.
        steps: Of "lanczos": Lanczos steps at most.
        tolerance: Of "lanczos": fewer steps once the floor changes by less than this share.
        generator: Draws the probes.

    Returns:
        The floors.

    Raises:
        InputError: If the noise is not given once, or an option is outside its range.
    """
    _check_options(rounds, method, probes, steps)
    precision = _precision(jacobian, variance)
    if (precision is None) == (covariance is None):
        raise InputError("Give the noise once: `variance` (on the gradient) or `covariance` (of `d`, for `J^T d`).")
    n = jacobian.size
    chosen = _choose(jacobian, method, gram=True)
    if chosen != "lanczos":
        exact = jacobian.in_dtype(torch.float64)
        values, vectors = _eigenpairs(exact, _to(precision, exact), None, chosen)
        # Singular values below the rounding of the largest; in the Gram matrix rounding is of their squares.
        relative = torch.finfo(values.dtype).eps * max(n, jacobian.gradient.num_parameters if chosen == "dense" else n)
        cut = (relative**2 if chosen == "dense" else relative) * values[:, :1]
        seen = values > cut
        if covariance is None:
            each = safe_inverse(values * seen)
        else:
            images = _flat(covariance, jacobian)(vectors)
            each = (vectors * images).sum(-1) * seen
        mse = each.sum(-1) / (n * rounds)
        return exact_floor(mse, chosen, undetermined=n - seen.sum(-1))
    if covariance is not None:
        signs = random_signs(jacobian.gram_operator(), probes, generator)
        value, error = mean_and_error((signs * _flat(covariance, jacobian)(signs)).sum(-1).double())
        scale = n * rounds
        return Floor(
            mse=value / scale,
            standard_error=error / scale,
            prior_mse=None,
            undetermined=None,
            method="lanczos",
            iterations=0,
            converged=torch.ones_like(value, dtype=torch.bool),
        )
    rounding = n * torch.finfo(jacobian.inputs.dtype).eps

    def inverse(values: Tensor) -> Tensor:
        seen = values > rounding * values.amax(dim=-1, keepdim=True)
        return safe_inverse(values * seen)

    start = random_signs(jacobian.gram_operator(), probes, generator)

    def build(stacked: InputJacobian) -> LinearOperator:
        return _operator(stacked, _information(stacked, precision))

    found = probe(jacobian, build, inverse, start, steps=steps, tolerance=tolerance)
    value, error = mean_and_error(found.quadratic)
    unseen = (found.weights * (inverse(found.nodes) == 0)).sum(-1).mean(-1)
    return Floor(
        mse=value / (n * rounds),
        standard_error=error / (n * rounds),
        prior_mse=None,
        undetermined=unseen.round().long(),
        method="lanczos",
        iterations=found.iterations,
        converged=found.converged,
    )


def bayes_floor(
    jacobian: InputJacobian,
    prior: Prior,
    variance: Variance | None = None,
    *,
    covariance: Product | None = None,
    whitened: Product | None = None,
    rounds: int = 1,
    method: Method = "auto",
    probes: int = 32,
    steps: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Floor:
    """The least mean squared error of any attacker who knows `prior` and the defense: `tr(C - C (C + K)^{-1} C) / D`.

    It is exact for the linear-Gaussian model, and reached there by the posterior mean. The prior is taken per example,
    examples independent. Give the noise once, as one of `variance`, `covariance` and `whitened`.

    "lanczos": with `M = C^{1/2} f(W) C^{1/2}`, `f(w) = 1 / (1 + w)` for `variance` (`W` with `N^{-1}` in its middle)
    and `k / (1 + k)` for `whitened`, `tr M` comes from `probes` Krylov spaces of `W` of at most `steps` steps, fewer
    once `tolerance` is met. A quarter of the probes go to the prior's leading directions, which are then exact; `C`,
    whose trace is known, is the control variate for the rest. Quadrature that has not converged lies below the floor
    for `variance` and above it for `covariance`.

    Args:
        jacobian: `R` problems.
        prior: What inputs look like.
        variance: Of noise on the gradient, as in `cramer_rao_floor`: `K = (J N^{-1} J^T)^{-1}`, which is never
            inverted.
        covariance: `u -> K u`, shape of the inputs, for noise `J^T d` with any covariance `K` of `d`.
        whitened: `k`, elementwise on eigenvalues `w >= 0` of `W = C^{1/2} J J^T C^{1/2}`, for noise `J^T d` with `d` of
            covariance `K = C^{1/2} k(W) C^{1/2}` (for `d ~ N(0, s C)`, `k` is the constant `s`).
        rounds: Gradients of the same example under fresh noise, which divide `K` by as many.
        method: "dense" takes the singular values of `J`, "gram" the eigenvalues of `J J^T` (`n` products), both in
            float64; "lanczos" forms neither. "auto" forms `J` where it is small, and never `J J^T`.
        probes: Of "lanczos": random vectors, at least 2.
        steps: Of "lanczos": Lanczos steps at most.
        tolerance: Of "lanczos": fewer steps once the floor changes by less than this share.
        generator: Draws the probes.

    Returns:
        The floors, with the prior's own error beside them.

    Raises:
        InputError: If the noise is not given once, an option is outside its range, or a covariance is none.
    """
    _check_options(rounds, method, probes, steps)
    precision = _precision(jacobian, variance)
    if sum(noise is not None for noise in (precision, covariance, whitened)) != 1:
        raise InputError(
            "Give the noise once: `variance` (on the gradient), or `whitened` or `covariance` (of `d`, for `J^T d`)."
        )
    if not hasattr(prior, "sqrt"):
        raise InputError(f"`prior` must have a method `sqrt`, as `PowerLawPrior` does; got {type(prior).__name__}.")

    def shrinkage(w: Tensor) -> Tensor:
        """The share of the prior's variance that is left, by eigenvalue of `W`."""
        w = w.clamp_min(0)
        if whitened is None:
            return 1 / (1 + rounds * w)
        k = torch.as_tensor(whitened(w), dtype=w.dtype, device=w.device).expand(w.shape)
        return 1 / (1 + rounds / k)  # right at 0 and at infinity

    # In the Jacobian's own dtype, whatever the rest is computed in: the function may hold tensors of that dtype.
    product = None if covariance is None else _flat(covariance, jacobian)
    chosen = _choose(jacobian, method, gram=False)
    if chosen == "lanczos":
        estimate = _bayes_by_probes(
            jacobian, prior, precision, product, shrinkage, rounds, probes, steps, tolerance, generator
        )
    else:
        estimate = _bayes_by_matrices(
            jacobian.in_dtype(torch.float64), prior, precision, product, shrinkage, rounds, chosen
        )
    if not torch.isfinite(estimate.mse).all():
        name = "covariance" if covariance is not None else "whitened" if whitened is not None else "variance"
        raise InputError(f"The floor is not finite: `{name}` gives NaN or no covariance (it must be symmetric, >= 0).")
    return estimate


# ---------------------------------------------------------------------- the Bayes floor's two ways


def _bayes_by_matrices(
    jacobian: InputJacobian,
    prior: Prior,
    precision: Precision,
    covariance: Product | None,
    shrinkage: Product,
    rounds: int,
    method: Literal["dense", "gram"],
) -> Floor:
    n = jacobian.size
    root = _root(prior, jacobian)
    if covariance is not None:
        identity = torch.eye(n, dtype=jacobian.inputs.dtype, device=jacobian.inputs.device)
        c = root(root(identity))
        k = covariance(identity.expand(jacobian.num_problems, -1, -1)) / rounds
        factor, info = torch.linalg.cholesky_ex(c + k)
        gained = torch.cholesky_solve(c.expand_as(k), factor)
        left = c.diagonal() - torch.einsum("ij,rji->ri", c, gained)
        left = torch.where(info[:, None] == 0, left, torch.nan)
    else:
        values, vectors = _eigenpairs(jacobian, _to(precision, jacobian), root, method)
        left = shrinkage(values) * (root(vectors) ** 2).sum(-1)
    mse = left.sum(-1) / n
    return exact_floor(mse, method, prior_mse=_prior_trace(prior, jacobian).expand_as(mse) / n)


def _bayes_by_probes(
    jacobian: InputJacobian,
    prior: Prior,
    precision: Precision,
    covariance: Product | None,
    shrinkage: Product,
    rounds: int,
    probes: int,
    steps: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> Floor:
    """`tr M = tr(Q^T M Q) + b tr(C_2) + tr(M_2 - b C_2)`, `M_2` and `C_2` what is left outside of `Q`.

    `Q` spans about the prior's leading directions, as Hutch++ (Meyer et al. 2021) splits a trace, but the prior is
    known, so that they cost nothing to find. The last term is estimated from random signs; its variance is
    `2 |M_2 - b C_2|^2`, least at `b = <M_2, C_2> / |C_2|^2`, which the same probes give.

    Returns:
        The floor.
    """
    n, rows = jacobian.size, jacobian.num_problems
    root = _root(prior, jacobian)
    exact = min(probes // 4, n // 2)
    signs = random_signs(jacobian.gram_operator(), probes, generator)
    directions = signs[0, :exact]
    for _ in range(3 if exact else 0):  # of subspace iteration
        directions = torch.linalg.qr(root(root(directions)).mT).Q.mT
    outside = _without(signs[:, exact:], directions)
    start = torch.cat([directions.expand(rows, -1, -1), outside], dim=1)

    by_prior = root(root(start))
    prior_quadratic = (start * by_prior).sum(-1).double()
    if covariance is not None:
        noise = covariance

        def total(stacked: InputJacobian) -> LinearOperator:
            def product(u: Tensor) -> Tensor:
                return root(root(u)) + noise(u.reshape(rows, -1, n)).reshape(u.shape) / rounds

            return _operator(stacked, product)

        found = probe(jacobian, total, torch.reciprocal, by_prior, steps=steps, tolerance=tolerance)
        quadratic = prior_quadratic - found.quadratic
        product = by_prior - root(root(found.product))
    else:

        def whitened(stacked: InputJacobian) -> LinearOperator:
            information = _information(stacked, precision)
            return _operator(stacked, lambda u: root(information(root(u))))

        found = probe(jacobian, whitened, shrinkage, root(start), steps=steps, tolerance=tolerance)
        quadratic, product = found.quadratic, root(found.product)

    left, control = (_without(v[:, exact:], directions).double() for v in (product, by_prior))
    share = (left * control).sum((1, 2)) / (control**2).sum((1, 2))
    rest = quadratic[:, exact:] - share[:, None] * prior_quadratic[:, exact:]
    mean, error = mean_and_error(rest)
    trace = _prior_trace(prior, jacobian).double()
    known = share * (trace - prior_quadratic[:, :exact].sum(-1))
    return Floor(
        mse=(quadratic[:, :exact].sum(-1) + known + mean) / n,
        standard_error=error / n,
        prior_mse=trace.expand(rows) / n,
        undetermined=None,
        method="lanczos",
        iterations=found.iterations,
        converged=found.converged,
    )


# ---------------------------------------------------------------------- inside


def _check_options(rounds: int, method: str, probes: int, steps: int) -> None:
    if rounds < 1:
        raise InputError(f"`rounds` must be at least 1, got {rounds}.")
    if method not in ("auto", "dense", "gram", "lanczos"):
        raise InputError(f'`method` must be "auto", "dense", "gram" or "lanczos", got {method!r}.')
    if probes < 2 or steps < 1:
        raise InputError(f"`probes` must be at least 2 and `steps` at least 1, got {probes} and {steps}.")


def _choose(jacobian: InputJacobian, method: Method, *, gram: bool) -> Literal["dense", "gram", "lanczos"]:
    if method != "auto":
        return method
    if fits_dense(jacobian):
        return "dense"
    return "gram" if gram and jacobian.size <= GRAM_SIZE else "lanczos"


def _precision(jacobian: InputJacobian, variance: Variance | None) -> Precision:
    """`N^{-1}`: a number, or a tensor that broadcasts to the parameter's shape for each parameter."""
    if variance is None:
        return None
    if not isinstance(variance, Mapping):
        if not 0 < variance < math.inf:
            raise InputError(f"`variance` must be positive and finite, got {variance}.")
        return 1 / float(variance)
    sent_only(jacobian, list(variance))  # refuses other names, and none at all
    precision = {}
    for name, parameter in jacobian.parameters.items():
        # What was not sent is as good as hidden by noise without bounds.
        value = torch.as_tensor(variance.get(name, math.inf), dtype=torch.float64, device=parameter.device)
        if value.ndim and value.shape != parameter.shape:
            raise InputError(
                f"`variance[{name!r}]` has shape {tuple(value.shape)}; it must be a number or {tuple(parameter.shape)}."
            )
        if not (value > 0).all():
            raise InputError(f"`variance[{name!r}]` must be positive, its smallest value is {value.min().item()}.")
        precision[name] = (1 / value).to(parameter)
    return precision


def _to(precision: Precision, jacobian: InputJacobian) -> Precision:
    if not isinstance(precision, Mapping):
        return precision
    return {n: p.to(jacobian.inputs.dtype) for n, p in precision.items()}


def _information(jacobian: InputJacobian, precision: Precision) -> Product:
    """`J N^{-1} J^T` on `(R, n)`, the Fisher information of the inputs; `J J^T` without `precision`."""

    def weighted(u: Tensor) -> Tensor:
        moved = jacobian.rmatvec(u.reshape(jacobian.inputs.shape))
        assert isinstance(precision, Mapping)
        return jacobian.matvec({name: precision[name] * moved[name] for name in moved}).reshape(u.shape)

    if isinstance(precision, Mapping):
        return weighted
    scale = 1.0 if precision is None else precision
    product = jacobian.gram_operator().matvec
    return lambda u: scale * product(u)


def _eigenpairs(
    jacobian: InputJacobian,
    precision: Precision,
    root: Product | None,
    method: Literal["dense", "gram"],
) -> tuple[Tensor, Tensor]:
    """All eigenpairs of `J N^{-1} J^T`, or of that between two roots of the prior: `(R, n)`, rows `(R, n, n)`."""
    if method == "dense":
        transpose = jacobian.dense().mT
        if isinstance(precision, Mapping):
            full = {n: precision[n].expand(p.shape) for n, p in jacobian.parameters.items()}
            transpose = transpose * flatten(full).sqrt()[:, None]
        elif precision is not None:
            transpose = transpose * precision**0.5
        if root is not None:
            transpose = root(torch.linalg.qr(transpose, mode="r").R)
        return dense_eigenpairs(transpose, full=True)
    gram = gram_matrix(jacobian, lambda stacked: _operator(stacked, _information(stacked, precision)))
    if root is not None:
        gram = root(root(gram).mT)
        gram = (gram + gram.mT) / 2
    return gram_eigenpairs(gram)


def _operator(jacobian: InputJacobian, product: Product) -> LinearOperator:
    """A symmetric product on vectors `(R, n)`."""
    return LinearOperator(product, product, (jacobian.num_problems, jacobian.size, jacobian.size), jacobian.inputs)


def _root(prior: Prior, jacobian: InputJacobian) -> Product:
    """`C^{1/2}` on vectors `(..., n)`, example by example."""
    shape = jacobian.inputs.shape[1:]
    return lambda v: prior.sqrt(v.reshape(-1, *shape)).reshape(v.shape)


def _flat(covariance: Product, jacobian: InputJacobian) -> Product:
    """A product on the inputs' shape as one on `(R, K, n)`."""

    def one(u: Tensor) -> Tensor:
        image = covariance(u.to(jacobian.inputs.dtype).reshape(jacobian.inputs.shape))
        if image.shape != jacobian.inputs.shape:
            raise InputError(
                f"`covariance` must keep the inputs' shape {tuple(jacobian.inputs.shape)}, gave {tuple(image.shape)}."
            )
        return image.to(u.dtype).reshape(u.shape)

    # One call per vector: the function may be anything, and need not know of more vectors than problems.
    return lambda u: torch.stack([one(v) for v in u.unbind(1)], dim=1)


def _prior_trace(prior: Prior, jacobian: InputJacobian) -> Tensor:
    """`tr C` over one problem's inputs."""
    like = jacobian.inputs
    if isinstance(prior, PowerLawPrior):
        return torch.tensor(prior.std**2 * jacobian.size, dtype=like.dtype, device=like.device)
    shape = like.shape[1:]
    size = shape.numel()
    rows = torch.arange(size, device=like.device).split(1024)
    identity = (torch.nn.functional.one_hot(part, size).to(like).reshape(-1, *shape) for part in rows)
    return torch.stack([(prior.sqrt(part) ** 2).sum() for part in identity]).sum() * (jacobian.size // size)


def _without(v: Tensor, directions: Tensor) -> Tensor:
    """`v` `(R, K, n)` without its components along orthonormal rows `(q, n)`."""
    return v - v @ directions.mT @ directions


def _psnr(mse: Tensor) -> Tensor:
    return -10 * torch.log10(mse)
