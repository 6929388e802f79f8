"""The model, the data and the guard that a command line describes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradguard.attacks import ATTACKS
from gradguard.cli.common import options
from gradguard.cli.reading import (
    LOSSES,
    checked_device,
    first_pictures,
    load_data,
    load_loss,
    load_model,
    parse_range,
    parse_shape,
)
from gradguard.defenses import DEFENSES
from gradguard.defenses.stream import SEEDED, fresh_noise
from gradguard.errors import InputError
from gradguard.evaluation.datasets import chunks, length
from gradguard.evaluation.datasets import class_names as names_of
from gradguard.functional.whole_batch import moved, num_examples
from gradguard.guard import Guard
from gradguard.policy import Policy
from gradguard.storage.files import load_weights
from gradguard.threats.model import ThreatModel
from gradguard.zoo.models import NAMED
from gradguard.zoo.picture_folder import PictureFolder
from gradguard.zoo.pictures import Pictures

#: Class indices `(N,)` as each loss takes them.
AS_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda labels: labels,
    "binary-cross-entropy": lambda labels: labels[:, None].to(torch.float32),
    "mse": lambda labels: labels[:, None].to(torch.float32),
}
#: Of the registries, those that the command line offers.
ATTACK_NAMES = ("rgap", "dlg", "idlg", "ig", "ilrg")
DEFENSE_NAMES = ("gaussian", "prior", "small-eigenspace", "pruning")


subject_options = options(
    click.option(
        "--model",
        required=True,
        help=f"A name ({', '.join(NAMED)}) or FILE.py:FACTORY or MODULE:FACTORY, a function that returns an nn.Module.",
    ),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        help="Its parameters as safetensors (default: as the factory draws them).",
    ),
    click.option(
        "--data",
        default="digits",
        show_default=True,
        help='"digits", "photos", an .npz with images and labels, a folder of pictures with a sub-folder per class, or '
        "FILE.py:FACTORY or MODULE:FACTORY, a function that returns a Dataset, batches, or (inputs, targets): tensors, "
        "tuples and dictionaries of them, targets as the loss takes them.",
    ),
    click.option(
        "--input-module", help='Of a model of tokens: the module that looks them up, such as "transformer.wte".'
    ),
    click.option("--private", help="Key or position of the private input, where inputs are a dictionary or a tuple."),
    click.option(
        "--input-shape",
        help="Channels,height,width that the pictures of a folder are scaled to (default: the named model's own).",
    ),
    click.option(
        "--loss",
        default="cross-entropy",
        show_default=True,
        help=f"A name ({', '.join(LOSSES)}), or FILE.py:FUNCTION or MODULE:FUNCTION of outputs and targets.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="The first examples of the data (check: all of them, unless this is given).",
    ),
    click.option("--defense", type=click.Choice(DEFENSE_NAMES), help="Perturb the gradient by this."),
    click.option(
        "--strength",
        type=float,
        default=0.5,
        show_default=True,
        help="Noise norm relative to the gradient's; for pruning, the fraction.",
    ),
    click.option(
        "--attack",
        "attack_names",
        type=click.Choice(ATTACK_NAMES),
        multiple=True,
        help="Attack with this; may be repeated (default: rgap, dlg, ilrg).",
    ),
    click.option(
        "--attacked", type=click.IntRange(1), default=4, show_default=True, help="How many examples to attack."
    ),
    click.option(
        "--min-error",
        type=float,
        default=0.1,
        show_default=True,
        help="Policy: least predicted error, as a fraction of the value range.",
    ),
    click.option(
        "--max-psnr",
        type=float,
        default=20.0,
        show_default=True,
        help="Policy: highest PSNR (dB) that an attack may reach.",
    ),
    click.option(
        "--max-ssim",
        type=float,
        default=0.9,
        show_default=True,
        help="Policy: highest SSIM that an attack may reach on a picture; 1 allows all.",
    ),
    click.option(
        "--accept-unproven",
        is_flag=True,
        help="Policy: accept a gradient that meets it though no attack works without a defense either.",
    ),
    click.option(
        "--value-range",
        default="0,1",
        show_default=True,
        help='Lowest and highest valid input, "0,255" for instance; "none" for inputs without a range.',
    ),
    click.option("--max-labels", type=float, help="Policy: highest share of labels that may be recovered."),
    click.option("--device", default="cpu", show_default=True),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of the model's weights and the attacks' starts."
    ),
    click.option(
        "--noise-seed",
        type=int,
        help="Reproducible noise, for tests: whoever knows the seed subtracts the noise (default: secret noise).",
    ),
)


class Subject:
    """The model, the data and the guard that a command line describes."""

    def __init__(
        self,
        *,
        model: str,
        weights: Path | None,
        data: str,
        input_shape: str | None,
        input_module: str | None,
        private: str | None,
        loss: str,
        batch_size: int,
        defense: str | None,
        strength: float,
        attack_names: tuple[str, ...],
        attacked: int,
        min_error: float,
        max_psnr: float,
        max_ssim: float,
        accept_unproven: bool,
        value_range: str,
        max_labels: float | None,
        device: str,
        seed: int,
        noise_seed: int | None,
        whole: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        place = checked_device(device)
        self.model, default_shape = load_model(model)
        if weights is not None:
            load_weights(weights, self.model)
        self.model.to(place).eval()
        self.data = load_data(data, parse_shape(input_shape) if input_shape else default_shape)
        self.as_targets = AS_TARGETS.get(loss, _as_they_are)
        self.loss_fn = load_loss(loss)
        self.class_names = names_of(self.data)
        inputs, targets = self._first(batch_size, whole)
        self.inputs, self.targets = moved(inputs, place), moved(targets, place)
        self.size = num_examples(self.inputs)
        self.count = length(self.data) or self.size
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        if noise_seed is not None:
            click.echo(f"gradguard: {SEEDED}", err=True)
        self.noise = fresh_noise(place) if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        self.guard = Guard(
            defense=DEFENSES[defense].make(strength) if defense else None,
            attacks=[ATTACKS[n].make() for n in attack_names] or None,
            policy=Policy(
                minimum_predicted_error=min_error,
                maximum_attacked_psnr=max_psnr,
                maximum_attacked_ssim=max_ssim,
                maximum_label_recovery=max_labels,
                accept_unproven=accept_unproven,
            ),
            threat=ThreatModel(max_attacked=attacked, value_range=parse_range(value_range)),
            input_module=input_module,
            private=private,
        )

    def _first(self, batch_size: int, whole: bool) -> tuple[Any, Any]:
        """The first `batch_size` examples, or all."""
        if isinstance(self.data, Pictures | PictureFolder):
            pictures = self.data
            count = (len(pictures.images) if isinstance(pictures, Pictures) else len(pictures)) if whole else batch_size
            if isinstance(pictures, PictureFolder):
                pictures = first_pictures(pictures, count)
            return pictures.images[:count], self.as_targets(pictures.labels[:count])
        size = sys.maxsize if whole else batch_size
        found = next(chunks(self.data, size, None if whole else batch_size), None)
        if found is None:
            raise InputError("The data hold no example.")
        return found

    def examples(self) -> Any:
        """All of the data, labels in the form that the loss takes; a folder's pictures as they are needed."""
        if isinstance(self.data, Pictures):
            return self.data.images, self.as_targets(self.data.labels)
        return Relabelled(self.data, self.as_targets) if isinstance(self.data, PictureFolder) else self.data


def _as_they_are(labels: Tensor) -> Tensor:
    return labels


class Relabelled(Dataset):
    """A folder of pictures whose labels are in the form that a loss takes."""

    def __init__(self, folder: PictureFolder, as_targets: Callable[[Tensor], Tensor]) -> None:
        self.folder, self.as_targets = folder, as_targets

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, label = self.folder[index]
        return picture, self.as_targets(torch.tensor([label]))[0]
