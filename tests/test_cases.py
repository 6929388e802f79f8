"""Right on any model, loss and batch, or refused by name; and nothing of the user's changes (`cases.py`)."""

from functools import lru_cache

import pytest

from case_runs import REFUSED, RIGHT, STEPS, Run
from cases import CASES


@lru_cache(maxsize=4)  # the steps of a case follow one another
def run_of(case):
    return Run(case)


def each(*steps):
    return [
        pytest.param(case, step, id=f"{case.name}-{step}", marks=[pytest.mark.slow] if "slow" in case.tags else [])
        for case in CASES
        for step in steps
    ]


@pytest.mark.parametrize(("case", "step"), each(*STEPS))
def test_right_or_refused_by_name(case, step):
    outcome = run_of(case).outcome(step)
    assert outcome.verdict in (RIGHT, REFUSED), f"{outcome.verdict}: {outcome.text}"


@pytest.mark.parametrize(("case", "step"), each(*STEPS))
def test_nothing_changes(case, step):
    outcome = run_of(case).outcome(step)
    assert not outcome.changed, f"changed: {outcome.changed}"
