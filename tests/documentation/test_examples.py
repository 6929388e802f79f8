"""Every script in `examples/` runs, from an empty folder, and says something."""

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
def test_example_runs(script, run_script):
    printed = run_script(script)
    assert not [phrase for phrase in SAYS[script.stem] if phrase not in printed], printed
