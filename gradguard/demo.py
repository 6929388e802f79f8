"""The main job on bundled pictures: train with the callback, audit the gradient, show before against after."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradguard.attacks import DLG, ILRG, RGAP, InvertingGradients, Observation
from gradguard.defenses import GaussianNoise, PriorNoise, Pruning, SmallEigenspaceNoise
from gradguard.errors import SeededNoiseWarning
from gradguard.functional.jacobian import InputJacobian
from gradguard.functional.loss_gradient import LossGradient
from gradguard.functional.vectors import Gradient, add
from gradguard.guard import Guard
from gradguard.integrations.lightning import GradGuard
from gradguard.leakage import influence
from gradguard.linalg import one_thread
from gradguard.report import LeakageReport
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import Pictures, digits

#: The influence check: noise is scaled to move gradient matching by these shares of the picture's norm, ...
CHECKED_SHARES = (0.01, 0.04)
#: ... and pruning is taken as it is (scaled up it would be noise of many times the gradient's norm).
PRUNED_FRACTIONS = (0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo's settings: `steps` of training on batches of `batch_size`, noise of `noise_ratio` times the gradient's
    norm, an audit of the gradient of `audited` pictures, attacks on `attacked` of them; `seed`; `device`."""

    steps: int = 100
    batch_size: int = 32
    noise_ratio: float = 0.5
    audited: int = 16
    attacked: int = 4
    seed: int = 0
    device: str = "cpu"

    def run(self, output: str | Path = "gradguard-report") -> LeakageReport:
        """Do it all; the page and its pictures go to the folder `output`."""
        with one_thread():  # an 8x8 picture keeps no second core busy
            return self._run(Path(output))

    def _run(self, output: Path) -> LeakageReport:
        train, test = digits().split(500)
        guard = Guard(
            defense=PriorNoise(noise_ratio=self.noise_ratio),
            attacks=(RGAP(), DLG(restarts=2), InvertingGradients(iterations=600), ILRG()),
            threat=replace(Guard().threat, max_attacked=self.attacked),
        )
        plain = self.train(train, None)
        guarded = self.train(train, guard)
        accuracies = {"without": accuracy(plain, test), "with": accuracy(guarded, test)}
        model = guarded.model
        generator = torch.Generator().manual_seed(self.seed)
        inputs, targets = (part[: self.audited].to(self.device) for part in (train.images, train.labels))
        report = guard.audit(
            model, nn.CrossEntropyLoss(), inputs, targets, class_names=train.class_names, generator=generator
        )
        # On the model of the first round, which every client starts from and which leaks most: on a trained one the
        # gradient of a well-classified picture is small and first order reaches less far (docs/influence.md).
        first = self.module().model.to(self.device)
        checks = influence_check(first, inputs[:2], targets[:2], generator=generator)
        report = replace(
            report,
            model="digits ConvNet",
            extra=report.extra
            | {"accuracy": accuracies, "influence_check": checks, "noise": f"from the seed {self.seed}, not secret"},
        )
        report.save_html(output / "index.html")
        return report

    def module(self) -> DigitsModule:
        """The model that every training starts from."""
        torch.manual_seed(self.seed)
        return DigitsModule()

    def train(self, data: Pictures, guard: Guard | None) -> DigitsModule:
        """A few dozen steps of training, with or without the callback; the same start and the same batches."""
        module = self.module()
        shuffle = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            TensorDataset(data.images, data.labels), self.batch_size, shuffle=True, drop_last=True, generator=shuffle
        )
        with quiet_lightning():
            # Seeded, and said so in the report: a demo shows the same numbers each time, and sends nothing.
            warnings.simplefilter("ignore", SeededNoiseWarning)
            callbacks = [GradGuard(guard, every_n_steps=10, seed=self.seed)] if guard is not None else []
            trainer = Trainer(
                max_steps=self.steps,
                accelerator="cpu" if self.device == "cpu" else "auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=10,
                callbacks=callbacks,
            )
            trainer.fit(module, loader)
        return module.to(self.device)


