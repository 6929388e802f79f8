"""Reports as audits of scikit-learn's digits would make them: real pictures, reconstructions made by adding noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from gradguard.leakage.fidelity import fidelity
from gradguard.report import AttackScore, LabelScore, LeakageReport, Verdict
from gradguard.report.leakage_report import Case
from gradguard.zoo.pictures import digits

#: The example, as index into the batch, that attacks get better than the others.
EXPOSED = 2
DEFENSE = "PriorNoise(noise_ratio=0.2, permanent=False)"


def score_of(
    originals: torch.Tensor, noise: float, generator: torch.Generator, seconds: float, clearest: int = 0
) -> AttackScore:
    """An attack that comes back with the originals plus noise, least on the one at the place `clearest`."""
    level = torch.full((len(originals),) + (1,) * (originals.ndim - 1), noise)
    level[clearest] *= 0.4
    scored = fidelity(originals + level * torch.randn(originals.shape, generator=generator), originals)
    return AttackScore(
        psnr=scored.psnr.tolist(),
        ssim=scored.ssim.tolist(),
        mse=scored.mse.tolist(),
        matching_loss=noise**2,
        converged=1.0 if noise < 0.1 else 0.5,
        seconds=seconds,
        pictures=scored.matched.float(),
    )


def influence_check(originals: torch.Tensor) -> list[dict[str, Any]]:
    """Predictions that hold where they are small, and do not where they are large."""
    sizes = {"GaussianNoise": 0.3, "PriorNoise": 0.35, "SmallEigenspaceNoise": 0.4, "Pruning": 0.45}
    return [
        {
            "perturbation": f"{name}, {share}%",
            "example": index,
            "predicted": size * share * (1 + 0.2 * index),
            "observed": size * share * (1 + 0.2 * index) * (0.97 + 0.04 * index if share < 10 else 0.6),
            "undisturbed_error": 1e-4,
            "picture_norm": float(originals[index].norm()),
            "in_range": share < 10,
        }
        for name, size in sizes.items()
        for share in (1, 10)
        for index in range(2)
    ]


def digits_report(examples: int = 6, attacked: int = 6) -> LeakageReport:
    """Every section filled in: two attacks that ran, one that could not, labels, accuracy, the influence check."""
    generator = torch.Generator().manual_seed(0)
    data = digits()
    images, labels = data.images[:examples], data.labels[:examples]
    strength = 0.5 + torch.rand(examples, generator=generator)
    strength[EXPOSED] = 3.0
    ripple = 1 + 0.1 * torch.rand(examples, 64, generator=generator)
    spectrum = (strength[:, None] * torch.exp(-torch.arange(64) / 7.0) * ripple).sort(dim=1, descending=True).values
    errors = 1.6 / strength
    order = errors.argsort()[:attacked].tolist()
    originals = images[order]
    cannot = AttackScore(failure="Tanh cannot be inverted in float32 here; R-GAP needs LeakyReLU.")
    attacks: dict[str, dict[Case, AttackScore]] = {
        "RGAP": {"without": cannot, "with": cannot},
        "DLG": {
            "without": score_of(originals, 0.004, generator, 3.2),
            "with": score_of(originals, 0.32, generator, 3.4),
        },
        "InvertingGradients": {
            "without": score_of(originals, 0.05, generator, 41.7),
            "with": score_of(originals, 0.25, generator, 142.3),
        },
    }
    true = torch.bincount(labels, minlength=10).tolist()
    some = [count // 2 for count in true]
    return LeakageReport(
        model="digits ConvNet",
        defense=DEFENSE,
        input_shape=(1, 8, 8),
        labels=labels.tolist(),
        class_names=data.class_names,
        attacked=order,
        gradient_norm=1.873,
        noise_ratio=0.2,
        predicted_error=errors.tolist(),
        predicted_converged=[True] * examples,
        lower_bound=(errors / 6).tolist(),
        lambda_max=spectrum[:, 0].tolist(),
        spectrum=spectrum.tolist(),
        attacks=attacks,
        label_recovery={
            "without": LabelScore(le_acc=1.0, ln_acc=1.0, i_rec=1.0, recovered=true, true=true),
            "with": LabelScore(le_acc=0.8, ln_acc=0.7, i_rec=0.667, recovered=some, true=true),
        },
        prior_psnr=-10 * math.log10(float(data.images.var(dim=0).mean())),
        verdict=Verdict(
            decision="perturb",
            reasons=(
                "as given, an attack reconstructs an example at 57.6 dB, above 25.0 dB",
                f"after {DEFENSE} it meets the policy",
            ),
            noise_ratio=0.2,
            measures={"predicted_error": float(errors.min()) / 8, "attacked_psnr": 22.3},
        ),
        environment={
            "gradguard": "0.1.0",
            "torch": "2.13.0",
            "device": "cpu",
            "dtype": "float32",
            "date": "2025-11-21",
        },
        extra={
            "accuracy": {"without": 0.952, "with": 0.944},
            "influence_check": influence_check(images),
            "threat": {"others_known": True, "labels_known": True, "max_attacked": attacked, "value_range": [0.0, 1.0]},
        },
        originals=originals,
    )


@pytest.fixture(scope="session")
def report() -> LeakageReport:
    """The full report on six digits."""
    return digits_report()


@pytest.fixture(scope="session")
def bare() -> LeakageReport:
    """The least an audit finds: no defense, no attack, no verdict, one example."""
    return LeakageReport(
        model="fcn",
        defense=None,
        input_shape=(784,),
        labels=[3],
        gradient_norm=1.0,
        noise_ratio=0.0,
        predicted_error=[0.0],
        predicted_converged=[True],
        lower_bound=[0.0],
        lambda_max=[2.0],
        spectrum=[[2.0, 1.0, 1e-3]],
    )


@pytest.fixture(scope="session")
def vectors() -> LeakageReport:
    """Inputs that are no pictures: rows of 30 numbers."""
    generator = torch.Generator().manual_seed(1)
    originals = torch.randn(3, 30, generator=generator).cumsum(dim=1).sigmoid()
    report = digits_report(3)
    return dataclasses.replace(
        report,
        input_shape=(30,),
        originals=originals,
        spectrum=[row[:30] for row in report.spectrum],
        attacks={
            "DLG": {
                "without": score_of(originals, 0.05, generator, 1.0),
                "with": score_of(originals, 0.3, generator, 1.0),
            }
        },
    )


@pytest.fixture(scope="session")
def large() -> LeakageReport:
    """A batch of 40, which is folded; 10 of its examples were attacked."""
    return digits_report(40, attacked=10)
