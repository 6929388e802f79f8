"""A case through every public call: what comes back is compared with the reference, and nothing may have changed."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradguard
from case_kinds.case import Case, Made, first_private, leaf_of, to_double
from case_reference import Reference
from case_unchanged import changes, snapshot
from gradguard import Guard, InputJacobian, LossGradient
from gradguard.attacks import DLG
from gradguard.attacks._matching.trials import Trials
from gradguard.defenses import GaussianNoise
from gradguard.errors import InputError
from gradguard.evaluation.scoring import observe
from gradguard.functional.structures import stacked
from gradguard.leakage import influence, influence_lower_bound
from gradguard.policy import Policy
from gradguard.threats.model import ThreatModel

RIGHT, REFUSED, WRONG, RAW = "right", "refused by name", "wrong", "raw error"
#: A search that does not have to find anything: what is checked is the function that it descends.
SEARCH = DLG(restarts=1, evaluations=3, polish=0)


@dataclass(frozen=True)
class Outcome:
    """How one call ended. `verdict`: one of the four. `text`: of the refusal or the error, or what is wrong.

    `changed`: what the call did not leave as it was.
    """

    verdict: str
    text: str = ""
    changed: tuple[str, ...] = ()


class Wrong(Exception):
    """An answer that is not the reference's."""


