"""gradguard in a Lightning training loop: one callback."""

from __future__ import annotations

import secrets
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguard.defenses import NoiseStream, noise_key
from gradguard.defenses.stream import SEEDED
from gradguard.errors import InputError, SeededNoiseWarning
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient, random_state
from gradguard.functional.preserved import RandomState, random_state_kept
from gradguard.functional.structures import Rest
from gradguard.functional.vectors import Gradient, add, norm
from gradguard.functional.whole_batch import inputs_and_targets, replaying, take
from gradguard.guard import Guard, Measures
from gradguard.integrations.training_step import Batch, SentOnce, StepWatch, Window
from gradguard.leakage import rank_check
from gradguard.report import LeakageReport
from gradguard.report.leakage_report import Case

Unpack = Callable[[Any], tuple[Any, Any]]

#: How far a step's gradient may be from the one computed with its random numbers: float32 with other kernels, AMP.
AS_SENT, AS_SENT_MIXED = 1e-2, 5e-2


ONE_BATCH = (
    'With `train_mode="as sent"` the gradient of a step is measured with the random numbers and the statistics of one '
    'forward pass, and this step accumulates several. Leave accumulation out, or measure with `train_mode="eval"`.'
)


class GradGuard(Callback):
    """Measure, perturb and attack the gradients of a training loop.

    Every optimiser step: the gradient is perturbed by the guard's defense, after backward, accumulation and AMP's
    unscaling, before gradient clipping (it warns if the trainer clips: clipping rescales signal and noise together).
    Each gradient is perturbed once: several optimisers after one backward share one noise, each taking its parameters'
    part. Under manual optimisation the steps of raw PyTorch optimisers are perturbed too; a training in which no step
    was ends with an `InputError`, any other with an account of what was perturbed (`account`).
    Every `every_n_steps`: the closed-form measures of up to `max_examples` examples go to the logger through
    `pl_module.log`. Every `verify_every_n_steps`: the guard's attacks run, on the module's device, against the gradient
    that this step really sends.

    The noise is secret (see `gradguard.defenses.NoiseStream`): its key comes from the operating system and is no part
    of the checkpoint, which holds cadence and counters. A training that is resumed begins a new stream, and says so,
    unless it is given its `key` again: then the noise goes on where the checkpoint stopped.

    `guard`: what to do. `loss_fn`: `(outputs, targets) -> scalar`; default: the module's `loss_fn` or `criterion`.
    `model`: the attribute of the module that maps inputs to outputs; default: the module itself, by its `forward`.
    `unpack`: `batch -> (inputs, targets)`, tensors or structures of them; default: the batch is such a pair, or a
    mapping with `labels` beside the model's inputs. The model is called with inputs as `LossGradient` calls it; tokens
    are embedded by the guard's `input_module`, and the guard's `private` names the private leaf.
    `exact`: measure I2F itself and not only its lower bound. `tolerance`, `confidence`: of the lower bound, see
    `gradguard.leakage.influence_lower_bound`; for a bound at every step, `confidence=None` and a tolerance of 0.5 take
    a few products each, started from the step before.
    `rank`: analyse the architecture at the first batch (seconds to a minute, see `gradguard.leakage.rank_check`): warn
    if every layer gives its input away in closed form, and log `rank_index`, the same at every measurement.
    `log_pictures`: send the reconstructions to loggers that take pictures. They are private data: off by default.
    `key`: of the noise: 32 bytes, or a file that holds a key and is made if there is none (`noise_key`). Every training
    draws a public label beside it, so that no two trainings have the same noise. `seed`: reproducible noise instead,
    for tests: it warns, since whoever knows or tries the seed subtracts the noise. It also seeds the attacks' starts.

    With `Guard(train_mode="as sent")` the gradient that is measured is the step's own: BatchNorm with the batch's
    statistics, dropout with the step's masks, whose random state is taken when the model's forward pass begins. Every
    measurement checks it against the step's gradient and raises an `InputError` where they differ; one step then has
    one batch (no accumulation).
    The gradient is measured as `loss_fn(model(inputs), targets)`; if the step's own gradient is another (other loss
    terms, augmentation inside `training_step`), it warns.
    Logged, each with the prefix `gradguard/`: `noise_ratio`; `influence_lower_bound` (the lowest of the examples, in
    input units), `influence_lower_bound_mean`, `lambda_max` (the highest) and, with `exact`, `predicted_error`. When
    verifying: `attacked_psnr` (dB, the best attack on the worst example), `psnr/<attack>` and `label_recovery`.
    Lightning repeats a logged value in every row it writes until the next one: make `every_n_steps` a multiple of the
    trainer's `log_every_n_steps`, best the same.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        loss_fn: LossFunction | None = None,
        model: str | None = None,
        unpack: Unpack | None = None,
        every_n_steps: int = 50,
        verify_every_n_steps: int | None = None,
        max_examples: int = 4,
        exact: bool = False,
        tolerance: float = 0.1,
        confidence: float | None = 0.999,
        rank: bool = False,
        log_pictures: bool = False,
        seed: int | None = None,
        key: bytes | str | Path | None = None,
    ) -> None:
        super().__init__()
        cadences = {
            "every_n_steps": every_n_steps,
            "verify_every_n_steps": verify_every_n_steps,
            "max_examples": max_examples,
        }
        for name, value in cadences.items():
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1, got {value}.")
        if seed is not None and key is not None:
            raise InputError("Give `key`, for noise that is secret, or `seed`, for noise that is not; not both.")
        self.guard = guard
        self.loss_fn = loss_fn
        self.model = model
        self.unpack = unpack or _pair
        self.every_n_steps = every_n_steps
        self.verify_every_n_steps = verify_every_n_steps
        self.max_examples = max_examples
        self.exact = exact
        self.tolerance = tolerance
        self.confidence = confidence
        self.rank = rank
        self.log_pictures = log_pictures
        self.seed = seed
        self.steps = 0
        self.tensors = 0
        self.last_report: LeakageReport | None = None
        self._key = noise_key(key) if isinstance(key, str | Path) else key
        self._run = secrets.token_bytes(16)
        self._stream = NoiseStream(self._key, run=self._run)
        self._seeded: torch.Generator | None = None
        if seed is not None:
            warnings.warn(SEEDED[0].upper() + SEEDED[1:], SeededNoiseWarning, stacklevel=2)
            self._seeded = torch.Generator().manual_seed(seed)
        self._window = Window()
        self._sent_once = SentOnce()
        self._waiting: dict[nn.Parameter, tuple[Any, Tensor]] = {}
        self._watch: StepWatch | None = None
        self._forward: Any = None
        self._listening = False
        self._left_over: dict[nn.Parameter, weakref.ref[Tensor]] = {}
        self._seen = 0
        self._first_step = 0
        self._says_backward = False
        self._checked = False
        self._compared = 0
        self._vectors: Tensor | None = None
        self._rank_index: float | None = None

    # ------------------------------------------------------------------ Lightning's moments

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse or warn about what cannot be done right, before training starts."""
        if stage != "fit":
            return
        self._function(pl_module)
        if self.guard.train_mode == "as sent" and trainer.accumulate_grad_batches > 1:
            raise InputError(ONE_BATCH)
        if trainer.world_size > 1:
            raise InputError(
                f"The GradGuard callback works in one process, this trainer has {trainer.world_size}: once ranks have "
                "averaged their gradients it is too late to hide one rank's. Perturb before the exchange, with "
                "`Guard.perturb` in a DDP communication hook."
            )
        if trainer.gradient_clip_val:
            warnings.warn(
                f"The trainer clips gradients at {trainer.gradient_clip_val} after gradguard has perturbed them: where "
                "it does, signal and noise are rescaled together. The ratio between them stays, the step gets shorter.",
                stacklevel=2,
            )
        for name, cadence in (
            ("every_n_steps", self.every_n_steps),
            ("verify_every_n_steps", self.verify_every_n_steps),
        ):
            if cadence and cadence % trainer.log_every_n_steps:
                warnings.warn(
                    f"`{name}={cadence}` is no multiple of the trainer's "
                    f"`log_every_n_steps={trainer.log_every_n_steps}`: the loggers miss steps "
                    "that fall between. Make one a multiple of the other.",
                    stacklevel=2,
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the steps of raw optimisers are watched too."""
        self._remove_watch()
        self._seen, self._first_step = 0, self.steps
        self._watch = StepWatch(pl_module.parameters, lambda optimizer: self._perturb(trainer, pl_module, optimizer))
        if self.guard.train_mode == "as sent":
            model = self._function(pl_module).model
            self._forward = model.register_forward_pre_hook(self._forward_begins)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the next gradient is computed from."""
        inputs, targets = self.unpack(batch)
        if not self._checked:
            # The first batch only: later ones are looked at where they are measured, without a sync at every step.
            self._check_first(pl_module, inputs, targets)
            self._checked = True
        if self._window.stepped:
            left = [p for p in pl_module.parameters() if self._sent_once.is_new(p) and bool(p.grad.any())]
            self._left_over = {p: weakref.ref(p.grad) for p in left if p.grad is not None}
        as_sent = self.guard.train_mode == "as sent"
        self._window.start(inputs, targets, random_state() if as_sent else None)
        self._listening = True
        if self._watch is not None:
            self._watch.forget()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What has been zeroed in place since the batch began is no gradient of earlier batches."""
        kept = {p: g for p, g in self._left_over.items() if p.grad is not None and p.grad is g()}
        self._left_over = {p: g for p, g in kept.items() if p.grad is not None and bool(p.grad.any())}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The batch is part of the gradient; one whose `training_step` returns `None` never comes here."""
        self._says_backward = True
        self._window.add_current()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, perturb, verify. Gradients are accumulated and unscaled here, and not yet clipped."""
        self._perturb(trainer, pl_module, optimizer)
        if self._watch is not None:
            self._watch.handled(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and say early if nothing is perturbed."""
        if not pl_module.automatic_optimization and not self._says_backward:
            self._window.add_current()  # `loss.backward()` of one's own: whether it ran cannot be seen
        if self._window.current is not None:
            return  # skipped
        self._seen += 1
        if self._seen == 10 * trainer.accumulate_grad_batches and self.steps == self._first_step:
            warnings.warn(f"gradguard has seen no optimiser step in {self._seen} batches.", stacklevel=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Account for what was perturbed. Raises `InputError` if nothing was."""
        self._remove_watch()
        if self._seen and self.steps == self._first_step:
            raise InputError(
                f"0 of {self._seen} steps were perturbed: gradguard has seen no step of an optimiser that holds "
                f"gradients of {type(pl_module).__name__}. Step with `self.optimizers()` or another "
                "`torch.optim.Optimizer`; where parameters are updated by hand, call `Guard.perturb` on the gradient."
            )
        rank_zero_info(self.account)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind."""
        self._remove_watch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._remove_watch()

    @property
    def account(self) -> str:
        """What has been perturbed so far, in a sentence."""
        count = f"{self.steps} gradients in {self.tensors} tensors"
        if self.guard.defense is None:
            return f"gradguard: {count} measured; there is no defense to perturb them."
        kind = "seeded" if self.seed is not None else "secret"
        return f"gradguard: {count}, {self.guard.defense.name}, {kind} noise."

    def state_dict(self) -> dict[str, Any]:
        """Cadence and counters, for the checkpoint, and the noise stream's public name: nothing to draw noise from."""
        state = {
            "steps": self.steps,
            "tensors": self.tensors,
            "round": self._stream.round,
            "run": self._run.hex(),
            "stream": self._stream.fingerprint,
        }
        # A seed's noise is no secret; a stream's key never goes into a checkpoint.
        return state if self._seeded is None else state | {"seeded": self._seeded.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped; warns where that is a new stream of noise."""
        self.steps = state_dict["steps"]
        self.tensors = state_dict.get("tensors", 0)
        if self._seeded is not None and "seeded" in state_dict:
            self._seeded.set_state(state_dict["seeded"].cpu())
            return
        name, run = state_dict.get("stream"), bytes.fromhex(state_dict.get("run", ""))
        if self._stream.fingerprint == name:
            return  # this very callback: its counter stands where it must
        if self._key is not None and NoiseStream(self._key, run=run).fingerprint == name:
            self._run, self._stream = run, NoiseStream(self._key, run=run, start=state_dict["round"])
            return
        held = "is of another key" if self._key is not None else "holds no key of the noise"
        warnings.warn(
            f"The checkpoint {held}: a new stream of noise begins. To go on with the stream of a training, give "
            "`GradGuard` the same `key` in both.",
            stacklevel=1,  # the caller is Lightning, whose warnings people turn off
        )

    # ------------------------------------------------------------------ inside

    def _perturb(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Perturb the gradients of the optimiser's parameters that have not been perturbed since their backward."""
        own = [p for group in optimizer.param_groups for p in group["params"] if self._sent_once.is_new(p)]
        self._window.stepped = True
        if not own or (not self._window.batches and not any(p.grad.any() for p in own)):
            return  # no backward since the last step: a skipped batch
        if not self._window.batches or not self._says_backward:
            self._window.add_current()  # `loss.backward()` of one's own, which no hook tells of
        self._refuse_scaled(trainer, optimizer)
        self._refuse_older(own)
        if not all(p in self._waiting and self._waiting[p][0] == SentOnce.state(p) for p in own):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None and not all(torch.isfinite(p.grad).all() for p in own):
                return  # AMP's scale was too high: the scaler skips this step, and nothing is sent.
            self._draw(trainer, pl_module, own)
        with torch.no_grad():
            for parameter in own:
                parameter.grad.copy_(self._waiting.pop(parameter)[1])
        self._sent_once.leave(own)
        self.tensors += len(own)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, own: list[nn.Parameter]) -> None:
        """One message: what to send for every gradient of this backward, other optimisers' ones too."""
        function = self._function(pl_module)
        inside = {n: p for n, p in function.model.named_parameters() if p.requires_grad}
        names = {p: f"outside.{n}" for n, p in pl_module.named_parameters()} | {p: n for n, p in inside.items()}
        names |= {p: f"outside.{i}" for i, p in enumerate(own) if p not in names}
        dtype = function.computing_dtype
        bare = {p: p.grad.to(dtype) for p in names if p.grad is not None and self._sent_once.is_new(p)}
        whole = function.with_loss(self._window.loss(function.loss_fn))
        jacobian = None
        if self.guard.defense is not None and self.guard.defense.needs_jacobian:
            bound, private, rest = self._taken(whole, Batch(*self._window.joined(), self._state()))
            if function.train_mode == "as sent":
                self._check_as_sent(trainer, bound, bound(private, rest), {n: p.grad for n, p in inside.items()})
            jacobian = InputJacobian(bound, private, rest, validate=False)
        self.steps += 1
        sent = self._sent({names[p]: g for p, g in bare.items()}, jacobian)
        self._waiting = {p: (SentOnce.state(p), sent[names[p]]) for p in bare}
        # Where a parameter has no new gradient nothing is sent, and nothing hidden.
        gradient = {n: bare[p] if p in bare else torch.zeros_like(p, dtype=dtype) for n, p in inside.items()}
        sent = gradient | {n: g for n, g in sent.items() if n in gradient}
        if self.steps % self.every_n_steps == 0:
            self._measure(trainer, pl_module, function, gradient, sent)
        if self.verify_every_n_steps and self.steps % self.verify_every_n_steps == 0:
            # Lightning divides each batch's loss by their full number; `whole` is the mean over those that are there.
            missing = self._divisor(trainer, pl_module) / len(self._window.batches)
            delta = {n: missing * d for n, d in add(sent, gradient, -1.0).items()}
            self._verify(trainer, pl_module, whole, Batch(*self._window.joined(), self._state()), delta)

    def _sent(self, gradient: Gradient, jacobian: InputJacobian | None) -> Gradient:
        """The gradient as the defense sends it, with the noise of the next round."""
        if self._seeded is None:
            device = next(iter(gradient.values())).device
            return self.guard.perturb(jacobian, gradient, generator=self._stream.message(device=device))
        if self.guard.defense is None:
            return gradient
        # The constructor has warned of the seed.
        return add(gradient, self.guard.defense.checked_perturbation(gradient, jacobian, generator=self._seeded))

    def _divisor(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """By how much each batch's loss is divided before the gradients are added up."""
        return trainer.accumulate_grad_batches if pl_module.automatic_optimization else len(self._window.batches)

    def _starts(self) -> torch.Generator:
        """The random starts of this step's attacks and solvers, which are no secret."""
        return torch.Generator().manual_seed(self.steps) if self._seeded is None else self._seeded

    def _remove_watch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    def _forward_begins(self, module: nn.Module, arguments: Any) -> None:
        """The training's forward pass, not gradguard's own: its random numbers start here."""
        if module.training and torch.is_grad_enabled() and (self._listening or self._window.stepped):
            self._window.forward_begins(random_state())
            self._listening = False

    def _check_first(self, pl_module: LightningModule, inputs: Any, targets: Any) -> None:
        """Say of the first batch what is wrong with it, with the model or with how they are read."""
        function = self._function(pl_module)
        function.check_model()
        bound, private, rest = take(function, inputs, targets)
        self.guard.threat.check_inputs(private)
        if bound.is_bound or bound.input_module is not None:
            bound.check_batch(private, rest)
        if self.rank:
            if bound.is_bound or bound.input_module is not None:
                raise InputError(
                    "`rank=True` analyses models of one tensor, and this batch is a structure or holds tokens. Leave "
                    "`rank` out."
                )
            check = rank_check(function.model, private.shape[1:])
            self._rank_index = check.analysis.index
            if not check.fine:
                warnings.warn(f"Rank analysis of the architecture: {'; '.join(check.reasons)}.", stacklevel=2)

    def _refuse_older(self, own: list[nn.Parameter]) -> None:
        """Gradients that hold batches of before another optimiser's step are of no one window."""
        older = [p for p in own if p in self._left_over and p.grad is self._left_over[p]()]
        if older:
            raise InputError(
                f"{len(older)} gradients of this step hold batches from before the last step of another optimiser: "
                "the optimisers step at different cadences, and gradguard measures one window of batches for all. "
                "Step them at the same batches, or set the gradients of one to zero before the other's backward."
            )

    def _function(self, pl_module: LightningModule) -> LossGradient:
        """The module's model and loss as gradguard's pure gradient."""
        model = pl_module if self.model is None else getattr(pl_module, self.model, None)
        if not isinstance(model, nn.Module):
            raise InputError(f"`model={self.model!r}` names no submodule of {type(pl_module).__name__}.")
        loss_fn = self.loss_fn or getattr(pl_module, "loss_fn", None) or getattr(pl_module, "criterion", None)
        if not callable(loss_fn):
            raise InputError(
                f"{type(pl_module).__name__} has no `loss_fn` or `criterion`: pass the loss that its `training_step` "
                "takes, `GradGuard(guard, loss_fn=...)`."
            )
        return self.guard.loss_gradient(model, loss_fn)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, function: LossGradient, gradient: Gradient, sent: Gradient
    ) -> None:
        """Log the closed-form measures of the step's gradient."""
        divisor = self._divisor(trainer, pl_module)
        taken = [self._taken(function, batch) for batch in self._window.batches]
        if self._compared < 3 or function.train_mode == "as sent":
            # A whole gradient more: what a `training_step` adds to the loss shows in the first measurements.
            own = [bound(private, rest) for bound, private, rest in taken]
            mean = {n: sum((g[n] for g in own), torch.zeros_like(own[0][n])) / divisor for n in own[0]}
            if function.train_mode == "as sent":
                self._state()
                self._check_as_sent(trainer, function, mean, gradient)
            else:
                self._warn_of_another_gradient(*(_without_lookup(function, which) for which in (mean, gradient)))
            self._compared += 1
        # A batch's part of the gradient is the batch's own divided by `divisor`: multiplied by it, the batch's own
        # derivative fits, whatever the sizes of the others.
        gradient, sent = ({n: divisor * g for n, g in which.items()} for which in (gradient, sent))
        measured, left = [], self.max_examples
        for bound, private, rest in taken:
            if left > 0:
                examples = range(min(left, len(private)))
                jacobian = InputJacobian(bound, private, rest, examples=examples, validate=False)
                measured.append(self._measures(jacobian, gradient, sent, self.max_examples - left))
                left -= len(examples)
        vectors = [m.vectors for m in measured]
        alike = len({v.shape[1] for v in vectors}) == 1
        # Not joined where there is one: the next step starts from the very tensor. None for texts of several lengths.
        self._vectors = vectors[0] if len(vectors) == 1 else torch.cat(vectors) if alike else None
        lower_bound = torch.cat([m.lower_bound for m in measured])
        values = {
            "noise_ratio": measured[0].noise_ratio,
            "influence_lower_bound": lower_bound.min(),
            "influence_lower_bound_mean": lower_bound.mean(),
            "lambda_max": torch.cat([m.lambda_max for m in measured]).max() / divisor**2,
        }
        if self.exact:
            values["predicted_error"] = torch.cat([m.predicted_error for m in measured]).min()
        if self._rank_index is not None:
            values["rank_index"] = torch.tensor(self._rank_index)
        _log(pl_module, values)

    def _measures(self, jacobian: InputJacobian, gradient: Gradient, sent: Gradient, first: int) -> Measures:
        """The measures of some examples, `first` the place of their eigenvectors in those of the last step."""
        start, shape = self._vectors, (len(jacobian.inputs), jacobian.size)
        if start is not None and start.shape != shape:
            start = start[first : first + shape[0]]
        return self.guard.measure(
            jacobian,
            gradient,
            sent,
            exact=self.exact,
            tolerance=self.tolerance,
            confidence=self.confidence,
            start=start if start is not None and start.shape == shape else None,
            generator=self._starts(),
        )

    def _verify(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        function: LossGradient,
        batch: Batch,
        delta: Gradient,
    ) -> None:
        """Attack the step's gradient, without and with the defense, and log what came of it."""
        defended = self.guard.defense is not None
        # The defense's own noise on the gradient that is measured: where the step's is another (train-mode layers,
        # further loss terms), the difference between the two hides nothing and must not count as noise.
        bound, private, rest = self._taken(function, batch)
        sent = add(bound(private, rest), delta)
        with random_state_kept():
            if batch.random_state is not None:
                batch.random_state.restore()
            report = self.guard.audit(
                function.model,
                function.loss_fn,
                batch.inputs,
                batch.targets,
                sent=sent if defended else None,
                generator=self._starts(),
            )
        self.last_report = report
        case: Case = "with" if defended else "without"
        values = {
            f"psnr/{n}": psnr for n, score in report.scores(case).items() if (psnr := score.best_psnr) is not None
        }
        best = report.best_psnr(case)
        if best is not None:
            values["attacked_psnr"] = best
        if case in report.label_recovery:
            values["label_recovery"] = report.label_recovery[case].i_rec
        _log(pl_module, values)
        if self.log_pictures:
            _log_pictures(trainer, report, case, self.steps)

    def _taken(self, function: LossGradient, batch: Batch) -> tuple[LossGradient, Tensor, Rest]:
        """A batch of the step, and the function that takes it as the step's forward pass did."""
        return take(replaying(function, batch.random_state), batch.inputs, batch.targets)

    def _state(self) -> RandomState | None:
        """The random state of the step's one forward pass, where it is asked for."""
        if self.guard.train_mode != "as sent":
            return None
        if len(self._window.batches) != 1:
            raise InputError(ONE_BATCH)
        return self._window.batches[0].random_state

    def _check_as_sent(
        self, trainer: Trainer, function: LossGradient, own: Gradient, gradient: Mapping[str, Tensor | None]
    ) -> None:
        """Raises `InputError` unless the gradient that is measured is the one that the step has computed."""
        own = _without_lookup(function, own)
        given = {n: torch.zeros_like(g) if (its := gradient[n]) is None else its.to(g) for n, g in own.items()}
        distance = (norm(add(given, own, -1.0)) / norm(given).clamp_min(1e-30)).item()
        precise = str(trainer.precision).startswith(("32", "64"))
        if distance <= (AS_SENT if precise else AS_SENT_MIXED):
            return
        apart = {n: (norm({n: given[n] - own[n]}) / norm(given).clamp_min(1e-30)).item() for n in own}
        worst = max(apart, key=apart.__getitem__)
        raise InputError(
            f"The step's gradient differs by {distance:.1%} from the one computed with its random numbers (most at "
            f'{worst!r}), so `train_mode="as sent"` would measure another function than the one that is trained. The '
            "reason may be another `loss_fn`, further loss terms, a forward pass before the one that counts, or random "
            "numbers that another precision draws differently. Name the right `loss_fn`, `model` and `unpack`, or "
            'measure with `train_mode="eval"`.'
        )

    def _warn_of_another_gradient(self, own: Gradient, gradient: Gradient) -> None:
        """Say so if the step's gradient is not that of `loss_fn(model(inputs), targets)`."""
        difference = (norm(add(gradient, own, -1.0)) / norm(own)).item()
        if difference > 0.05:  # AMP's rounding stays below
            warnings.warn(
                f"The step's gradient differs by {difference:.0%} from that of `loss_fn(model(inputs), targets)`, "
                "so gradguard measures another function than the one that is trained. Pass the right `loss_fn`, "
                "`model` and `unpack` (further loss terms, augmentation or train-mode layers also do this).",
                stacklevel=2,
            )

    def _refuse_scaled(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """A fused optimiser unscales AMP's gradients itself, after this hook: the noise would meet scaled gradients."""
        plugin = trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise InputError(
                f"{type(optimizer).__name__} unscales AMP gradients inside its step (fused), so gradguard would "
                "perturb scaled ones. Use the optimiser without `fused=True`, or `precision='bf16-mixed'`."
            )


def _pair(batch: Any) -> tuple[Any, Any]:
    """The default `unpack`."""
    try:
        inputs, targets = inputs_and_targets(batch)
    except InputError as error:
        raise InputError(f"The batch is {error}: pass `unpack=lambda batch: (inputs, targets)`.") from error
    for part in (inputs, targets):
        if not isinstance(part, Tensor | Mapping | tuple | list):
            raise InputError(
                f"The batch holds a {type(part).__name__}, no tensor or structure of tensors: pass `unpack=lambda "
                "batch: (inputs, targets)`."
            )
    return inputs, targets


def _without_lookup(function: LossGradient, gradient: Gradient) -> Gradient:
    """Without the parameters of the module that looks tokens up: what is measured bypasses the lookup."""
    if function.input_module is None:
        return gradient
    own = {id(p) for p in function.model.get_submodule(function.input_module).parameters()}
    return {n: gradient[n] for n, p in function.model.named_parameters() if n in gradient and id(p) not in own}


def _log(pl_module: LightningModule, values: dict[str, Any]) -> None:
    for name, value in values.items():
        pl_module.log(f"gradguard/{name}", value, on_step=True, on_epoch=False)


def _log_pictures(trainer: Trainer, report: LeakageReport, case: Case, step: int) -> None:
    """Reconstructions to every logger that takes pictures (TensorBoard's `add_images`, others' `log_image`)."""
    for logger in trainer.loggers:
        for attack, cases in report.attacks.items():
            score = cases.get(case)
            if score is None or score.pictures is None or score.pictures.ndim != 4:
                continue
            pictures = score.pictures.clamp(0, 1)
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_images"):
                experiment.add_images(f"gradguard/{attack}", pictures, step)
            elif hasattr(logger, "log_image"):
                logger.log_image(key=f"gradguard/{attack}", images=list(pictures), step=step)
