from itertools import pairwise

import pytest
import torch

from gradguard import InputError
from gradguard.linalg import (
    LinearOperator,
    extreme_eigenpairs,
    function_product,
    krylov_spaces,
    mean_and_error,
    random_signs,
    trace_of_function,
)

SPECTRA = {
    "decaying": torch.logspace(0, -5, 40, dtype=torch.float64),
    "flat": torch.linspace(1, 0.2, 40, dtype=torch.float64),
    "rank 6": torch.cat([torch.arange(6, 0, -1), torch.zeros(34)]).double(),
}
FUNCTIONS = {
    "shrinkage": lambda x: 1 / (1 + 100 * x),
    "root": lambda x: x.clamp_min(0).sqrt(),
    "identity": lambda x: x,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(spectrum, rows=3, seed=0):
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(rows, n, n, generator=seeded(seed), dtype=torch.float64))
    return q @ torch.diag(spectrum) @ q.mT


def dense_function(matrix, function):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(function(values)) @ vectors.mT


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_products_are_those_of_the_dense_function(spectrum, function):
    matrix = symmetric(spectrum)
    v = torch.randn(3, 40, generator=seeded(1), dtype=torch.float64)
    found = function_product(LinearOperator.from_matrix(matrix), function, v, steps=40)
    expected = torch.einsum("rmn,rn->rm", dense_function(matrix, function), v)
    torch.testing.assert_close(found.product, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.quadratic, (v * expected).sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights.sum(-1), (v**2).sum(-1))
    assert found.converged.all()


def test_quadrature_is_exact_for_polynomials_up_to_twice_the_nodes():
    matrix = symmetric(SPECTRA["flat"])
    v = torch.randn(3, 40, generator=seeded(1), dtype=torch.float64)
    for power in range(10):
        found = function_product(LinearOperator.from_matrix(matrix), lambda x, p=power: x**p, v, steps=5)
        expected = torch.einsum("rm,rmn,rn->r", v, torch.linalg.matrix_power(matrix, power), v)
        torch.testing.assert_close(found.quadratic, expected, rtol=1e-10, atol=0)


def test_quadrature_of_the_inverse_rises_to_its_value():
    matrix = symmetric(SPECTRA["decaying"])
    operator, v = LinearOperator.from_matrix(matrix), torch.ones(3, 40, dtype=torch.float64)
    exact = torch.einsum("rm,rmn,rn->r", v, torch.linalg.inv(matrix), v)
    below = [function_product(operator, torch.reciprocal, v, steps=k).quadratic / exact for k in range(2, 30, 4)]
    for lower, higher in pairwise(below):
        assert (lower <= higher + 1e-9).all()
    assert (below[-1] <= 1 + 1e-6).all()


def test_the_tolerance_ends_it_early_and_running_out_is_reported():
    operator = LinearOperator.from_matrix(symmetric(SPECTRA["flat"]))
    v = torch.ones(3, 40, dtype=torch.float64)
    early = function_product(operator, torch.sqrt, v, tolerance=1e-4)
    assert early.converged.all()
    assert early.iterations < 40
    assert not function_product(operator, torch.sqrt, v, steps=2, tolerance=1e-12).converged.any()


def test_a_trace_is_within_its_standard_errors():
    matrix, function = symmetric(SPECTRA["flat"]), FUNCTIONS["shrinkage"]
    exact = torch.diagonal(dense_function(matrix, function), dim1=1, dim2=2).sum(-1)
    operator = LinearOperator.from_matrix(matrix)
    found = trace_of_function(operator, function, probes=200, steps=15, generator=seeded())
    assert ((found.value - exact).abs() < 4 * found.standard_error).all()
    torch.testing.assert_close(found.value, exact, rtol=0.03, atol=0)  # four standard errors, of 0.74%
    assert trace_of_function(operator, function, probes=2, tolerance=1e-6).converged.all()
    runs = [trace_of_function(operator, function, steps=15, generator=seeded(s)) for s in range(30)]
    off = torch.stack([(run.value - exact) / run.standard_error for run in runs])
    assert 0.6 < off.square().mean().sqrt() < 1.6


def test_float32_vectors_float64_quadrature():
    matrix = symmetric(SPECTRA["flat"])
    v = torch.ones(3, 40)
    found = function_product(LinearOperator.from_matrix(matrix.float()), FUNCTIONS["root"], v)
    expected = function_product(LinearOperator.from_matrix(matrix), FUNCTIONS["root"], v.double())
    assert found.product.dtype == torch.float32
    assert found.quadratic.dtype == torch.float64
    torch.testing.assert_close(found.quadratic, expected.quadratic, rtol=1e-5, atol=0)


def test_random_signs_and_their_mean():
    operator = LinearOperator.from_matrix(symmetric(SPECTRA["flat"]))
    signs = random_signs(operator, 5, seeded())
    assert signs.shape == (3, 5, 40)
    assert (signs.abs() == 1).all()
    assert torch.equal(signs, random_signs(operator, 5, seeded()))
    mean, error = mean_and_error(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close((mean, error), (torch.tensor([2.0]), torch.tensor([3**-0.5])))
    assert torch.isinf(mean_and_error(torch.ones(2, 1))[1]).all()


def test_krylov_spaces_grow_into_one_another():
    operator = LinearOperator.from_matrix(symmetric(SPECTRA["flat"]))
    spaces = [(s.diagonal.clone(), s.diagonal.shape[1]) for s in krylov_spaces(operator, 12, generator=seeded())]
    assert [k for _, k in spaces] == [5, 10, 12]
    torch.testing.assert_close(spaces[0][0], spaces[2][0][:, :5])


def test_both_ends_of_a_spectrum():
    matrix = symmetric(SPECTRA["flat"])
    found = extreme_eigenpairs(LinearOperator.from_matrix(matrix), 2, 3, tolerance=1e-10)
    expected = torch.linalg.eigvalsh(matrix).flip(-1)
    torch.testing.assert_close(found.values, torch.cat([expected[:, :2], expected[:, -3:]], 1), rtol=1e-8, atol=0)
    residual = torch.einsum("rmn,rkn->rkm", matrix, found.vectors) - found.values[..., None] * found.vectors
    assert residual.norm(dim=-1).max() < 1e-9
    assert found.converged.all()


def test_the_small_end_of_an_exhausted_space():
    """The identity's Krylov space has one dimension; what it has not got is not called found."""
    operator = LinearOperator.from_matrix(torch.eye(40).double().expand(3, 40, 40))
    found = extreme_eigenpairs(operator, 0, 1)
    torch.testing.assert_close(found.values, torch.ones(3, 1).double())
    assert found.converged.all()
    many = extreme_eigenpairs(operator, 0, 3)
    assert (torch.isinf(many.residual).sum(dim=1) == 2).all()
    assert not many.converged.any()


def test_bad_arguments():
    operator = LinearOperator.from_matrix(symmetric(SPECTRA["flat"]))
    with pytest.raises(InputError, match="`steps` must be at least 1, got 0"):
        function_product(operator, torch.sqrt, torch.ones(3, 40).double(), steps=0)
    with pytest.raises(InputError, match="`probes` must be at least 1, got 0"):
        trace_of_function(operator, torch.sqrt, probes=0)
