import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gradguard import LossGradient, load_gradient, save_gradient
from gradguard.cli import main
from gradguard.zoo.models import digits_convnet
from gradguard.zoo.pictures import digits

FACTORY = """
import torch
from gradguard.zoo.models import digits_convnet


def make():
    torch.manual_seed(3)
    return digits_convnet()
"""


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "client.py"
    path.write_text(FACTORY)
    return f"{path}:make"


@pytest.fixture
def gradient_file(tmp_path):
    torch.manual_seed(3)
    pictures = digits()
    gradient = LossGradient(digits_convnet(), torch.nn.CrossEntropyLoss())(pictures.images[:4], pictures.labels[:4])
    save_gradient(tmp_path / "gradient.safetensors", gradient)
    return tmp_path / "gradient.safetensors"


QUICK = ("--batch-size", 4, "--attacked", 1, "--attack", "rgap", "--attack", "ilrg")


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "audit", "check", "rank"))
    assert all(run(command, "--help").exit_code == 0 for command in ("demo", "audit", "check", "rank"))


def test_audit_json(model_file):
    result = run("audit", "--model", model_file, *QUICK, "--defense", "prior", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["attacks"]["RGAP"]["without"]["psnr"][0] > 80
    assert report["attacks"]["RGAP"]["with"]["psnr"][0] < 25
    assert report["label_recovery"]["without"]["i_rec"] == 1.0


def test_audit_writes_a_private_page(model_file, tmp_path):
    result = run("audit", "--model", model_file, *QUICK, "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    page = tmp_path / "report" / "index.html"
    assert page.stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "report" / "report.json").read_text())["attacks"]


def test_check_says_no_and_writes_what_may_be_sent(model_file, gradient_file, tmp_path):
    arguments = ("check", gradient_file, "--model", model_file, *QUICK, "--defense", "prior")
    refused = run(*arguments, "--json")
    assert refused.exit_code == 1, refused.output
    assert json.loads(refused.output)["decision"] == "perturb"
    out = tmp_path / "sent.safetensors"
    written = run(*arguments, "--write", out, "--json")
    assert written.exit_code == 0, written.output
    sent, given = load_gradient(out), load_gradient(gradient_file)
    assert set(sent) == set(given)
    assert not torch.equal(sent["0.weight"], given["0.weight"])
    assert out.stat().st_mode & 0o777 == 0o600


def test_check_blocks_without_a_defense(model_file, gradient_file):
    result = run("check", gradient_file, "--model", model_file, *QUICK)
    assert result.exit_code == 1
    assert result.output.startswith("block: ")


def test_check_lets_through_what_meets_the_policy(model_file, gradient_file):
    arguments = ("--min-error", 0, "--max-psnr", 1000, "--max-ssim", 1)
    result = run("check", gradient_file, "--model", model_file, *QUICK, *arguments)
    assert result.exit_code == 0
    assert result.output.startswith("send: ")


def test_the_noise_of_check_is_secret_unless_it_is_seeded(model_file, gradient_file, tmp_path):
    """`--seed`, 0 by default, governs the attacks; whoever knows it must not be able to draw the noise again."""
    arguments = ("--model", model_file, *QUICK, "--defense", "gaussian", "--min-error", 1e-6, "--no-verify")
    sent = []
    for number, seed in enumerate([(), (), ("--noise-seed", 1), ("--noise-seed", 1)]):
        path = tmp_path / f"sent{number}.safetensors"
        result = run("check", gradient_file, *arguments, "--write", path, *seed)
        assert result.exit_code == 0, result.output
        assert ("the noise comes from a seed" in result.stderr) == bool(seed)
        bare = load_gradient(gradient_file)
        sent.append(torch.cat([(g - bare[n]).flatten() for n, g in load_gradient(path).items()]))
    assert torch.nn.functional.cosine_similarity(sent[0], sent[1], dim=0).abs() < 0.1
    assert torch.equal(sent[2], sent[3])


