import itertools

import pytest
import torch

from gradguard.linalg import LinearOperator, lanczos_solve


def problem(condition, n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    matrix = q @ torch.diag_embed(values.expand(2, n)) @ q.mT
    return matrix, torch.randn(2, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("condition", [10.0, 1e6, 1e10])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
def test_the_solution_is_the_dense_one(condition, damping):
    matrix, b = problem(condition)
    found = lanczos_solve(LinearOperator.from_matrix(matrix), b, damping=damping, tolerance=1e-14)
    expected = torch.linalg.solve(matrix + damping * torch.eye(40, dtype=b.dtype), b)
    assert found.iterations <= 40
    assert found.converged.all()
    # Rounding is amplified by the condition number.
    torch.testing.assert_close(found.solution, expected, rtol=1e-3, atol=1e-15 * condition * float(expected.norm()))


def test_a_singular_system_gets_the_least_norm():
    matrix, _ = problem(1e3)
    values, vectors = torch.linalg.eigh(matrix)
    values[:, :10] = 0
    singular = vectors @ torch.diag_embed(values) @ vectors.mT
    b = torch.einsum("rij,rj->ri", singular, torch.randn(2, 40, dtype=torch.float64))
    found = lanczos_solve(LinearOperator.from_matrix(singular), b)
    expected = torch.einsum("rij,rj->ri", torch.linalg.pinv(singular, rtol=1e-10), b)
    torch.testing.assert_close(found.solution, expected, rtol=1e-8, atol=1e-8)


def test_an_unfinished_solution_is_a_short_one():
    """So that an influence cut short is a lower bound."""
    matrix, b = problem(1e4)
    operator = LinearOperator.from_matrix(matrix)
    lengths = [lanczos_solve(operator, b, max_iterations=k).solution.norm(dim=-1) for k in (1, 3, 10, 20, 40)]
    for before, after in itertools.pairwise(lengths):
        assert (before <= after * (1 + 1e-10)).all()


def test_running_out_is_reported_and_zero_is_solved():
    matrix, b = problem(1e6)
    b[1] = 0
    found = lanczos_solve(LinearOperator.from_matrix(matrix), b, max_iterations=3)
    assert found.converged.tolist() == [False, True]
    assert torch.equal(found.solution[1], torch.zeros(40, dtype=torch.float64))
