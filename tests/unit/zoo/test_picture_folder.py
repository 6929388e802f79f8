"""Pictures in folders."""

import pytest
import torch
from PIL import Image

from gradguard import InputError
from gradguard.zoo.picture_folder import PictureFolder


@pytest.fixture
def folder(tmp_path, digit_pictures):
    """Two digits of each of three classes as PNG files, and things that are no pictures."""
    root = tmp_path / "pictures"
    for index in range(10):
        label = int(digit_pictures.labels[index])
        if label < 3:
            (root / f"class-{label}").mkdir(parents=True, exist_ok=True)
            values = (digit_pictures.images[index, 0] * 255).round().to(torch.uint8)
            Image.fromarray(values.numpy()).save(root / f"class-{label}" / f"{index}.png")
    (root / "class-0" / "notes.txt").write_text("no picture")
    (root / "empty").mkdir()
    return root


def test_pictures_and_classes(folder, digit_pictures):
    data = PictureFolder(folder, shape=(1, 8, 8))
    assert data.class_names == ("class-0", "class-1", "class-2")
    assert len(data) == 3
    picture, label = data[1]
    assert (tuple(picture.shape), picture.dtype, label) == ((1, 8, 8), torch.float32, 1)
    torch.testing.assert_close(picture, digit_pictures.images[1], rtol=0, atol=0.5 / 255 + 1e-6)


def test_colours_and_sizes(folder):
    picture, _ = PictureFolder(folder)[0]
    assert picture.shape == (3, 8, 8)
    scaled, _ = PictureFolder(folder, shape=(3, 4, 2))[0]
    assert scaled.shape == (3, 4, 2)
    assert 0 <= scaled.min() <= scaled.max() <= 1


def test_what_is_no_picture(folder, tmp_path):
    (folder / "class-0" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"0\.png' cannot be read as a picture"):
        PictureFolder(folder)[0]
    with pytest.raises(InputError, match="one sub-folder per class"):
        PictureFolder(folder / "class-0")
    with pytest.raises(InputError, match="There is no folder"):
        PictureFolder(tmp_path / "missing")
    with pytest.raises(InputError, match="shape"):
        PictureFolder(folder, shape=(2, 8, 8))
