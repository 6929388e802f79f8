"""One progress bar, one checkpoint, one fingerprint, one environment."""

import json
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from gradguard import InputError
from gradguard.storage import checkpoint as checkpoints
from gradguard.storage.checkpoint import Checkpoint, read_tensors, write_tensors
from gradguard.storage.environment import environment
from gradguard.storage.fingerprint import example_digests, fingerprint, plain_repr
from gradguard.storage.progress import progress_bar


def test_a_checkpoint_comes_back_as_it_was_and_is_private(tmp_path):
    path = tmp_path / "state"
    file = Checkpoint(path)
    assert not file.exists
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.tensor(1.5, dtype=torch.float64)}
    file.save(tensors, {"steps": 3, "name": "x"})
    assert path.stat().st_mode & 0o777 == 0o600
    found, about = file.load()
    assert about == {"steps": 3, "name": "x"}
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    file.remove()
    file.remove()
    assert not file.exists


def test_a_checkpoint_is_due_after_its_time_and_rarer_where_writing_is_slow(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = Checkpoint(tmp_path / "state")
    now[0] += 1.9
    assert not file.due(2.0)
    now[0] += 0.2
    assert file.due(2.0)

    def slowly(*arguments):
        now[0] += 1.0

    monkeypatch.setattr(checkpoints, "write_tensors", slowly)
    assert file.due(-1.0)
    file.save({}, {})
    now[0] += 19.0
    assert not file.due(2.0)
    now[0] += 2.0
    assert file.due(2.0)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must name a file, and .* is a folder"):
        Checkpoint(tmp_path)
    for name, content in (("text", b"hello"), ("pickle", b"\x80\x04N.")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is no checkpoint"):
            Checkpoint(tmp_path / name).load()
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match="is no checkpoint"):
        Checkpoint(tmp_path / "other").load()
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "list", metadata={"about": json.dumps([1])})
    with pytest.raises(ValueError, match="no description"):
        read_tensors(tmp_path / "list")


def test_a_write_that_fails_leaves_the_last_one(tmp_path):
    path = tmp_path / "state"
    write_tensors(path, {"a": torch.ones(2)}, {"n": 1})
    with pytest.raises(TypeError):
        write_tensors(path, {"a": torch.zeros(2)}, {"n": object()})
    assert read_tensors(path)[1] == {"n": 1}


def test_a_fingerprint_knows_weights_buffers_settings_and_tensors():
    def net(**options):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2, **options), nn.BatchNorm1d(2))

    same = fingerprint(net())
    assert fingerprint(net()) == same
    moved, counted, smoothed = net(), net(), nn.CrossEntropyLoss(label_smoothing=0.1)
    with torch.no_grad():
        moved[0].weight[0, 0] += 1e-6
        counted[1].running_mean += 1
    others = {fingerprint(moved), fingerprint(counted), fingerprint(net(bias=False))}
    assert same not in others
    assert len(others) == 3
    assert fingerprint(smoothed) != fingerprint(nn.CrossEntropyLoss())
    assert fingerprint("a", [torch.zeros(2)]) != fingerprint("a", [torch.zeros(2, 1)]) != fingerprint("a")
    assert plain_repr(object()) == plain_repr(object())


def test_examples_are_told_apart_by_input_and_target():
    x, y = torch.rand(4, 3).bfloat16(), torch.tensor([0, 1, 0, 1])
    digests = example_digests(x, y)
    assert torch.equal(digests, example_digests(x.clone(), y.clone()))
    assert (digests != example_digests(x, 1 - y)).all()
    changed = x.clone()
    changed[2, 0] += 1
    assert (digests != example_digests(changed, y)).tolist() == [False, False, True, False]


def test_a_bar_that_nobody_sees_says_nothing(capsys):
    for shown in (None, False):
        with progress_bar("working", 3, shown=shown) as bar:
            assert not bar.shown
            bar.step("a")
            bar.to(2, "note")
    assert capsys.readouterr() == ("", "")
    with progress_bar("working", 3, shown=True) as bar:
        bar.to(3, "best 0.1")
    out = capsys.readouterr().out
    assert "3/3" in out
    assert "best 0.1" in out


def test_the_environment_and_the_old_names():
    found = environment("cpu", torch.float32)
    assert set(found) == {"gradguard", "torch", "python", "device", "dtype", "date"}
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    from gradguard.guard import Measures
    from gradguard.guard import environment as old
    from gradguard.report import AttackScore, LabelScore
    from gradguard.report.leakage_report import AttackScore as attack_score
    from gradguard.survey import YARDSTICK

    assert callable(old)
    assert attack_score is AttackScore
    assert Measures.__name__ == "Measures"
    assert LabelScore.__name__ == "LabelScore"
    assert YARDSTICK.noise_ratio == 0.5
