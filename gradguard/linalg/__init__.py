"""Krylov methods on `R` problems at once, on the device: operators, Lanczos, LSMR, CGLS."""

from gradguard.linalg.cgls import cgls
from gradguard.linalg.dense import dense_least_squares
from gradguard.linalg.lanczos import (
    Eigenpairs,
    KrylovSpace,
    extreme_eigenpairs,
    krylov_space,
    krylov_spaces,
    largest_eigenpairs,
)
from gradguard.linalg.lanczos_solve import lanczos_solve
from gradguard.linalg.largest import LargestEigenvalue, largest_eigenvalue, largest_eigenvalue_bound
from gradguard.linalg.lsmr import LeastSquares, lsmr
from gradguard.linalg.operator import LinearOperator
from gradguard.linalg.quadrature import (
    FunctionProduct,
    TraceEstimate,
    function_product,
    mean_and_error,
    random_signs,
    trace_of_function,
)
from gradguard.linalg.threads import one_thread

__all__ = [
    "Eigenpairs",
    "FunctionProduct",
    "KrylovSpace",
    "LargestEigenvalue",
    "LeastSquares",
    "LinearOperator",
    "TraceEstimate",
    "cgls",
    "dense_least_squares",
    "extreme_eigenpairs",
    "function_product",
    "krylov_space",
    "krylov_spaces",
    "lanczos_solve",
    "largest_eigenpairs",
    "largest_eigenvalue",
    "largest_eigenvalue_bound",
    "lsmr",
    "mean_and_error",
    "one_thread",
    "random_signs",
    "trace_of_function",
]