@dataclass
class Run:
    """One case, built once; every step's outcome is kept."""

    case: Case
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made = self.case.build()
        self.generator = torch.Generator().manual_seed(1)

    def outcome(self, step: str) -> Outcome:
        """The outcome of `step`, one of `STEPS`."""
        if step not in self.outcomes:
            self.outcomes[step] = self._try(STEPS[step])
            if self.outcomes[step].changed:
                self.made = self.case.build()
                self.__dict__.pop("double", None)
        return self.outcomes[step]

    def _try(self, step: Callable[[Run], None]) -> Outcome:
        self.changed: list[str] = []
        verdict, text = RIGHT, ""
        try:
            step(self)
            if self.case.refused:
                verdict, text = WRONG, f"answered, where it must be refused by name ({self.case.refused!r})"
        except Wrong as error:
            verdict, text = WRONG, str(error)
        except InputError as error:
            wanted, text = self.case.refused or self.case.may_refuse, str(error)
            named = wanted is not None and re.search(wanted, text) is not None
            verdict = REFUSED if named else WRONG
            text = text if named else f"refused, and should not be so: {text}"
        except Exception as error:
            verdict, text = RAW, f"{type(error).__name__}: {error}"
            if not _is_of_gradguard(error):
                raise
        return Outcome(verdict, text, tuple(self.changed))

    # ------------------------------------------------------------------ what steps use

    @cached_property
    def reference(self) -> Reference:
        """In float64, by plain autograd; of a case that must be refused there is none."""
        if self.case.refused:
            raise Wrong(f"answered, where it must be refused by name ({self.case.refused!r})")
        with torch.inference_mode(False), torch.enable_grad():
            return Reference(self.case)

    @cached_property
    def double(self) -> Made:
        """The case with a model in float64, for what computes in the model's dtype."""
        if self.case.own_dtype:
            return self.made
        made = self.case.build()
        loss_fn = made.loss_fn.double() if isinstance(made.loss_fn, nn.Module) else made.loss_fn
        return Made(made.model.double(), loss_fn, to_double(made.inputs), to_double(made.targets))

    def call(self, function: Callable[[], Any], made: Made | None = None) -> Any:
        """`function` as the user would call it, watched: what it changes is noted even where it raises."""
        made = self.made if made is None else made
        with self.case.around():
            before = snapshot(made)
            try:
                return function()
            finally:
                self.changed += [c for c in changes(before, snapshot(made)) if c not in self.changed]

    def loss_gradient(self, dtype: torch.dtype = torch.float64) -> LossGradient:
        """Of the user's model, computed in float64."""
        make = lambda: LossGradient(self.made.model, self.made.loss_fn, dtype=dtype, **self.case.options)  # noqa: E731
        return self.call(make)

    def jacobian(self, *, per_example: bool = True, **others: Any) -> InputJacobian:
        """At the user's batch."""
        function = self.loss_gradient()
        return self.call(
            lambda: InputJacobian(function, self.made.inputs, self.made.targets, per_example=per_example, **others)
        )

    def randn(self, like: Tensor) -> Tensor:
        """Standard normal numbers in float64."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64)

    def delta(self, length: float | None = None) -> dict[str, Tensor]:
        """A random perturbation of the gradient, or one of this norm."""
        delta = {n: self.randn(p) for n, p in zip(self.reference.names, self.reference.parameters, strict=True)}
        scale = 1.0 if length is None else length / self.reference.flat(delta).norm().item()
        return {n: scale * d for n, d in delta.items()}

    def close(self, what: str, value: Any, expected: Any, tolerance: float | None = None) -> None:
        """Raises `Wrong` unless the two agree, relative to the whole and tensor by tensor."""
        tolerance = self.case.tolerance if tolerance is None else tolerance
        if isinstance(expected, Mapping):
            self._close_dictionaries(what, value, expected, tolerance)
            return
        value, expected = (torch.as_tensor(v).detach().double() for v in (value, expected))
        if value.shape != expected.shape:
            raise Wrong(f"{what}: shape {tuple(value.shape)} for {tuple(expected.shape)}")
        error, scale = (value - expected).norm().item(), expected.norm().item()
        if not error <= tolerance * scale + 1e-14:
            raise Wrong(f"{what}: off by {error / max(scale, 1e-300):.3g} relative to {scale:.4g}")

    def _close_dictionaries(self, what: str, value: Any, expected: Mapping[str, Tensor], tolerance: float) -> None:
        if list(value) != list(expected):
            raise Wrong(f"{what}: names {list(value)[:4]} for {list(expected)[:4]}")
        whole = math.sqrt(sum(e.square().sum().item() for e in expected.values()))
        share = 1e-3 if tolerance <= 1e-6 else 1.0  # float32 within the model rounds relative to the whole
        for name, e in expected.items():
            v = value[name].detach().double()
            if v.shape != e.shape:
                raise Wrong(f"{what}: {name!r} has shape {tuple(v.shape)} for {tuple(e.shape)}")
            error = (v - e).norm().item()
            if not error <= tolerance * (e.norm().item() + share * whole) + 1e-14:
                raise Wrong(f"{what}: {name!r} off by {error:.3g} where it is {e.norm():.3g} (whole: {whole:.3g})")


def _is_of_gradguard(error: BaseException) -> bool:
    """Whether gradguard was asked when it happened; else the case or the reference is at fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(gradguard.__file__).parent in Path(f.filename).parents for f in frames) or isinstance(
        error, TypeError
    )


# ---------------------------------------------------------------------- the steps


def gradient(run: Run) -> None:
    """The batch's gradient."""
    function = run.loss_gradient()
    value = run.call(lambda: function(run.made.inputs, run.made.targets))
    run.close("gradient", value, run.reference.gradient())


def products_by_parameters(run: Run) -> None:
    """`J^T u`, per example and joint."""
    jacobian = run.jacobian()
    u = run.randn(leaf_of(run.made.inputs, first_private(run.made.inputs, run.case.options.get("private"))))
    value = run.call(lambda: jacobian.rmatvec(u))
    run.close("J^T u per example", value, run.reference.rmatvec(u, per_example=True))
    jacobian = run.jacobian(per_example=False)
    value = run.call(lambda: jacobian.rmatvec(u))
    run.close("J^T u joint", value, run.reference.rmatvec(u, per_example=False))