class DigitsModule(LightningModule):
    """The small ConvNet, trained by plain SGD as a federated client would."""

    def __init__(self) -> None:
        super().__init__()
        self.model = digits_convnet()
        self.loss_fn = nn.CrossEntropyLoss()

    def forward(self, inputs: Tensor) -> Tensor:
        """Class scores `(B, 10)` of pictures `(B, 1, 8, 8)`."""
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        inputs, targets = batch
        return self.loss_fn(self(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def influence_check(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, generator: torch.Generator | None = None
) -> list[dict[str, Any]]:
    """Predicted against observed influence, for each picture alone and eight perturbations of its gradient.

    Predicted: the closed form. Observed: the distance at which DLG really ends (float64, random starts, second-order
    polish). The perturbations are noise of three kinds at two sizes (`CHECKED_SHARES`) and pruning at two levels
    (`PRUNED_FRACTIONS`).
    `in_range`: the prediction is above three times the attack's own error without a perturbation and below 10% of the
    picture's norm, where a first-order prediction can be asked to hold.
    """
    function = LossGradient(model, nn.CrossEntropyLoss(), dtype=torch.float64)
    attack = DLG(restarts=2)
    rows = []
    for index in range(len(inputs)):
        x, y = function.cast(inputs[index : index + 1]), targets[index : index + 1]
        jacobian = InputJacobian(function, x, y)
        true = function(x, y)
        observation = Observation(loss_gradient=function, sent=true, input_shape=tuple(x.shape[1:]), labels=y)
        seed = int(torch.randint(2**31, (), generator=generator))

        def error(seen: Observation, x: Tensor = x, seed: int = seed) -> float:
            found = attack(seen, generator=torch.Generator().manual_seed(seed)).inputs
            assert found is not None
            return torch.linalg.vector_norm(found - x).item()

        undisturbed, length = error(observation), torch.linalg.vector_norm(x).item()
        for name, delta in _perturbations(jacobian, true, length, generator):
            predicted = influence(jacobian, delta).value.item()
            rows.append(
                {
                    "perturbation": name,
                    "example": index,
                    "predicted": predicted,
                    "observed": error(replace(observation, sent=add(true, delta))),
                    "undisturbed_error": undisturbed,
                    "picture_norm": length,
                    "in_range": 3 * undisturbed < predicted < 0.1 * length,
                }
            )
    return rows


def _perturbations(
    jacobian: InputJacobian, true: Gradient, length: float, generator: torch.Generator | None
) -> Iterator[tuple[str, Gradient]]:
    """Noise of three kinds, scaled to two predicted errors each, and pruning at two levels."""
    noises = (GaussianNoise(noise_ratio=1.0), PriorNoise(noise_ratio=1.0), SmallEigenspaceNoise(noise_ratio=1.0))
    for noise in noises:
        delta = noise.checked_perturbation(true, jacobian, generator=generator)
        unit = influence(jacobian, delta).value.item()
        for share in CHECKED_SHARES:
            yield f"{noise.name}, {share:.0%}", {n: d * (share * length / unit) for n, d in delta.items()}
    for fraction in PRUNED_FRACTIONS:
        yield f"Pruning, {fraction:.0%} of elements", Pruning(fraction=fraction).checked_perturbation(true)


def summary(report: LeakageReport) -> dict[str, Any]:
    """The demo's numbers for machines: one flat JSON object, lists in the order of the perturbations checked.

    `influence_predicted`, `influence_observed`: input units; `attacks`: per attack the PSNR (dB) of each attacked
    example without and with the defense; `labels`: LeAcc, LnAcc, IRec; `accuracy`; `verdict`; `report`: the rest.
    """
    whole = report.to_dict()
    checks = whole["extra"]["influence_check"]
    return {
        "influence_predicted": [row["predicted"] for row in checks],
        "influence_observed": [row["observed"] for row in checks],
        "influence_in_range": [row["in_range"] for row in checks],
        "attacks": {n: {case: score["psnr"] for case, score in cases.items()} for n, cases in whole["attacks"].items()},
        "labels": {
            case: {"LeAcc": score["le_acc"], "LnAcc": score["ln_acc"], "IRec": score["i_rec"]}
            for case, score in whole["label_recovery"].items()
        },
        "accuracy": whole["extra"]["accuracy"],
        "verdict": whole["verdict"],
        "report": whole,
    }


def accuracy(module: DigitsModule, data: Pictures) -> float:
    """The share of `data` that is classified rightly."""
    module.eval()
    with torch.no_grad():
        predicted = module(data.images.to(module.device)).argmax(dim=1).cpu()
    return (predicted == data.labels).double().mean().item()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning without its banners and hints, which say nothing about a demo of a minute."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        logger.setLevel(level)
