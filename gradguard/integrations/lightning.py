"""gradguard in a Lightning training loop: one callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguard.errors import InputError
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossFunction, LossGradient
from gradguard.functional.vectors import Gradient, add, norm
from gradguard.guard import Guard
from gradguard.leakage import rank_check
from gradguard.report import LeakageReport
from gradguard.report.leakage_report import Case

Unpack = Callable[[Any], tuple[Tensor, Tensor]]


class GradGuard(Callback):
    """Measure, perturb and attack the gradients of a training loop.

    Every optimiser step: the gradient is perturbed by the guard's defense, after backward, accumulation and AMP's
    unscaling, before gradient clipping (it warns if the trainer clips: clipping rescales signal and noise together).
    Every `every_n_steps`: the closed-form measures of up to `max_examples` examples go to the logger through
    `pl_module.log`. Every `verify_every_n_steps`: the guard's attacks run, on the module's device, against the gradient
    that this step really sends. Cadence, randomness and counters are part of the checkpoint.

    `guard`: what to do. `loss_fn`: `(outputs, targets) -> scalar`; default: the module's `loss_fn` or `criterion`.
    `model`: the attribute of the module that maps inputs to outputs; default: the module itself, by its `forward`.
    `unpack`: `batch -> (inputs, targets)`; default: the batch is such a pair.
    `exact`: measure I2F itself and not only its lower bound. `tolerance`, `confidence`: of the lower bound, see
    `gradguard.leakage.influence_lower_bound`; for a bound at every step, `confidence=None` and a tolerance of 0.5 take
    a few products each, started from the step before.
    `rank`: analyse the architecture at the first batch (seconds to a minute, see `gradguard.leakage.rank_check`): warn
    if every layer gives its input away in closed form, and log `rank_index`, the same at every measurement.
    `log_pictures`: send the reconstructions to loggers that take pictures. They are private data: off by default.
    `seed`: of the noise and of the attacks' starts.

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
        seed: int = 0,
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
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.last_report: LeakageReport | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._stepped = False
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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the next gradient is computed from."""
        if not self._checked:
            self._function(pl_module).check_model()
            # The first batch only: later ones are looked at where they are measured, without a sync at every step.
            self.guard.threat.check_inputs(self.unpack(batch)[0])
            self._checked = True
        if self._stepped:
            # Kept until here, and not dropped after the step: LBFGS asks for several gradients of one batch.
            self._batches.clear()
            self._stepped = False
        inputs, targets = self.unpack(batch)
        if self.rank and self._rank_index is None:
            check = rank_check(self._function(pl_module).model, inputs.shape[1:])
            self._rank_index = check.analysis.index
            if not check.fine:
                warnings.warn(f"Rank analysis of the architecture: {'; '.join(check.reasons)}.", stacklevel=2)
        self._batches.append((inputs.detach(), targets.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, perturb, verify. Gradients are accumulated and unscaled here, and not yet clipped."""
        inputs, targets = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        self._stepped = True
        self._refuse_scaled(trainer, optimizer)
        function = self._function(pl_module)
        parameters = dict(function.model.named_parameters())
        gradient = {
            n: p.grad.to(function.computing_dtype)
            if p.grad is not None
            else torch.zeros_like(p, dtype=function.computing_dtype)
            for n, p in parameters.items()
            if p.requires_grad
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not all(torch.isfinite(g).all() for g in gradient.values()):
            return  # AMP's scale was too high: the scaler skips this step, and nothing is sent.
        self.steps += 1
        jacobian = None
        if self.guard.defense is not None and self.guard.defense.needs_jacobian:
            jacobian = InputJacobian(function, inputs, targets, validate=False)
        sent = self.guard.perturb(jacobian, gradient, generator=self.generator)
        if self.steps % self.every_n_steps == 0:
            self._measure(pl_module, function, inputs, targets, gradient, sent)
        if self.verify_every_n_steps and self.steps % self.verify_every_n_steps == 0:
            self._verify(trainer, pl_module, function, inputs, targets, gradient, sent)
        with torch.no_grad():
            for name, value in sent.items():
                held = parameters[name].grad
                if held is not None:
                    held.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Cadence and randomness, for the checkpoint."""
        return {"steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stopped."""
        self.steps = state_dict["steps"]
        self.generator.set_state(state_dict["generator"].cpu())

    # ------------------------------------------------------------------ inside

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
        self,
        pl_module: LightningModule,
        function: LossGradient,
        inputs: Tensor,
        targets: Tensor,
        gradient: Gradient,
        sent: Gradient,
    ) -> None:
        """Log the closed-form measures of the step's gradient."""
        if self._compared < 3:
            # A whole gradient more: what a `training_step` adds to the loss shows in the first measurements.
            self._warn_of_another_gradient(function(inputs, targets), gradient)
            self._compared += 1
        examples = range(min(self.max_examples, len(inputs)))
        jacobian = InputJacobian(function, inputs, targets, examples=examples, validate=False)
        fits = self._vectors is not None and self._vectors.shape == (len(examples), jacobian.size)
        found = self.guard.measure(
            jacobian,
            gradient,
            sent,
            exact=self.exact,
            tolerance=self.tolerance,
            confidence=self.confidence,
            start=self._vectors if fits else None,
            generator=self.generator,
        )
        self._vectors = found.vectors
        values = {
            "noise_ratio": found.noise_ratio,
            "influence_lower_bound": found.lower_bound.min(),
            "influence_lower_bound_mean": found.lower_bound.mean(),
            "lambda_max": found.lambda_max.max(),
        }
        if self.exact:
            values["predicted_error"] = found.predicted_error.min()
        if self._rank_index is not None:
            values["rank_index"] = torch.tensor(self._rank_index)
        _log(pl_module, values)

    def _verify(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        function: LossGradient,
        inputs: Tensor,
        targets: Tensor,
        gradient: Gradient,
        sent: Gradient,
    ) -> None:
        """Attack the step's gradient, without and with the defense, and log what came of it."""
        defended = self.guard.defense is not None
        # The defense's own noise on the gradient that is measured: where the step's is another (train-mode layers,
        # further loss terms), the difference between the two hides nothing and must not count as noise.
        sent = add(function(inputs, targets), add(sent, gradient, -1.0))
        report = self.guard.audit(
            function.model,
            function.loss_fn,
            inputs,
            targets,
            sent=sent if defended else None,
            generator=self.generator,
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


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """The default `unpack`: a batch that is a pair of tensors."""
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise InputError(
        f"The batch is a {type(batch).__name__}, not a pair (inputs, targets): pass "
        "`unpack=lambda batch: (inputs, targets)`."
    )


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
