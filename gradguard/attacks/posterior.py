"""Attacks on a message with declared noise by someone who knows what inputs look like: MAP and the Wiener filter.

With noise of covariance `N` on the gradient and inputs `x ~ N(mu, C)` the likeliest input minimises
`|N^{-1/2} (g(x) - sent)|^2 + |C^{-1/2} (x - mu)|^2`. Noise `J^T d` in the range of `J^T` cannot be told from another
input: a matching attack finds `x + d`, and the posterior mean is `mu + C (C + K)^{-1} (x + d - mu)` for `d ~ N(0, K)`.
To first order these are the attackers whose error is `gradguard.leakage.bayes_floor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradguard.attacks._labels.inference import infer_labels
from gradguard.attacks._matching.declared import element_weights
from gradguard.attacks._matching.trials import Trials
from gradguard.attacks._options import check_whole
from gradguard.attacks.base import Attack
from gradguard.attacks.dlg import DLG
from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.restriction import sent_only
from gradguard.functional.structures import Rest, map_rest
from gradguard.functional.vectors import flatten
from gradguard.linalg import LinearOperator, lsmr
from gradguard.linalg.covariances import PowerLawPrior
from gradguard.threats.observation import Observation, Reconstruction

#: The normal equations are formed where inputs have at most this many elements, and `J` of all trials so many.
DENSE_SIZE, DENSE_ELEMENTS = 1024, 2**26
#: A search ends at a step that gains less than this share of the objective.
LEAST_GAIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class MAP(Attack):
    """The likeliest input under declared Gaussian noise and a Gaussian prior (ours), by damped Gauss-Newton steps.

    It needs `Observation(knowledge=...)` with a `variance`. What was not sent, and layers that are left out, do not
    count. The first start is the prior's mean, the others are drawn from the prior; the result has the highest
    posterior density.

    Args:
        starts: At least 1.
        iterations: Steps of each start at most.
        prior: What inputs look like: an object with `sqrt(x)` (`C^{1/2} x`), and perhaps `mean`. Default: a power law
            with a quarter of the value range as its deviation, around the middle of the range.

    Raises:
        InputError: If a number is below 1.
    """

    takes_structures: ClassVar[bool] = True
    takes_missing_gradients: ClassVar[bool] = True

    starts: int = 3
    iterations: int = 60
    prior: Any = field(default=None)

    def __post_init__(self) -> None:
        check_whole(1, starts=self.starts, iterations=self.iterations)
        check_prior(self.prior)

    def check(self, observation: Observation) -> None:
        """Noise must be declared, and the examples be apart."""
        _refuse_company(observation, "MAP")
        if observation.knowledge is None or observation.knowledge.variance is None:
            raise InputError(
                "MAP weighs the message by its declared noise and there is none: give `Observation(knowledge=...)` "
                "with a `variance`, as `sent.knowledge` of a defense that adds noise, or use a plain matching attack."
            )
        if observation.knowledge.scale is None:
            raise InputError("MAP needs the factor of the gradient, and `knowledge.scale=None` says it is unknown.")

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """Damped Gauss-Newton from each start; the highest posterior density is kept."""
        problem = Posterior(observation.in_dtype(torch.float64), self.prior, self.starts)
        z, value, iterations = self._search(problem, problem.starts(generator))
        best = int(value.nan_to_num(nan=float("inf")).argmin())
        expected = float(problem.count + problem.size)
        return Reconstruction(
            attack=self.name,
            inputs=problem.inputs(z)[best].detach(),
            labels=problem.labels_of_one,
            converged=value[best].item() < 2 * expected,
            details={"objective": value[best].item(), "expected": expected, "iterations": iterations, "start": best},
        )

    def _search(self, problem: Posterior, z: Tensor) -> tuple[Tensor, Tensor, int]:
        """The points that the starts end at, their objectives `(T,)`, and how many linearisations it took."""
        residual, value = problem.residual(z)
        damping, growth = torch.zeros_like(value), torch.full_like(value, 2.0)
        count = 0
        while count < self.iterations:
            step_for, curvature = problem.linearised(z, residual)
            damping = 1e-3 * curvature if count == 0 else damping
            count += 1
            before = value
            waiting = torch.isfinite(value)
            for _ in range(8):  # with the same linearisation, until each start has gained
                candidate = z + step_for(damping)
                reached = problem.residual(candidate)[1]
                better = waiting & torch.isfinite(reached) & (reached < value)
                z, value = torch.where(better[:, None], candidate, z), torch.where(better, reached, value)
                waiting = waiting & ~better
                damping = torch.where(better, damping / 3, torch.where(waiting, damping * growth, damping))
                growth = torch.where(better, torch.full_like(growth, 2.0), torch.where(waiting, growth * 2, growth))
                if not bool(waiting.any()):
                    break
            residual = problem.residual(z)[0]
            gained = (before - value).nan_to_num(nan=0.0)
            if bool((gained <= LEAST_GAIN * before).all()):
                break
        return z, value, count


@dataclass(frozen=True, kw_only=True)
class WienerFilter(Attack):
    """A matching attack, and then the declared noise filtered out of what it found: `mu + C (C + K)^{-1} (x - mu)`.

    `K` is the declared covariance of the displacement, or for noise on the gradient `(J N^{-1} J^T)^{-1}` where the
    attack ended.

    Args:
        attack: What finds the input first; it matches to the end.
        prior: As in `MAP`.
        iterations: Of the solver at most.

    Raises:
        InputError: If the number is below 1.
    """

    takes_structures: ClassVar[bool] = True
    takes_missing_gradients: ClassVar[bool] = True

    attack: Attack = field(default_factory=DLG)
    prior: Any = field(default=None)
    iterations: int = 300

    def __post_init__(self) -> None:
        check_whole(1, iterations=self.iterations)
        check_prior(self.prior)
        if not isinstance(self.attack, Attack) or not self.attack.recovers_inputs:
            raise InputError("`attack` must be an attack that finds inputs, such as `DLG()`.")

    @property
    def name(self) -> str:
        """The attack's name and the filter."""
        return f"{self.attack.name}, Wiener filter"

    def check(self, observation: Observation) -> None:
        """Noise must be declared, the examples be apart, and the attack must be able to run."""
        _refuse_company(observation, "The Wiener filter")
        known = observation.knowledge
        if known is None or (known.variance is None and known.displacement is None):
            raise InputError(
                "The Wiener filter takes declared noise out and there is none: give `Observation(knowledge=...)` with "
                "a `variance` or a `displacement`, or use the attack without it."
            )
        self.attack.check_all(observation)

    def run(self, observation: Observation, generator: torch.Generator | None) -> Reconstruction:
        """The attack, and the filter."""
        found = self.attack(observation, generator=generator)
        assert found.inputs is not None
        assert observation.knowledge is not None
        wide = observation.in_dtype(torch.float64)
        labels = found.labels if found.labels is not None else observation.labels
        problem = Posterior(replace(wide, labels=labels), self.prior, 1)
        if getattr(self.prior, "mean", None) is None and found.inputs.ndim > 2:
            # The noise is zero in the mean, so the brightness of each channel is about right as it was found.
            flat = found.inputs.to(problem.mean).flatten(2).mean(-1)
            brightness = flat.reshape(*flat.shape, *[1] * (found.inputs.ndim - 2))
            problem.mean = brightness.expand(found.inputs.shape).reshape(1, -1)
        moved = found.inputs.to(problem.mean)[None].flatten(1) - problem.mean
        displacement = observation.knowledge.displacement
        if displacement is None:
            kept = problem.shrunk(moved)
        else:
            shape = found.inputs.shape

            def total(v: Tensor) -> Tensor:
                own = displacement(v.reshape(shape).to(found.inputs)).to(v).reshape(v.shape)
                return problem.root(problem.root(v)) + own

            solved = conjugate_gradients(total, moved, self.iterations)
            kept = problem.root(problem.root(solved))
        inputs = (problem.mean + kept).reshape(found.inputs.shape)
        return replace(found, inputs=inputs.detach(), details=found.details | {"unfiltered": found.matching_loss})


