"""Right on any model, loss and batch, or refused by name; and nothing of the user's changes (`cases.py`).

A test per case and public call, and one per case that looks at what the calls have changed.
"""

from functools import lru_cache

import pytest

from case_runs import REFUSED, RIGHT, STEPS, Run
from cases import CASES


@lru_cache(maxsize=4)  # the calls of a case follow one another
def run_of(case):
    return Run(case)


def each():
    for case in CASES:
        marks = [pytest.mark.slow] if "slow" in case.tags else []
        for promise in (*STEPS, "nothing changes"):
            yield pytest.param(case, promise, id=f"{case.name}-{promise}", marks=marks)


@pytest.mark.parametrize(("case", "promise"), each())
def test_case(case, promise):
    run = run_of(case)
    if promise == "nothing changes":
        changed = {step: run.outcome(step).changed for step in STEPS if run.outcome(step).changed}
        assert not changed, f"changed: {changed}"
    else:
        outcome = run.outcome(promise)
        assert outcome.verdict in (RIGHT, REFUSED), f"{outcome.verdict}: {outcome.text}"


def test_enough_cases_and_few_refusals():
    assert len(CASES) >= 90
    assert sum(1 for case in CASES if case.refused) <= 25
