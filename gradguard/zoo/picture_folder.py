"""A folder of pictures, one sub-folder per class, read as they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gradguard.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class PictureFolder(Dataset):
    """Pictures in `path/CLASS/*`, classes and files in the order of their names.

    An item is `(picture, label)`: floats in [0, 1], shape `(channels, height, width)`, and the class's index. Taking an
    item raises `InputError` if the file is not a picture.

    Args:
        path: A folder with one sub-folder per class.
        shape: `(channels, height, width)` that every picture is brought to. One channel is grey, three are RGB; each
            side is scaled on its own, so proportions may change. Default: RGB in the files' own sizes, which must then
            be equal.

    Raises:
        InputError: If there is no such folder, it has no sub-folders of pictures, or `shape` is not one of a picture.
    """

    def __init__(self, path: str | Path, *, shape: tuple[int, ...] | None = None) -> None:
        path = Path(path)
        if shape is not None and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise InputError(f"Pictures have the shape (1 | 3, height, width), got {shape}.")
        if not path.is_dir():
            raise InputError(f"There is no folder {str(path)!r}.")
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in SUFFIXES) for f in folders}
        found = {name: files for name, files in found.items() if files}
        if not found:
            raise InputError(
                f"{str(path)!r} holds no pictures that are sorted by class: put them into one sub-folder per class "
                f"({', '.join(SUFFIXES)})."
            )
        self.path, self.shape = path, shape
        self.class_names = tuple(found)
        self.files = [(file, label) for label, files in enumerate(found.values()) for file in files]

    def __repr__(self) -> str:
        return f"PictureFolder({str(self.path)!r}, {len(self)} pictures, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return self._read(file), label

    def _read(self, file: Path) -> Tensor:
        try:
            from PIL import Image
        except ImportError as error:
            raise InputError("Reading picture files needs Pillow: pip install pillow.") from error
        try:
            with Image.open(file) as opened:
                picture = opened.convert("L" if self.shape and self.shape[0] == 1 else "RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"{str(file)!r} cannot be read as a picture: {error}") from error
        if self.shape is not None and picture.size != (self.shape[2], self.shape[1]):
            picture = picture.resize((self.shape[2], self.shape[1]), Image.Resampling.BOX)
        values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
        return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()
