"""Every case of `tests/cases.py` (models, losses and batches that people have) through every public call: right
against plain double backward in float64, refused by name, wrong, or a raw error; and what each way to the products
with the Jacobian costs.

A case's verdict is the worst of its calls': gradient, `J^T u`, `J delta`, influence, a matching attack, `audit` and
`protect`. The ways are timed on one pair of products, over the fastest that works on the case.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from common import Bar, benchmark_parser, finish, rows_table, seconds
from gradguard.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from case_kinds.case import Case
from case_runs import RAW, REFUSED, RIGHT, STEPS, WRONG, Run
from cases import CASES

WAYS = ("layer by layer", "forward over reverse", "reverse over reverse")
#: From best to worst.
VERDICTS = (RIGHT, REFUSED, WRONG, RAW)


def main() -> None:
    """Run all cases."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", default="", help="only cases with this in their name or among their tags")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = [c for c in CASES if not options.only or options.only in c.name or options.only in c.tags]
    if options.quick:
        cases = [c for c in cases if "slow" not in c.tags]
    rows = [row(case, repeats=3 if options.quick else 7) for case in cases]
    counts = Counter(r["verdict"] for r in rows)
    must, may = sum(c.refused is not None for c in cases), sum(c.may_refuse is not None for c in cases)
    bars = [
        Bar("right (cases)", counts[RIGHT], len(cases) - must - may, "at least"),
        Bar("refused by name (cases)", counts[REFUSED], (must, must + may), "within"),
        Bar("wrong (cases)", counts[WRONG], 0, "at most"),
        Bar("raw error (cases)", counts[RAW], 0, "at most"),
        Bar("something of the user's changed (cases)", sum(bool(r["changed"]) for r in rows), 0, "at most"),
    ]
    times = [way_row(way, rows) for way in (*WAYS, "coupled")]
    texts = [{k: r[k] for k in ("case", "verdict", "call", "text")} for r in rows if r["verdict"] != RIGHT]
    refusals = [{"case": r["case"], "refusal": r["text"]} for r in texts if r["verdict"] == REFUSED]
    shown = ("case", "verdict", "changed", "way", *WAYS)
    tables = [
        rows_table(
            "Cases, and the time of a pair of products over the fastest way", [{k: r[k] for k in shown} for r in rows]
        ),
        rows_table("Not answered", texts),
        rows_table("The ways to the products", times),
    ]
    figures = {"summary": times, "refusals": refusals, "cases": {r["case"]: r for r in rows}}
    finish(options, figures=figures, bars=bars, tables=tables)


def row(case: Case, *, repeats: int) -> dict[str, Any]:
    """The verdict on a case, the call that it comes from, and what each way costs."""
    run = Run(case)
    outcomes = {step: run.outcome(step) for step in STEPS}
    worst = max(outcomes, key=lambda step: VERDICTS.index(outcomes[step].verdict))
    changed = sorted({c for o in outcomes.values() for c in o.changed})
    found: dict[str, Any] = {
        "case": case.name,
        "verdict": outcomes[worst].verdict,
        "call": "" if outcomes[worst].verdict == RIGHT else worst,
        "text": " ".join(outcomes[worst].text.split())[:300],
        "changed": ", ".join(changed[:3]),
        "way": None,
    }
    ways = {} if outcomes[worst].verdict != RIGHT else way_times(run, repeats)
    if ways:
        found["way"] = run.jacobian().way
    fastest = min(ways.values(), default=0.0)
    return found | {way: ways[way] / fastest if way in ways else None for way in WAYS}


def way_times(run: Run, repeats: int) -> dict[str, float]:
    """Median seconds of `J^T u` and `J delta` by each way that works here; ways take turns."""
    u, delta, jacobians = run.randn(run.reference.inputs), run.delta(), {}
    for way in WAYS:
        try:
            jacobians[way] = run.jacobian(way=way)
            pair(run, jacobians[way], u, delta)
        except (InputError, RuntimeError):  # PyTorch's own word where a way is asked for that cannot be gone
            jacobians.pop(way, None)
    times: dict[str, list[float]] = {way: [] for way in jacobians}
    for _ in range(repeats):
        for way, jacobian in jacobians.items():
            times[way].append(seconds(lambda j=jacobian: pair(run, j, u, delta))[1])
    return {way: statistics.median(t) for way, t in times.items()}


def pair(run: Run, jacobian: Any, u: torch.Tensor, delta: dict[str, torch.Tensor]) -> None:
    """One product each way."""
    with run.case.around():
        jacobian.rmatvec(u)
        jacobian.matvec(delta)


def way_row(way: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cases a way works on, on how many it is the one used, and its time over the fastest."""
    ratios = [r[way] for r in rows if r.get(way) is not None]
    return {
        "way": way,
        "works on": len(ratios),
        "used on": sum(r["way"] == way for r in rows),
        "median": statistics.median(ratios) if ratios else None,
        "largest": max(ratios, default=None),
    }


if __name__ == "__main__":
    main()
