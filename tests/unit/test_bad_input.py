"""Each kind of bad input is one clear error, raised before any long work: no attack and no solver may have started."""

import pickle

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.attacks import DLG, RGAP, Observation
from gradguard.guard import Guard


@pytest.fixture
def gradient(convnet, cross_entropy, batch):
    return gg.LossGradient(convnet, cross_entropy)(*batch)


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch):
    """Attacks that were started would fail the test in another way than by the error it asks for."""

    def started(*args, **kwargs):
        raise AssertionError("long work was started")

    monkeypatch.setattr(DLG, "run", started)
    monkeypatch.setattr(RGAP, "run", started)
    monkeypatch.setattr("gradguard.evaluation.measurement.influence", started)


def test_nan_gradient(convnet, cross_entropy, batch, gradient):
    gradient["0.weight"][0] = float("nan")
    with pytest.raises(gg.InputError, match=r"'0\.weight' holds NaN or infinite values"):
        Guard().protect(convnet, cross_entropy, *batch, gradient)
    with pytest.raises(gg.InputError, match=r"'0\.weight' holds NaN or infinite values"):
        gg.defenses.GaussianNoise(noise_ratio=0.1)(gradient)


def test_empty_batch(convnet, cross_entropy):
    with pytest.raises(gg.InputError, match="empty batch"):
        Guard().audit(convnet, cross_entropy, torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))


def test_labels_out_of_range(convnet, cross_entropy, batch):
    with pytest.raises(gg.InputError, match="Label 10 is out of range: the model has 10 outputs"):
        Guard().audit(convnet, cross_entropy, batch[0], batch[1] + 10 - batch[1])


def test_labels_of_another_number(convnet, cross_entropy, batch):
    with pytest.raises(gg.InputError, match="one entry per example: 4 inputs"):
        Guard().audit(convnet, cross_entropy, batch[0], batch[1][:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("0.weight"), r"missing \['0\.weight'\]"),
        (lambda g: g.update({"extra": torch.zeros(1)}), r"unexpected \['extra'\]"),
        (lambda g: g.update({"0.bias": torch.zeros(3).double()}), r"'0\.bias' has shape \(3,\), the parameter \(16,\)"),
    ],
)
def test_mismatched_gradient_dictionary(convnet, cross_entropy, batch, gradient, change, message):
    change(gradient)
    with pytest.raises(gg.InputError, match=message):
        Guard().protect(convnet, cross_entropy, *batch, gradient)


def test_train_mode_batchnorm(cross_entropy, batch):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).double().train()
    with pytest.raises(gg.UnsupportedModelError, match=r"'1' \(BatchNorm2d\) is in training mode"):
        Guard().audit(model, cross_entropy, *batch)


def test_a_model_rgap_cannot_walk(cross_entropy, batch):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)).double()
    function = gg.LossGradient(model, cross_entropy)
    x, y = batch[0][:1], batch[1][:1]
    observation = Observation(loss_gradient=function, sent=function(x, y), input_shape=(1, 8, 8), labels=y)
    with pytest.raises(gg.UnsupportedModelError, match=r"'1' \(MaxPool2d"):
        RGAP()(observation)


def test_non_finite_loss(convnet, cross_entropy, batch):
    with torch.no_grad():
        convnet[0].weight.fill_(float("inf"))
    with pytest.raises(gg.InputError, match="The loss is nan"):
        Guard().audit(convnet, cross_entropy, *batch)


def test_non_finite_inputs(convnet, cross_entropy, batch):
    with pytest.raises(gg.InputError, match="`inputs` hold NaN"):
        Guard().audit(convnet, cross_entropy, batch[0] * float("nan"), batch[1])


def test_device_mismatch(convnet, cross_entropy, batch):
    with pytest.raises(gg.InputError, match=r"`inputs` are on meta, the model is on cpu.*inputs\.to\('cpu'\)"):
        Guard().audit(convnet, cross_entropy, batch[0].to("meta"), batch[1])


def test_gradient_on_another_device(convnet, cross_entropy, batch, gradient):
    gradient["0.weight"] = gradient["0.weight"].to("meta")
    with pytest.raises(gg.InputError, match=r"'0\.weight' is on meta, the model on cpu"):
        Guard().protect(convnet, cross_entropy, *batch, gradient)


def test_a_file_that_is_not_safetensors(tmp_path):
    path = tmp_path / "gradient.safetensors"
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(gg.InputError, match=r"not a safetensors file.*no pickles"):
        gg.load_gradient(path)
    with pytest.raises(gg.InputError, match="There is no gradient file"):
        gg.load_gradient(tmp_path / "nothing.safetensors")


def test_integer_inputs(convnet, cross_entropy, batch):
    with pytest.raises(gg.InputError, match=r"floating point.*Scale images to \[0, 1\]"):
        Guard().audit(convnet, cross_entropy, batch[0].long(), batch[1])


def test_a_loss_per_example(convnet, batch):
    with pytest.raises(gg.InputError, match=r"shape \(4,\); it must be one number"):
        Guard().audit(convnet, nn.CrossEntropyLoss(reduction="none"), *batch)


@pytest.mark.parametrize("strength", [0.0, -1.0, float("inf"), float("nan")])
def test_strengths_that_are_none(strength):
    for make in (
        lambda s: gg.defenses.GaussianNoise(noise_ratio=s),
        lambda s: gg.defenses.PriorNoise(noise_ratio=s),
        lambda s: gg.defenses.Pruning(fraction=s),
    ):
        with pytest.raises(gg.InputError, match="must be"):
            make(strength)