def test_check_of_what_nothing_proves_is_no(model_file, gradient_file):
    """A model that no attack here works on: the defense's noise proves nothing, unless that is accepted by name."""
    arguments = ("check", gradient_file, "--model", model_file, "--batch-size", 4, "--attacked", 1, "--attack", "rgap")
    noisy = (*arguments, "--min-error", 0, "--max-psnr", 1000, "--max-ssim", 1)
    assert run(*noisy).exit_code == 0
    unproven = run(*noisy, "--max-labels", 1, "--json")  # labels are to be judged, and no attack on labels runs
    assert unproven.exit_code == 1, unproven.output
    found = json.loads(unproven.stdout)
    assert found["decision"] == "unproven"
    assert "no attack on labels has run" in " ".join(found["reasons"])
    assert run(*noisy, "--max-labels", 1, "--accept-unproven").exit_code == 0


def test_the_value_range_is_an_option(model_file, tmp_path):
    arguments = ("audit", "--model", model_file, *QUICK, "--json")
    assert run(*arguments, "--value-range", "none").exit_code == 0
    refused = run(*arguments, "--value-range", "0,0.5")
    assert refused.exit_code == 2
    assert "outside the value range [0, 0.5]" in refused.stderr
    wide = json.loads(run(*arguments, "--value-range", "0,255").stdout)
    assert wide["extra"]["threat"]["value_range"] == [0.0, 255.0]
    assert run(*arguments[:3], "--examples", 3, "--value-range", "0,0.5").exit_code == 2
    for wrong in ("0", "a,b", "1,0", "0,1,2"):
        result = run(*arguments, "--value-range", wrong)
        assert result.exit_code == 2
        assert "value" in result.stderr
        assert "Traceback" not in result.stderr


def test_rank():
    result = run("rank", "--model", "digits", "--json")
    assert result.exit_code == 0, result.output
    analysis = json.loads(result.output)
    assert analysis["layers"][0]["unknowns"] == 64
    assert run("rank", "--model", "digits").exit_code == 0


def test_rank_with_advice():
    result = run("rank", "--model", "digits", "--advice", "--json")
    assert result.exit_code == 0, result.output
    (change,) = json.loads(result.output)["advice"]
    assert (change["layer"], change["change"], change["after"]) == ("0", "stride", 4)
    assert "0: stride 1 -> 4: deficit 19" in run("rank", "--model", "digits", "--advice").output