def products_by_inputs(run: Run) -> None:
    """`J delta` and `J J^T u`, per example and joint."""
    for per_example in (True, False):
        jacobian, kind = run.jacobian(per_example=per_example), "per example" if per_example else "joint"
        delta = run.delta()
        value = run.call(lambda jacobian=jacobian, delta=delta: jacobian.matvec(delta))
        run.close(f"J delta {kind}", value, run.reference.matvec(delta))
        u = run.randn(run.reference.inputs)
        value = run.call(lambda jacobian=jacobian, u=u: jacobian.gram(u))
        problems = run.reference.problems(per_example)
        vectors = torch.einsum("rdp,rep,re->rd", problems, problems, u.reshape(len(problems), -1))
        run.close(f"J J^T u {kind}", value, vectors.reshape(u.shape))


def influences(run: Run) -> None:
    """`I(delta)`, damped (well posed whatever `J`), plain where the rank of `J` can be told, and its lower bound."""
    for per_example in (True, False):
        jacobian, kind = run.jacobian(per_example=per_example), "per example" if per_example else "joint"
        delta = run.delta()
        top = torch.linalg.matrix_norm(run.reference.problems(per_example), ord=2).max().item()
        damping = max(1e-4 * top**2, 1e-12)
        found = run.call(lambda j=jacobian, d=delta, e=damping: influence(j, d, damping=e))
        expected = run.reference.influence(delta, per_example=per_example, damping=damping)
        run.close(f"damped influence {kind}", found.value, expected)
        expected = run.reference.influence(delta, per_example=per_example)
        if run.reference.is_clear(per_example):
            found = run.call(lambda j=jacobian, d=delta: influence(j, d))
            run.close(f"influence {kind}", found.value, expected)
        bound = run.call(
            lambda j=jacobian, d=delta: influence_lower_bound(j, d, generator=torch.Generator().manual_seed(0))
        )
        if not bool((bound.value.double() <= expected * (1 + 1e-4) + 1e-12).all()):
            raise Wrong(f"lower bound {kind}: {bound.value.tolist()} above the influence {expected.tolist()}")


def matching(run: Run) -> None:
    """The loss of a matching attack at the truth and elsewhere, its gradient, and a few steps of the attack."""
    jacobian, threat = run.jacobian(per_example=False), ThreatModel(others_known=False, value_range=value_range(run))
    sent = run.reference.gradient()
    group = range(len(run.reference.inputs))
    observation = run.call(lambda: observe(jacobian, sent, sent, list(group), threat=threat))
    targets = observation.labels
    value = run.call(lambda: observation.matching_loss(run.reference.inputs, targets))
    if not value <= max(1e-20, run.case.tolerance**2):
        raise Wrong(f"matching loss at the truth: {value:.3g}")
    point = run.reference.inputs + 0.1 * run.randn(run.reference.inputs)
    value = run.call(lambda: observation.matching_loss(point, targets))
    expected, slope = run.reference.matching(point, sent)
    run.close("matching loss", value, expected)
    value, found = run.call(lambda: objective(observation, point))
    run.close("matching objective", value, expected)
    run.close("gradient of the matching objective", found, slope)
    result = run.call(lambda: SEARCH(observation, generator=torch.Generator().manual_seed(0)))
    expected, _ = run.reference.matching(result.inputs, sent)
    run.close("matching loss of what the attack found", result.matching_loss, expected)


def objective(observation: Any, point: Tensor) -> tuple[float, Tensor]:
    """What a matching attack descends, at one point, and its gradient there."""
    trials = Trials([observation], labels=stacked([observation.labels]))
    value, slope = trials.value_and_gradient(point.reshape(1, -1), torch.zeros(1, dtype=torch.int64))
    return value.item(), slope.reshape(point.shape)


