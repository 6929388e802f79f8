"""The frame of the benchmark scripts: bars, arguments, the environment, timings, the JSON line and the page."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import (
    Bar,
    benchmark_parser,
    command,
    environment,
    finish,
    generator,
    paired_times,
    peak_memory,
    plain,
    real_pictures,
    result_name,
    rows_table,
)
from make_readme import readme

ENVIRONMENT_KEYS = {"command", "date", "gradguard", "commit", "python", "torch", "device", "cpu_count", "threads"}


def strict(text: str) -> dict:
    """JSON as the standard has it: no NaN, no infinities."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def options(*arguments: str):
    return benchmark_parser("A test.").parse_args(arguments)


@pytest.mark.parametrize(
    ("value", "target", "sense", "holds"),
    [
        (20.0, 20.0, "at least", True),
        (19.9, 20.0, "at least", False),
        (20.0, 20.0, "at most", True),
        (20.1, 20.0, "at most", False),
        (1.0, (1.0, 2.0), "within", True),
        (2.0, (1.0, 2.0), "within", True),
        (0.99, (1.0, 2.0), "within", False),
        (2.01, (1.0, 2.0), "within", False),
        (None, 20.0, "at most", False),
        (math.nan, 20.0, "at most", False),
        (math.inf, 20.0, "at least", False),
        (-math.inf, 20.0, "at most", False),
        (np.float32(21), 20, "at least", True),
        (torch.tensor(21.0), 20, "at least", True),
    ],
)
def test_bar_holds_by_value_target_and_sense(value, target, sense, holds):
    bar = Bar("psnr", value, target, sense)
    assert bar.holds is holds
    written = strict(json.dumps(bar.to_dict(), allow_nan=False))
    assert written["holds"] is holds
    assert {"name", "value", "target", "holds"} <= set(written)


@pytest.mark.parametrize(
    ("target", "sense", "message"),
    [
        (1.0, "above", "`sense` must be"),
        (1.0, "within", r"takes `target=\(lowest, highest\)`"),
        ((1.0, 2.0), "at most", "the others one number"),
    ],
)
def test_bar_refuses_what_it_cannot_judge(target, sense, message):
    with pytest.raises(ValueError, match=message):
        Bar("psnr", 1.0, target, sense)


def test_parser_gives_a_device_a_seed_and_a_folder(tmp_path, monkeypatch):
    parsed = options("--quick", "--seed", "3", "--data", str(tmp_path))
    assert (parsed.quick, parsed.json, parsed.save, parsed.seed) == (True, False, False, 3)
    assert parsed.device == torch.device("cpu")
    assert parsed.data == tmp_path

    monkeypatch.setenv("GRADGUARD_DATA", str(tmp_path))
    assert options().data == tmp_path
    monkeypatch.setenv("GRADGUARD_DATA", str(tmp_path / "missing"))
    assert options().data is None


