"""Models, data, shapes and ranges as the command line names them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradguard.errors import InputError
from gradguard.functional.loss_gradient import LossFunction
from gradguard.zoo.models import NAMED
from gradguard.zoo.picture_folder import PictureFolder
from gradguard.zoo.pictures import Pictures, digits, load_npz, photos

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "binary-cross-entropy": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
}


def load_model(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model called `name` and its input shape, or what the factory `FILE.py:FACTORY` / `MODULE:FACTORY` returns."""
    if name in NAMED:
        factory, shape = NAMED[name]
        return factory(), shape
    if ":" not in name:
        raise InputError(
            f"`--model` must be one of {', '.join(NAMED)}, or FILE.py:FACTORY or MODULE:FACTORY; got {name!r}."
        )
    model = called("--model", name)
    if not isinstance(model, nn.Module):
        raise InputError(f"`{name}` must return an nn.Module, it returned a {type(model).__name__}.")
    return model, None


def called(option: str, name: str) -> Any:
    """What the factory `FILE.py:FACTORY` or `MODULE:FACTORY` returns."""
    factory = attribute_of(option, name)
    try:
        return factory()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"`{option} {name}`: {error}.") from error


def attribute_of(option: str, name: str) -> Any:
    """The function (or whatever else) that `FILE.py:NAME` or `MODULE:NAME` names."""
    path, _, attribute = name.rpartition(":")
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location("gradguard_user_model", path)
            if spec is None or spec.loader is None or not Path(path).is_file():
                raise InputError(f"There is no Python file {path!r}.")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        return getattr(module, attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"`{option} {name}`: {error}.") from error


def load_data(name: str, shape: tuple[int, ...] | None) -> Any:
    """The bundled set called `name`, a folder of pictures, an `.npz`, or what `FILE.py:FACTORY` returns."""
    if name == "digits":
        return digits()
    if name == "photos":
        return photos(shape[-1] if shape else 32)
    if ":" in name and not Path(name).exists():
        return called("--data", name)
    return PictureFolder(name, shape=shape) if Path(name).is_dir() else load_npz(name)


def load_loss(name: str) -> LossFunction:
    """The named loss, or the function `FILE.py:FUNCTION` of outputs and targets."""
    if name in LOSSES:
        return LOSSES[name]()
    if ":" not in name:
        raise InputError(
            f"`--loss` must be one of {', '.join(LOSSES)}, or FILE.py:FUNCTION or MODULE:FUNCTION; got {name!r}."
        )
    loss = attribute_of("--loss", name)
    if not callable(loss) or isinstance(loss, type):
        raise InputError(f"`--loss {name}` must be a function (outputs, targets) -> scalar.")
    return loss


def first_pictures(folder: PictureFolder, count: int) -> Pictures:
    """The first pictures of a folder. Raises `InputError` if their sizes differ."""
    items = [folder[index] for index in range(min(count, len(folder)))]
    shapes = {tuple(x.shape) for x, _ in items}
    if len(shapes) > 1:
        raise InputError(f"The pictures of {folder.path} differ in size: {sorted(shapes)}. Give `--input-shape`.")
    images, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
    return Pictures(images, labels, folder.class_names, folder.path.name)


def parse_shape(text: str) -> tuple[int, ...]:
    """`"3,32,32"` as a tuple of positive integers."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InputError(f"`--input-shape` must be positive integers such as 3,32,32, got {text!r}.")
    return shape


def parse_range(text: str) -> tuple[float, float] | None:
    """`"0,255"` as two numbers, the smaller first; `None` for "none"."""
    if text.strip().lower() == "none":
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f'`--value-range` must be LOW,HIGH such as 0,255, or "none"; got {text!r}.') from error
    return low, high


def checked_device(name: str) -> torch.device:
    """The device called `name`, if there is one here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"`--device {name}` cannot be used here: {str(error).splitlines()[0]}") from error
    return device
