"""`gradguard check` fails closed: what is not of these data at these weights is refused, with what it looks like."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import gradguard as gg
from gradguard.cli import main
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits

PICTURES = digits()
QUICK = ("--model", "digits", "--no-verify", "--json")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(11)
    return digits_convnet().eval()


@pytest.fixture(scope="module")
def function(model):
    return gg.LossGradient(model, torch.nn.CrossEntropyLoss())


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """Weights that are not the factory's, and a file of 32 examples."""
    folder = tmp_path_factory.mktemp("check")
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.manual_seed(12)
    save_file(digits_convnet().state_dict(), folder / "other.safetensors")
    for name, rows in (("data", slice(0, 32)), ("others", slice(32, 64))):
        np.savez(folder / f"{name}.npz", images=PICTURES.images[rows, 0].numpy(), labels=PICTURES.labels[rows].numpy())
    return folder


@pytest.fixture(scope="module")
def gradient(function):
    return function(PICTURES.images[:32], PICTURES.labels[:32])


@pytest.fixture
def check(files, tmp_path):
    """Runs `check` on a message with the right weights and data, unless told otherwise."""

    def checked(message, *more, weights="weights", data="data"):
        gg.save_gradient(tmp_path / "gradient.safetensors", message)
        where = ("--weights", files / f"{weights}.safetensors") if weights else ()
        arguments = (tmp_path / "gradient.safetensors", *QUICK, *where, "--data", files / f"{data}.npz")
        return run("check", *arguments, *more)

    return checked


def scaled(gradient, factor):
    return {n: factor * g for n, g in gradient.items()}


def test_a_bare_gradient_of_the_whole_file_is_recognised_and_not_sent(check, gradient):
    result = check(gradient)
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert (found["decision"], found["noise_ratio"], found["examples"]) == ("block", 0, 32)
    assert found["looks_like"] == "gradient"
    assert found["explanation"] == []


def test_the_noise_ratio_is_printed(files, gradient, tmp_path):
    gg.save_gradient(tmp_path / "gradient.safetensors", gradient)
    result = run(
        "check", tmp_path / "gradient.safetensors", "--model", "digits", "--no-verify", "--defense", "prior",
        "--weights", files / "weights.safetensors", "--data", files / "data.npz",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "Noise ratio 0.5 (noise over gradient), 32 examples." in result.stdout


@pytest.mark.parametrize("data", ["others", "data"])
def test_the_wrong_batch_is_refused(check, function, gradient, data):
    if data == "others":
        result, message = check(gradient, data=data), "another batch or of other weights"
    else:
        result, message = (
            check(gradient, "--batch-size", 8),
            "It is the gradient of all 32 examples of .*leave `--batch-size`",
        )
    assert result.exit_code == 2, result.output
    assert re.search(message, json.loads(result.stdout)["error"])


def test_a_part_of_the_file_is_recognised(check, function):
    part = function(PICTURES.images[:8], PICTURES.labels[:8])
    result = check(part)
    assert result.exit_code == 2, result.output
    assert "8 of the 32 examples alone (number 0 to 7" in result.stderr
    assert check(part, "--batch-size", 8).exit_code == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [(None, "No `--weights` were given"), ("other", "are they of the round that the message is")],
)
@pytest.mark.parametrize("defense", [(), ("--defense", "prior", "--write", "out.safetensors")])
def test_wrong_and_forgotten_weights_are_refused(check, gradient, weights, message, defense, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = check(gradient, *defense, weights=weights)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_an_update_must_be_declared(check, function, gradient):
    result = check(scaled(gradient, -0.1))
    assert result.exit_code == 2, result.output
    assert "looks like an update" in result.stderr
    assert "learning rate of 0.1" in result.stderr
    for options in (("--update",), ("--update", "--learning-rate", 0.1)):
        found = check(scaled(gradient, -0.1), *options)
        assert found.exit_code == 1, found.output
        assert json.loads(found.stdout)["noise_ratio"] == 0
    assert "it is the declared update, after - before" in json.loads(found.stdout)["explanation"]


def test_an_update_of_several_steps(check, function, tmp_path):
    batch = PICTURES.images[:32], PICTURES.labels[:32]
    training = gg.LocalTraining(steps=4, learning_rate=0.1, batch_size=16, momentum=0.5, weight_decay=0.01)
    update = scaled(training.mean_gradient(function, *batch), -0.4)
    assert check(update).exit_code == 2
    options = ("--update", "--steps", 4, "--learning-rate", 0.1, "--local-batch-size", 16, "--momentum", 0.5)
    assert check(update, *options).exit_code == 2  # without the decay it is another training
    out = tmp_path / "sent.safetensors"
    result = check(update, *options, "--weight-decay", 0.01, "--defense", "prior", "--strength", 3, "--write", out)
    assert result.exit_code == 0, result.output
    assert "it is the declared update, after - before" in json.loads(result.stdout)["explanation"]
    assert set(gg.load_gradient(out)) == set(update)


def test_a_factor_and_a_mask_are_named(check, gradient):
    found = json.loads(check(scaled(gradient, 32.0)).stdout)
    assert (found["decision"], found["looks_like"]) == ("block", "factor")
    assert "32 times the true one" in found["explanation"][0]
    found = json.loads(check(gg.defenses.Pruning(fraction=0.9)(gradient)).stdout)
    assert (found["decision"], found["noise_ratio"]) == ("block", 0)
    assert "90% of the elements are set to zero" in " ".join(found["explanation"])


def test_what_nothing_explains_is_refused_beyond_a_limit(check, gradient):
    noisy = gg.defenses.GaussianNoise(noise_ratio=0.2)(gradient, generator=torch.Generator().manual_seed(0))
    assert check(noisy).exit_code == 2
    result = check(noisy, "--max-unexplained", 0.3)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["looks_like"], found["noise_ratio"], found["decision"]) == ("unexplained", 0, "block")
    assert check(noisy, "--max-unexplained", "nan").exit_code == 2


