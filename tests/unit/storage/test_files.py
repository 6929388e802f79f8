"""Files of private data: written whole or not at all, for their owner's eyes, and read without trust."""

import pickle

import pytest
import torch
from torch import nn

from gradguard import InputError, LossGradient, load_gradient, save_gradient
from gradguard.functional.vectors import flatten, unflatten
from gradguard.storage.files import atomic_path, load_weights, write_text
from gradguard.zoo.models import digits_convnet


@pytest.fixture
def gradient(convnet, cross_entropy, batch):
    return LossGradient(convnet, cross_entropy)(*batch)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_gradient_round_trip(tmp_path, gradient):
    path = tmp_path / "new" / "folder" / "gradient.safetensors"
    save_gradient(path, gradient)
    read = load_gradient(path)
    assert set(read) == set(gradient)
    for n, g in gradient.items():
        assert read[n].dtype == g.dtype
        assert torch.equal(read[n], g)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_precision(tmp_path, gradient, dtype):
    path = tmp_path / "gradient.safetensors"
    save_gradient(path, {n: g.to(dtype) for n, g in gradient.items()})
    read = load_gradient(path)
    assert all(read[n].dtype == dtype and torch.equal(read[n], g.to(dtype)) for n, g in gradient.items())


def test_tensors_that_are_views(tmp_path, gradient):
    """Of one vector, transposed, expanded, or part of a graph: what is written is what they hold."""
    views = unflatten(flatten(gradient), gradient)
    views["5.weight"] = views["5.weight"].t().contiguous().t()
    views["0.bias"] = torch.zeros(1).expand(16)
    views["2.bias"] = views["2.bias"].clone().requires_grad_(True) * 1
    path = tmp_path / "gradient.safetensors"
    save_gradient(path, views)
    read = load_gradient(path)
    assert torch.equal(read["5.weight"], gradient["5.weight"])
    assert torch.equal(read["2.weight"], gradient["2.weight"])
    assert torch.equal(read["2.bias"], gradient["2.bias"])
    assert read["0.bias"].tolist() == [0.0] * 16


def test_only_the_owner_may_read(tmp_path, gradient):
    save_gradient(tmp_path / "gradient.safetensors", gradient)
    write_text(tmp_path / "report.html", "private")
    write_text(tmp_path / "table.md", "public", private=False)
    assert mode(tmp_path / "gradient.safetensors") == 0o600
    assert mode(tmp_path / "report.html") == 0o600
    assert mode(tmp_path / "table.md") == 0o644


def test_an_open_file_is_closed_to_others_when_it_is_replaced(tmp_path, gradient):
    path = tmp_path / "gradient.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o666)
    save_gradient(path, gradient)
    assert mode(path) == 0o600


def test_it_is_private_while_it_is_being_written(tmp_path):
    with atomic_path(tmp_path / "report.html") as temporary:
        temporary.write_text("half", encoding="utf-8")
        assert mode(temporary) == 0o600
        assert temporary.parent == tmp_path  # on the same file system, so that it can take the other's place
        assert temporary.suffix == ".html"
        assert not (tmp_path / "report.html").exists()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half of the new", encoding="utf-8")
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_gradient_that_cannot_be_written_leaves_the_old_one(tmp_path, gradient, monkeypatch):
    path = tmp_path / "gradient.safetensors"
    save_gradient(path, gradient)

    def half(tensors, filename):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("gradguard.storage.files.safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_gradient(path, {n: 2 * g for n, g in gradient.items()})
    assert torch.equal(load_gradient(path)["0.weight"], gradient["0.weight"])
    assert [p.name for p in tmp_path.iterdir()] == ["gradient.safetensors"]


def test_text_round_trip(tmp_path):
    write_text(tmp_path / "page.html", "‖J δ‖ ≤ λ")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "‖J δ‖ ≤ λ"
    write_text(tmp_path / "page.html", "again")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "again"


@pytest.mark.parametrize("content", [b"", b"safetensors?", pickle.dumps({"w": 1}), b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "gradient.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_gradient(path)


def test_a_truncated_file_is_refused(tmp_path, gradient):
    path = tmp_path / "gradient.safetensors"
    save_gradient(path, gradient)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_gradient(path)


def test_weights(tmp_path, convnet, batch):
    path = tmp_path / "weights.safetensors"
    save_gradient(path, convnet.state_dict())
    torch.manual_seed(5)
    other = digits_convnet().double()
    assert not torch.equal(other(batch[0]), convnet(batch[0]))
    load_weights(path, other)
    assert torch.equal(other(batch[0]), convnet(batch[0]))


def test_weights_include_buffers(tmp_path):
    model, other = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    model(torch.rand(8, 3))  # moves the running statistics
    save_gradient(tmp_path / "weights.safetensors", model.state_dict())
    load_weights(tmp_path / "weights.safetensors", other)
    assert torch.equal(other[1].running_mean, model[1].running_mean)
    assert other[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("5.bias"), "5.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra"),
        (lambda s: s.update({"5.bias": torch.zeros(3)}), "5.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, convnet, change, message):
    state = dict(convnet.state_dict())
    change(state)
    save_gradient(tmp_path / "weights.safetensors", state)
    with pytest.raises(InputError, match=f"(?s)do not fit the model: .*{message}"):
        load_weights(tmp_path / "weights.safetensors", convnet)


def test_weights_of_an_untrusted_kind(tmp_path, convnet):
    torch.save(convnet.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="reads no pickles"):
        load_weights(tmp_path / "weights.pt", convnet)
