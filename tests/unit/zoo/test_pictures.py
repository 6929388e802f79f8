"""Pictures: what is bundled, and what comes from a user's file."""

import numpy as np
import pytest
import torch

from gradguard import InputError
from gradguard.zoo.pictures import Pictures, digits, load_npz, photos


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def some():
    """Five grey and five colour pictures in uint8, and labels."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 2, 1, 2, 0], dtype=np.uint8)
    return (
        rng.integers(0, 256, (5, 6, 7), dtype=np.uint8),
        rng.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8),
        labels,
    )


def test_digits():
    pictures = digits()
    assert pictures.images.shape == (1797, 1, 8, 8)
    assert pictures.images.dtype == torch.float32
    assert (pictures.images.min(), pictures.images.max()) == (0, 1)
    assert pictures.labels.dtype == torch.int64
    assert torch.bincount(pictures.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert pictures.class_names == tuple("0123456789")
    assert len(pictures) == 1797


@pytest.mark.parametrize("size", [16, 32])
def test_photos(size):
    pictures = photos(size)
    assert pictures.images.shape == (2, 3, size, size)
    assert pictures.images.min() >= 0
    assert pictures.images.max() <= 1
    # A temple in front of the sky and a red flower: real pictures, and the channels in this order.
    assert pictures.images[1, 0].mean() > pictures.images[1, 2].mean()
    assert pictures.images.flatten(1).std(dim=1).min() > 0.1


def test_split():
    pictures = digits()
    train, held_out = pictures.split(300)
    assert (len(train), len(held_out)) == (1497, 300)
    assert torch.equal(torch.cat([train.images, held_out.images]), pictures.images)
    assert torch.equal(held_out.labels, pictures.labels[-300:])
    assert isinstance(held_out, Pictures)
    assert held_out.class_names == pictures.class_names


def test_a_grey_file_in_uint8(tmp_path, some):
    grey, _, labels = some
    pictures = load_npz(save(tmp_path / "grey.npz", images=grey, labels=labels))
    assert pictures.images.shape == (5, 1, 6, 7)
    assert pictures.images.dtype == torch.float32
    assert np.array_equal((pictures.images[:, 0] * 255).round().numpy().astype(np.uint8), grey)
    assert pictures.labels.dtype == torch.int64
    assert pictures.labels.tolist() == [0, 2, 1, 2, 0]
    assert pictures.class_names == ("0", "1", "2")
    assert pictures.name == "grey"


def test_a_colour_file_in_uint8(tmp_path, some):
    _, colour, labels = some
    names = np.array(["cat", "dog", "ship"])
    pictures = load_npz(str(save(tmp_path / "colour.npz", images=colour, labels=labels, class_names=names)))
    assert pictures.images.shape == (5, 3, 6, 7)
    assert pictures.images.is_contiguous()
    assert pictures.images[3, 2, 4, 5].item() == pytest.approx(colour[3, 4, 5, 2] / 255)
    assert pictures.class_names == ("cat", "dog", "ship")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_file_in_floats(tmp_path, some, dtype):
    grey, _, labels = some
    images = (grey / 255).astype(dtype)
    pictures = load_npz(save(tmp_path / "floats.npz", images=images, labels=labels))
    assert np.array_equal(pictures.images[:, 0].numpy(), images.astype(np.float32))


def test_digits_round_trip(tmp_path, digit_pictures):
    images = digit_pictures.images[:50, 0].numpy()
    pictures = load_npz(save(tmp_path / "digits.npz", images=images, labels=digit_pictures.labels[:50].numpy()))
    assert torch.equal(pictures.images, digit_pictures.images[:50])
    assert torch.equal(pictures.labels, digit_pictures.labels[:50])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("labels"), r"lacks the arrays \['labels'\]"),
        (lambda a: a.pop("images"), r"lacks the arrays \['images'\]"),
        (lambda a: a.update(labels=a["labels"][:3]), r"one label each, got \(5, 6, 7\) and \(3,\)"),
        (lambda a: a.update(images=a["images"][:0], labels=a["labels"][:0]), "one label each"),
        (lambda a: a.update(images=a["images"][0]), "must be"),
        (lambda a: a.update(images=a["images"].astype(np.float32)), r"floats in \[0, 1\]; they span \d to 2\d\d"),
        (lambda a: a.update(images=a["images"].astype(np.int64)), r"must be uint8, or floats in \[0, 1\]"),
        (lambda a: a.update(images=a["images"] / 255 - 0.5), "they span -0.5"),
        (lambda a: a.update(images=np.full((5, 6, 7), np.nan)), "they span nan"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path, some, change, message):
    arrays = {"images": some[0], "labels": some[2]}
    change(arrays)
    with pytest.raises(InputError, match=message):
        load_npz(save(tmp_path / "bad.npz", **arrays))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="There is no data file"):
        load_npz(tmp_path / "nothing.npz")


def test_pickled_arrays_are_not_read(tmp_path, some):
    """An array of objects is a pickle: nothing in it is executed."""

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    path = save(tmp_path / "trap.npz", images=np.array([Trap()] * 5, dtype=object), labels=some[2])
    with pytest.raises(InputError, match=r"is not an \.npz that can be read without pickle"):
        load_npz(path)


@pytest.mark.parametrize("content", [b"these are no pictures", b"", b"PK\x03\x04 a broken archive"])
def test_files_that_are_no_npz(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"is not an \.npz"):
        load_npz(path)


def test_a_single_array_is_no_npz(tmp_path, some):
    path = tmp_path / "array.npz"
    with path.open("wb") as file:
        np.save(file, some[0])
    with pytest.raises(InputError, match=r"is not an \.npz"):
        load_npz(path)