def test_prefixes_of_wrappers_and_missing_tensors(check, gradient):
    assert check({"module." + n: g for n, g in gradient.items()}).exit_code == 1
    part = {n: g for n, g in gradient.items() if n != "0.weight"}
    assert check(part).exit_code == 2
    found = json.loads(check(part, "--partial").stdout)
    assert "'0.weight' is not sent" in found["explanation"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", 0.1), "`--learning-rate` describes an update"),
        (("--steps", 2), "`--steps` describes an update"),
        (("--momentum", 0.9), "`--momentum` describes an update"),
        (("--update", "--steps", 5), "give `--learning-rate`"),
        (("--update", "--learning-rate", 0), "`learning_rate` must be positive"),
        (("--max-unexplained", -1), "`foreign` must be a distance"),
    ],
)
def test_options_that_do_not_fit(check, gradient, options, message):
    result = check(gradient, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_weight_decay_in_a_gradient(check, function, gradient):
    decayed = gg.LocalTraining(steps=1, learning_rate=1, weight_decay=0.01).mean_gradient(
        function, PICTURES.images[:32], PICTURES.labels[:32]
    )
    for options in ((), ("--weight-decay", 0.01)):
        result = check(decayed, *options)
        assert result.exit_code == 1, result.output
        assert json.loads(result.stdout)["noise_ratio"] == 0
    assert json.loads(result.stdout)["looks_like"] == "gradient"


def test_noise_that_is_in_the_file_is_declared(check, gradient):
    noisy = gg.defenses.GaussianNoise(noise_ratio=40.0)(gradient, generator=torch.Generator().manual_seed(0))
    assert check(noisy).exit_code == 2
    assert check(noisy, "--declared", "gaussian").exit_code == 2  # with the default strength it is other noise
    result = check(noisy, "--declared", "gaussian", "--declared-strength", 40)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["noise_ratio"] == pytest.approx(40, rel=0.1)
    assert "taken on your word" in found["explanation"][0]
