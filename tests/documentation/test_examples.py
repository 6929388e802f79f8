"""Every script in `examples/` runs, from an empty folder, and says something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

#: What a reader looks for in the output.
SAYS = {
    "check_before_sending": ["round 0: perturb", "round 5: "],
    "compare_defenses": ["none", "PriorNoise", "test accuracy"],
    "fairness": ["is the most exposed", "over single examples the factor is"],
    "federated_update": ["guesses it (0.05)", "takes the update for a gradient"],
    "floors": ["any attacker", "eigenvalues are below"],
    "lightning_digits": ["lower bound", "Label recovery"],
    "text": ["names its characters", "what the attacker reads"],
}


def test_every_example_is_known_here():
    assert {script.stem for script in SCRIPTS} == set(SAYS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_example_runs(script, tmp_path):
    environment = {
        **os.environ,
        "MPLBACKEND": "Agg",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    run = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{script.name}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    assert not [phrase for phrase in SAYS[script.stem] if phrase not in run.stdout], run.stdout
