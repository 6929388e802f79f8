"""Models, losses and batches that people have: what gradguard must measure right, or refuse by name.

`CASES`: every case of `case_kinds`, of different names. Each must come right against `case_reference`, which uses
nothing of gradguard, or be refused as the case says.
"""

from __future__ import annotations

from case_kinds import layers, libraries, losses, mixing, structure, structures
from case_kinds.case import Case

CASES: tuple[Case, ...] = (
    *losses.CASES,
    *layers.CASES,
    *structure.CASES,
    *mixing.CASES,
    *structures.CASES,
    *libraries.CASES,
)

if len({c.name for c in CASES}) != len(CASES):
    raise ValueError("Two cases have one name.")
