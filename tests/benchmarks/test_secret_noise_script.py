"""The attacker of benchmarks/secret_noise.py: finds noise of a seed, and none of what has no seed."""

import pytest

from secret_noise import WAYS, removal_rows


def test_the_attacker_removes_seeded_noise_and_no_other():
    rows = removal_rows([7, 42])
    assert [(r["way"], r["noise"]) for r in rows] == [(w, k) for k in ("default", "seeded") for w in WAYS]
    for row in rows:
        assert row["residual"] == pytest.approx(1.0, abs=0.01) if row["noise"] == "default" else row["residual"] < 1e-3