def audit(run: Run) -> None:
    """`Guard.audit` of a noisy gradient: its norm, the predicted errors, and an attack that could run."""
    made, tolerance = run.double, run.case.dtype_tolerance if run.case.own_dtype else run.case.tolerance
    guard = guard_of(run, attacks=(SEARCH,))
    true, sent = (None, None) if run.case.refused else noisy(run)
    report = run.call(
        lambda: guard.audit(*made, sent=sent, generator=torch.Generator().manual_seed(0)),
        made,
    )
    flat = run.reference.flat
    run.close("gradient norm", report.gradient_norm, flat(true).norm(), tolerance)
    difference = {n: sent[n].double() - true[n] for n in true}
    if run.reference.is_clear(True) and not run.case.own_dtype:
        errors = torch.as_tensor(report.predicted_error, dtype=torch.float64)
        expected, seen = run.reference.influence(difference, per_example=True), run.reference.seen
        run.close("predicted error", errors[seen], expected[seen], tolerance)
        unseen = errors[~seen]
        if not bool(((unseen == 0) | (unseen == float("inf"))).all()):
            raise Wrong(f"predicted error of examples that the gradient does not show: {unseen.tolist()}")
    found = [s.failure for scores in report.attacks.values() for s in scores.values() if s.failure]
    # Attacks on declared noise are run beside the others; in a batch that is coupled they say that they cannot.
    failures = [failure for failure in found if "keep apart" not in failure]
    if failures:
        raise InputError(failures[0])


def protect(run: Run) -> None:
    """`Guard.protect`: every tensor is perturbed, and the verdict's number is that of what is sent."""
    made = run.double
    guard = guard_of(run, attacks=())
    sent, verdict = run.call(lambda: guard.protect(*made, generator=torch.Generator().manual_seed(0)), made)
    true = run.reference.gradient()
    if sent is None:
        if bool(run.reference.seen.all()):
            raise Wrong(f"blocked: {verdict.reasons}")
        return
    if list(sent) != run.reference.names:
        raise Wrong(f"sent names {list(sent)[:4]} for {run.reference.names[:4]}")
    bare = [n for n in true if torch.equal(sent[n].double(), true[n]) and true[n].numel()]
    if bare:
        raise Wrong(f"sent as they are: {bare}")
    if run.reference.is_clear(True) and not run.case.own_dtype:
        low, high = guard.threat.value_range
        difference = {n: sent[n].double() - true[n] for n in true}
        errors = run.reference.influence(difference, per_example=True)
        errors = errors / (run.reference.inputs[0].numel() ** 0.5 * (high - low))
        value, seen = verdict.measures["predicted_error"], run.reference.seen
        # An example that the gradient does not show at all: no error to speak of, or any.
        if not (value == 0 and not bool(seen.all())):
            run.close("predicted error of the verdict", value, errors[seen].min())


def guard_of(run: Run, **options: Any) -> Guard:
    """A guard with isotropic noise and a policy that any noise meets."""
    return Guard(
        defense=GaussianNoise(noise_ratio=0.5),
        policy=Policy(minimum_predicted_error=1e-9, maximum_attacked_psnr=None),
        threat=ThreatModel(max_attacked=1, value_range=value_range(run)),
        **run.case.options,
        **options,
    )


def noisy(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The true gradient, and one with noise, in the model's dtype."""
    true = run.reference.gradient()
    noise = run.delta(0.5 * max(run.reference.flat(true).norm().item(), 1e-3))
    parameters = dict(run.double.model.named_parameters())
    return true, {n: (true[n] + noise[n]).to(parameters[n].dtype) for n in true}


def value_range(run: Run) -> tuple[float, float]:
    """[0, 1], or what holds the batch (embeddings)."""
    key = first_private(run.made.inputs, run.case.options.get("private"))
    leaf = leaf_of(run.made.inputs, key).double()
    return min(0.0, math.floor(leaf.min().item())), max(1.0, math.ceil(leaf.max().item()))


#: Every public call, by the name of what comes back.
STEPS: dict[str, Callable[[Run], None]] = {
    "gradient": gradient,
    "J^T u": products_by_parameters,
    "J delta": products_by_inputs,
    "influence": influences,
    "matching": matching,
    "audit": audit,
    "protect": protect,
}