@pytest.mark.parametrize("arguments", [("--data", "no/such/folder"), ("--device", "toaster")])
def test_parser_refuses_what_is_not_there(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        options(*arguments)
    assert error.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_real_pictures_are_loaded_or_said_to_be_missing(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=np.arange(4))
    parsed = options("--data", str(tmp_path))
    assert real_pictures(parsed, "some").images.shape == (4, 3, 8, 8)
    assert real_pictures(parsed, "other") is None
    monkeypatch.setenv("GRADGUARD_DATA", str(tmp_path / "missing"))
    assert real_pictures(options(), "some") is None
    captured = capsys.readouterr()
    assert "No other.npz" in captured.err
    assert "No some.npz" in captured.err
    assert captured.out == ""


def test_generator_follows_the_seed():
    first, again, other = (torch.rand(3, generator=generator(options("--seed", s))) for s in ("1", "1", "2"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_command_leaves_out_where_things_lie():
    arguments = ["/somewhere/benchmarks/rgap.py", "--quick", "--json", "--data", "/private", "--save", "--seed", "3"]
    assert command(arguments) == "python benchmarks/rgap.py --quick --seed 3"
    assert command(["rgap.py", "--data=/private"]) == "python benchmarks/rgap.py"


def test_environment_names_what_the_numbers_depend_on():
    found = environment(options("--quick"), ["rgap.py", "--quick"])
    assert set(found) >= ENVIRONMENT_KEYS
    assert found["torch"] == torch.__version__
    assert found["device_kind"] == "cpu"
    strict(json.dumps(found, allow_nan=False))


def test_plain_is_strict_json():
    value = {
        1: torch.tensor([1.0, math.nan]),
        "a": np.array([[1, 2]]),
        "b": (math.inf, np.float64(2.5), np.int64(3), np.bool_(True)),
        "c": Path("x"),
    }
    expected = {"1": [1.0, None], "a": [[1, 2]], "b": [None, 2.5, 3, True], "c": "x"}
    assert strict(json.dumps(plain(value), allow_nan=False)) == expected


def test_paired_times_pairs_and_takes_turns():
    calls: list[str] = []
    result = paired_times(lambda: calls.append("ours"), lambda: calls.append("reference"), repeats=3, warm_up=1)
    assert calls == ["reference", "ours", "ours", "reference", "reference", "ours", "ours", "reference"]
    assert len(result.ratios) == 3
    assert result.ratio == sorted(result.ratios)[1]
    assert result.ours > 0


def test_paired_times_needs_a_pair():
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        paired_times(int, int, repeats=0)


def test_finish_ends_with_one_object_and_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.RESULTS", tmp_path / "results")
    rows = [{"batch": 4, "psnr": 21.25}, {"batch": 8, "psnr": math.nan, "note": "diverged"}]
    figures = {"rows": rows, "ratio": 3.5}
    bars = [Bar("PSNR (dB)", 21.25, 20.0, "at least"), Bar("error", None, 1e-3, "at most")]
    result = finish(
        options("--json", "--save", "--quick"),
        figures=figures,
        bars=bars,
        tables=[rows_table("By batch", rows)],
        script="rgap",
    )
    output = capsys.readouterr().out
    last = strict(output.splitlines()[-1])
    assert last == result
    assert set(last) == {"figures", "bars", "environment"}
    assert [bar["holds"] for bar in last["bars"]] == [True, False]
    assert last["figures"]["rows"][1]["psnr"] is None
    assert "By batch" in output
    assert "diverged" in output
    kept = tmp_path / "results" / result_name("rgap", quick=True, device=torch.device("cpu"))
    assert kept.name == "rgap-quick-cpu.json"
    assert strict(kept.read_text()) == last


def test_without_json_no_object_is_printed(capsys):
    finish(options(), figures={"ratio": 3.5}, script="rgap")
    assert "{" not in capsys.readouterr().out


def test_a_script_runs_from_anywhere(tmp_path):
    """The frame in the module's docstring, as a script of its own."""
    folder = Path(sys.modules["common"].__file__).parent
    script = tmp_path / "trial.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(folder)!r})\n"
        "from common import Bar, benchmark_parser, finish\n"
        "finish(benchmark_parser('Trial.').parse_args(), figures={'a': 1}, bars=[Bar('a', 1, 1, 'at most')])\n"
    )
    run = subprocess.run([sys.executable, script, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert strict(run.stdout.splitlines()[-1])["bars"][0]["holds"] is True


def test_readme_has_a_section_per_script_and_is_deterministic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.RESULTS", tmp_path / "results")
    for script in ("zebra", "apple"):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", "--quick", "--save"])
        (tmp_path / f"{script}.py").write_text(f'"""What {script} measures.\n\nMore."""\n')
        finish(
            options("--save", "--quick"),
            figures={"rows": [{"batch": 4, "name": "a|b"}], "ratio": 2.0, "curve": [1, 2, 3]},
            bars=[Bar("ratio", 2.0, (1, 3), "within"), Bar("error", 2.0, 1.0, "at most")],
        )
    capsys.readouterr()
    results = list((tmp_path / "results").glob("*.json"))
    page = readme(results, scripts=tmp_path)
    assert page == readme(reversed(results), scripts=tmp_path)
    assert page.index("## apple") < page.index("## zebra")
    assert "What apple measures." in page
    assert "More." not in page
    assert "python benchmarks/zebra.py --quick\n" in page
    assert "| ratio | 2 | within 1 to 3 | yes |" in page
    assert "| error | 2 | at most 1 | **no** |" in page
    assert "| 4 | a\\|b |" in page
    assert "curve" not in page


def test_readme_without_results_says_so(tmp_path):
    assert "No results are kept yet." in readme([], scripts=tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_peak_memory_counts_what_is_freed_again_and_not_what_was_there_before():
    held = torch.ones(2**24)  # 64 MiB
    assert peak_memory(lambda: None) < 8
    assert 100 < peak_memory(lambda: torch.ones(2**25).sum()) < 160  # 128 MiB, gone after the sum
    assert held.sum() == 2**24