class Posterior:
    """`T` points of one observation's posterior, in whitened coordinates: `x = mu + C^{1/2} z`, rows `(T, B D)`."""

    def __init__(self, observation: Observation, prior: Any, count: int) -> None:
        self.trials = Trials([observation], restarts=count, adaptive=True)
        self.function = self.trials.function
        self.shape = self.trials.shape
        low, high = observation.value_range or (-1.0, 1.0)
        self.prior = PowerLawPrior(std=0.25 * (high - low)) if prior is None else prior
        like = next(iter(self.trials.sent.values()))
        mean = getattr(self.prior, "mean", None)
        middle = torch.full(self.shape, (low + high) / 2, dtype=like.dtype, device=like.device)
        self.mean = (middle if mean is None else mean.to(like).expand(self.shape)).reshape(1, -1)
        self.labels_of_one: Rest = observation.labels if observation.labels is not None else infer_labels(observation)
        fixed = self.function.cast(self.labels_of_one)
        self.labels = map_rest(lambda t: t[None].expand(count, *t.shape), fixed)
        self.names = list(self.trials.sent)
        self.weights = flatten({n: w[None] for n, w in element_weights(observation, self.trials.sent).items()}, 1)
        self.sent = flatten(self.trials.sent, batch_dims=1)
        self.size, self.count = self.trials.size, int((self.weights > 0).sum())
        self.copies = count

    def starts(self, generator: torch.Generator | None) -> Tensor:
        """The prior's mean, and draws from it."""
        device = generator.device if generator is not None else torch.device("cpu")
        z = torch.randn((self.copies, self.size), generator=generator, dtype=torch.float64, device=device)
        z[0] = 0
        return z.to(self.mean)

    def root(self, rows: Tensor) -> Tensor:
        """`C^{1/2}` on rows `(T, B D)`."""
        return self.prior.sqrt(rows.reshape(-1, *self.shape[1:])).reshape(rows.shape)

    def inputs(self, z: Tensor) -> Tensor:
        """`(T, B, *input_shape)`."""
        return (self.mean + self.root(z)).unflatten(1, self.shape)

    def residual(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The whitened residual `(T, P)`, and the objective `(T,)`."""
        own = flatten(self.trials.own(self.inputs(z), self.labels), batch_dims=1)
        residual = self.weights * (own - self.sent)
        return residual, residual.square().sum(-1) + z.square().sum(-1)

    def linearised(self, z: Tensor, residual: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The step for a damping `(T,)`, from the residual at `z`; and the scale of the curvature, `(T,)`."""
        jacobian = sent_only(InputJacobian.of_trials(self.function, self.inputs(z), self.labels), self.names)
        if self._dense(jacobian):
            gram, moved = self._gram(jacobian, residual)
            slope = moved + z

            def step(damping: Tensor) -> Tensor:
                total = gram + torch.diag_embed((1 + damping)[:, None].expand_as(z))
                return -torch.linalg.solve(total, slope)

            return step, gram.diagonal(dim1=1, dim2=2).mean(-1)
        operator = self._operator(jacobian)
        probe = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)
        probe = probe / probe.norm(dim=-1, keepdim=True)
        size = operator.matvec(probe).square().sum(-1)

        def iterative(damping: Tensor) -> Tensor:
            centre = z / (1 + damping)[:, None]
            found = lsmr(
                operator,
                operator.matvec(centre) - residual,
                damping=(1 + damping).sqrt(),
                max_iterations=200,
                tolerance=1e-6,
            ).solution
            return found - centre

        return iterative, size

    def shrunk(self, moved: Tensor) -> Tensor:
        """`C (C + K)^{-1}` on `x - mu`, `K = (J N^{-1} J^T)^{-1}` at `x`: one row."""
        x = (self.mean + moved).unflatten(1, self.shape)
        jacobian = sent_only(InputJacobian.of_trials(self.function, x, self.labels), self.names)
        image = self.weights * jacobian.transpose_operator().matvec(moved)
        if self._dense(jacobian):
            gram, back = self._gram(jacobian, image)
            eye = torch.eye(self.size, dtype=gram.dtype, device=gram.device)
            return self.root(torch.linalg.solve(gram + eye, back))
        return self.root(
            lsmr(self._operator(jacobian), image, damping=1.0, max_iterations=500, tolerance=1e-8).solution
        )

    def _dense(self, jacobian: InputJacobian) -> bool:
        elements = jacobian.num_problems * jacobian.size * self.sent.shape[1]
        return jacobian.size <= DENSE_SIZE and elements <= DENSE_ELEMENTS

    def _gram(self, jacobian: InputJacobian, image: Tensor) -> tuple[Tensor, Tensor]:
        """`C^{1/2} J N^{-1} J^T C^{1/2}`, and `C^{1/2} J N^{-1/2}` on whitened rows `(T, P)`."""
        rows = jacobian.dense() * self.weights[:, None]
        gram = rows @ rows.mT
        half = self.root(gram.reshape(-1, self.size)).reshape(gram.shape).mT
        whole = self.root(half.reshape(-1, self.size)).reshape(gram.shape)
        return (whole + whole.mT) / 2, self.root((rows @ image[..., None])[..., 0])

    def _operator(self, jacobian: InputJacobian) -> LinearOperator:
        """`N^{-1/2} J^T C^{1/2}`."""
        whole = jacobian.transpose_operator()
        return LinearOperator(
            lambda z: self.weights * whole.matvec(self.root(z)),
            lambda residual: self.root(whole.rmatvec(self.weights * residual)),
            whole.shape,
            whole.like,
        )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-9
) -> Tensor:
    """`A^{-1} b` for a symmetric positive definite `A`, known by its product.

    Args:
        product: `v -> A v`, the shape of `b`.
        b: any shape; one system.
        iterations: at most.
        tolerance: on the residual, relative to `b`.

    Returns:
        The solution, as far as the iterations went.
    """
    x, r = torch.zeros_like(b), b.clone()
    p, square = r.clone(), (r * r).sum()
    goal = tolerance**2 * square
    for _ in range(iterations):
        if not square > goal:
            break
        image = product(p)
        curvature = (p * image).sum()
        if not curvature > 0:
            break
        x, r = x + square / curvature * p, r - square / curvature * image
        before, square = square, (r * r).sum()
        p = r + square / before * p
    return x


def check_prior(prior: Any) -> None:
    """Raises `InputError` for a prior without a square root."""
    if prior is not None and not hasattr(prior, "sqrt"):
        raise InputError(f"`prior` must have a method `sqrt`, as `PowerLawPrior` does; got {type(prior).__name__}.")


def _refuse_company(observation: Observation, name: str) -> None:
    if observation.loss_gradient.has_company:
        raise InputError(
            f"{name} takes examples that model and loss keep apart, and here the other examples of the batch move this "
            "one's gradient. Use a plain matching attack, which takes the others as known."
        )