def test_data_of_ones_own(model_file, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, images=(digits().images[:4, 0].numpy() * 255).astype("uint8"), labels=digits().labels[:4].numpy())
    result = run("audit", "--model", model_file, "--data", path, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["labels"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit", "--model", "nothing"), "`--model` must be one of"),
        (("audit", "--model", "missing.py:make"), "There is no Python file 'missing.py'"),
        (("audit", "--model", "gradguard.zoo.models:nope"), "nope"),
        (("audit", "--model", "digits", "--data", "missing.npz"), "There is no data file 'missing.npz'"),
        (("audit", "--model", "digits", "--weights", "missing.safetensors"), "There is no gradient file"),
        (("audit", "--model", "digits", "--device", "cuda:99"), "`--device cuda:99` cannot be used here"),
        (("audit", "--model", "cnn6"), "Inputs of shape (8, 1, 8, 8) do not go through Sequential"),
        (("audit", "--model", "digits", "--defense", "prior", "--strength", "-1"), "`noise_ratio` must be positive"),
        (("check", "missing.safetensors", "--model", "digits"), "There is no gradient file"),
        (("rank", "--model", "digits", "--input-shape", "a,b"), "`--input-shape` must be positive integers"),
        (("rank", "--model", "gradguard.zoo.models:digits_convnet"), "`--input-shape` is needed"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pickle_is_refused(model_file, tmp_path):
    path = tmp_path / "gradient.pt"
    torch.save({"a": torch.zeros(1)}, path)
    result = run("check", path, "--model", model_file, "--json")
    assert result.exit_code == 2
    assert "not a safetensors file" in json.loads(result.stdout)["error"]


def test_the_module_runs_as_a_program():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "gradguard", "--version"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0
    assert "0.1.0" in done.stdout


# ---------------------------------------------------------------------- a whole data set


def test_audit_of_a_whole_data_set(model_file, tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, images=(digits().images[:30, 0].numpy() * 255).astype("uint8"), labels=digits().labels[:30].numpy())
    out = tmp_path / "out"
    arguments = ("audit", "--model", model_file, "--data", path, "--output", out)
    first = run(*arguments, "--examples", 20, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert (found["count"], found["measure"], len(found["examples"]["lambda_max"])) == (20, "lower_bound", 20)
    assert {p.name for p in out.iterdir()} == {"index.html", "survey.png", "survey.json", "survey.safetensors"}
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in out.iterdir())
    everything = run(*arguments, "--all")
    assert everything.exit_code == 0, everything.output
    assert "is the most exposed" in everything.stdout
    kept = json.loads((out / "survey.json").read_text())
    assert kept["count"] == 30
    assert kept["examples"]["lower_bound"][:20] == found["examples"]["lower_bound"]
    other = run(*arguments, "--all", "--seed", 1)
    assert other.exit_code == 2
    assert "of another survey: seed 0 there, 1 here" in other.stderr


def test_audit_of_a_whole_data_set_under_a_defense(model_file):
    result = run("audit", "--model", model_file, "--examples", 3, "--exact", "--defense", "prior", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["defense"].startswith("PriorNoise(")
    assert found["measure"] == "predicted_error"


def test_a_stopped_audit_says_how_to_go_on(model_file, tmp_path, monkeypatch):
    arguments = ("audit", "--model", model_file, "--examples", 20, "--batch-size", 8, "--output", tmp_path, "--json")
    plain = LossGradient.check_batch
    calls = []

    def stopping(self, inputs, targets):
        calls.append(len(inputs))
        if len(calls) == 6:  # each chunk is checked before the first is measured, and again when its turn comes
            raise KeyboardInterrupt
        plain(self, inputs, targets)

    monkeypatch.setattr(LossGradient, "check_batch", stopping)
    stopped = run(*arguments)
    monkeypatch.undo()
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert calls == [8, 8, 4, 8, 8, 4]
    continued = run(*arguments)
    fresh = run(*arguments[:-3], "--output", tmp_path / "fresh", "--json")
    assert continued.exit_code == fresh.exit_code == 0
    assert json.loads(continued.stdout)["examples"] == json.loads(fresh.stdout)["examples"]


def test_a_folder_of_pictures_as_data(model_file, tmp_path):
    from PIL import Image

    for index, label in enumerate(digits().labels[:6].tolist()):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        picture = (digits().images[index, 0] * 255).to(torch.uint8).numpy()
        Image.fromarray(picture).resize((16, 16)).save(tmp_path / "data" / str(label) / "a.png")
    data = ("--data", tmp_path / "data", "--input-shape", "1,8,8")
    surveyed = run("audit", "--model", model_file, *data, "--all", "--json")
    assert surveyed.exit_code == 0, surveyed.output
    assert json.loads(surveyed.stdout)["examples"]["label"] == [0, 1, 2, 3, 4, 5]
    audited = run("audit", "--model", model_file, *data, *QUICK, "--json")
    assert json.loads(audited.stdout)["labels"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--all", "--examples", "3"), "Give `--all` or `--examples 3`, not both"),
        (("--exact",), "`--exact` goes with --all or --examples"),
        (("--all", "--data", "."), "one sub-folder per class"),
    ],
)
def test_bad_usage_of_a_survey(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("audit", "--model", "digits", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
