"""Small models and batches, one of which every attack and every defense should work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gradguard.functional.loss_gradient import LossGradient
from gradguard.threats.observation import Observation

#: Classes of all settings.
CLASSES = 5


def conv() -> tuple[nn.Module, int]:
    """A convolution that can be undone, and a single example."""
    layers = (nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, CLASSES))
    return nn.Sequential(*layers), 1


def dense() -> tuple[nn.Module, int]:
    """A fully connected network with ReLU, and two examples."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, CLASSES)), 2


def normalised() -> tuple[nn.Module, int]:
    """Batch normalisation, in eval mode, and two examples."""
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))
    return nn.Sequential(*layers), 2


SETTINGS: tuple[Callable[[], tuple[nn.Module, int]], ...] = (conv, dense, normalised)


def batch(setting: Callable[[], tuple[nn.Module, int]]) -> tuple[LossGradient, Tensor, Tensor]:
    """A setting's loss gradient in float64, inputs `(B, 1, 4, 4)` in [0, 1] and labels. Draws nothing globally."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, count = setting()
    model = model.double().eval()
    inputs = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return LossGradient(model, nn.CrossEntropyLoss()), inputs, torch.arange(count) + 1


def observations(*, labels: bool) -> Iterator[Observation]:
    """What an attacker sees in each setting, with the labels or without."""
    for setting in SETTINGS:
        function, inputs, targets = batch(setting)
        yield Observation(
            loss_gradient=function,
            sent=function(inputs, targets),
            input_shape=(1, 4, 4),
            batch_size=len(inputs),
            labels=targets if labels else None,
            num_classes=CLASSES,
        )
