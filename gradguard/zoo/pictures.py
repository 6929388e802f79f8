"""Pictures to measure on: what a dependency bundles, and the user's own `.npz` files.

Pictures are float tensors `(N, channels, height, width)` in [0, 1]; labels are int64 `(N,)`.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradguard.errors import InputError


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures.

    Args:
        images: Shape `(N, channels, height, width)`, in [0, 1].
        labels: Class indices, shape `(N,)`, int64.
        class_names: One per class.
        name: What the set is called in reports.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def split(self, held_out: int) -> tuple[Pictures, Pictures]:
        """All but the last pictures, and the last ones.

        Args:
            held_out: How many are the last ones, at least 1.

        Returns:
            The first `N - held_out` pictures and the other `held_out`.
        """
        parts = [(self.images[:-held_out], self.labels[:-held_out]), (self.images[-held_out:], self.labels[-held_out:])]
        first, second = (Pictures(i, y, self.class_names, self.name) for i, y in parts)
        return first, second


def digits() -> Pictures:
    """scikit-learn's 1,797 handwritten digits (UCI; bundled with scikit-learn).

    Returns:
        Grey pictures of 8x8 pixels, 10 classes.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    return Pictures(images, torch.from_numpy(bunch.target).to(torch.int64), tuple(str(i) for i in range(10)), "digits")


def photos(size: int = 32) -> Pictures:
    """scikit-learn's two sample photographs, cropped to squares (bundled, CC-BY).

    Args:
        size: Pixels per side that they are scaled to.

    Returns:
        Two RGB pictures, one per class.
    """
    from sklearn.datasets import load_sample_images

    pictures = []
    for image in load_sample_images().images:
        square = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, :427, 100:527].to(torch.float32) / 255
        pictures.append(torch.nn.functional.interpolate(square[None], size=(size, size), mode="area")[0])
    return Pictures(torch.stack(pictures), torch.tensor([0, 1]), ("temple", "flower"), "photos")


def load_npz(path: str | Path) -> Pictures:
    """Pictures from an `.npz` file.

    Args:
        path: A file with `images`, `(N, H, W)` or `(N, H, W, C)`, uint8 or floats in [0, 1], and `labels`, integers
            `(N,)`; `class_names` if there are any. It is read without pickle.

    Returns:
        The pictures, scaled to [0, 1].

    Raises:
        InputError: For a missing file, missing arrays, unequal lengths, or values outside their range.
    """  # noqa: DOC501 (the `ValueError` below is caught)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no data file {str(path)!r}.")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with archive:
            arrays = {n: archive[n] for n in archive.files if n in ("images", "labels", "class_names")}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{str(path)!r} is not an .npz that can be read without pickle: {error}") from error
    missing = {"images", "labels"} - set(arrays)
    if missing:
        raise InputError(f"{str(path)!r} lacks the arrays {sorted(missing)}: it must hold `images` and `labels`.")
    images, labels = arrays["images"], arrays["labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"`labels` must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}.")
    labels = labels.astype(np.int64)
    if images.ndim not in (3, 4) or len(images) != len(labels) or len(images) == 0:
        raise InputError(
            f"`images` must be (N, H, W) or (N, H, W, C) with one label each, got {images.shape} and {labels.shape}."
        )
    scaled = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    if not np.isfinite(scaled).all() or scaled.min() < 0 or scaled.max() > 1:
        raise InputError(
            f"`images` must be uint8, or floats in [0, 1]; they span {scaled.min():g} to {scaled.max():g}."
        )
    tensor = torch.from_numpy(scaled)
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
    names = tuple(str(n) for n in arrays.get("class_names", range(int(labels.max()) + 1)))
    return Pictures(tensor, torch.from_numpy(labels), names, path.stem)
