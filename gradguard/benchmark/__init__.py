"""Defenses side by side: what attacks still get, and what the gradient is still worth."""

from gradguard.benchmark.grid import Comparison, ComparisonRow, compare

__all__ = ["Comparison", "ComparisonRow", "compare"]
