"""Krylov methods on `R` problems at once, on the device: operators, Lanczos, LSMR, CGLS."""

from gradguard.linalg.cgls import cgls
from gradguard.linalg.dense import dense_least_squares
from gradguard.linalg.lanczos import Eigenpairs, KrylovSpace, krylov_space, largest_eigenpairs
from gradguard.linalg.lsmr import LeastSquares, lsmr
from gradguard.linalg.operator import LinearOperator
from gradguard.linalg.threads import one_thread

__all__ = [
    "Eigenpairs",
    "KrylovSpace",
    "LeastSquares",
    "LinearOperator",
    "cgls",
    "dense_least_squares",
    "krylov_space",
    "largest_eigenpairs",
    "lsmr",
    "one_thread",
]
