"""CGLS against dense least squares in float64."""

import pytest
import torch

from gradguard.linalg import LinearOperator
from gradguard.linalg.cgls import cgls


def problems(rows=3, m=30, n=12, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, m, n, generator=generator, dtype=torch.float64)
    if rank is not None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values[:, rank:] = 0
        matrix = left @ torch.diag_embed(values) @ right
    return matrix, torch.randn(rows, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n", "rank"), [(30, 12, None), (8, 20, None), (30, 12, 7)])
def test_is_the_least_squares_solution_of_least_norm(m, n, rank):
    matrix, b = problems(m=m, n=n, rank=rank)
    found = cgls(LinearOperator.from_matrix(matrix), b)
    expected = (torch.linalg.pinv(matrix, rtol=1e-10) @ b[..., None])[..., 0]
    assert found.converged.all()
    assert torch.allclose(found.solution, expected, atol=1e-10)


def test_damping_is_per_problem_and_that_of_the_normal_equations():
    matrix, b = problems()
    damping = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64)
    found = cgls(LinearOperator.from_matrix(matrix), b, damping=damping)
    normal = matrix.mT @ matrix + torch.diag_embed((damping**2)[:, None].expand(3, 12))
    assert torch.allclose(found.solution, torch.linalg.solve(normal, (matrix.mT @ b[..., None])[..., 0]), atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_with_column_lengths_it_is_the_problem_with_columns_of_norm_1(damping):
    matrix, b = problems()
    matrix = matrix * torch.logspace(-3, 3, 12, dtype=torch.float64)
    lengths = matrix.norm(dim=1)
    found = cgls(LinearOperator.from_matrix(matrix), b, damping=damping, column_lengths=lengths)
    scaled = cgls(LinearOperator.from_matrix(matrix / lengths[:, None]), b, damping=damping)
    assert found.iterations == scaled.iterations <= 20
    assert torch.allclose(found.solution * lengths, scaled.solution, atol=1e-10)


def test_problems_of_different_difficulty_do_not_disturb_each_other():
    matrix, b = problems()
    matrix[1] = torch.eye(30, 12, dtype=torch.float64)  # ends after one step
    b[2] = 0  # ends at once
    together = cgls(LinearOperator.from_matrix(matrix), b)
    alone = [cgls(LinearOperator.from_matrix(matrix[[i]]), b[[i]]).solution[0] for i in range(3)]
    assert torch.allclose(together.solution, torch.stack(alone), atol=1e-12)
    assert together.solution[2].eq(0).all()


def test_running_out_of_iterations_is_reported():
    matrix, b = problems()
    found = cgls(LinearOperator.from_matrix(matrix), b, max_iterations=2)
    assert found.iterations == 2
    assert not found.converged.any()
    assert (found.residual > 1e-6).all()


def test_stops_where_the_caller_has_enough():
    matrix, b = problems(rows=1, m=60, n=40)
    seen = []

    def enough(x):
        seen.append(x.clone())
        return len(seen) == 3

    found = cgls(LinearOperator.from_matrix(matrix), b, check_every=4, enough=enough)
    assert found.iterations == 8  # asked before the first step as well
    assert not found.converged.any()
    assert torch.equal(found.solution, seen[-1])
