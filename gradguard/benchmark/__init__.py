"""Side by side: defenses, by what attacks still get and what the gradient is still worth; initialisations and
architectures, by how much their gradients say.
"""

from gradguard.benchmark.grid import Comparison, ComparisonRow, compare
from gradguard.benchmark.initialisation import (
    INITIALISATIONS,
    InitialisationComparison,
    InitialisationRow,
    Initialiser,
    compare_initialisations,
)

__all__ = [
    "INITIALISATIONS",
    "Comparison",
    "ComparisonRow",
    "InitialisationComparison",
    "InitialisationRow",
    "Initialiser",
    "compare",
    "compare_initialisations",
]
