import pytest
import torch

from gradguard.linalg import LinearOperator, dense_least_squares, lsmr


def problem(condition, m=60, n=25, rank=25):
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(3, m, n, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(3, n, n, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -condition, n, dtype=torch.float64)
    values[rank:] = 0
    return u @ torch.diag(values) @ v.mT, torch.randn(3, m, generator=generator, dtype=torch.float64)


def reference(matrix, b, damping):
    """The pseudo-inverse of the extended system."""
    rows, _, n = matrix.shape
    extended = torch.cat([matrix, damping * torch.eye(n, dtype=matrix.dtype).expand(rows, n, n)], dim=1)
    padded = torch.cat([b, torch.zeros(rows, n, dtype=b.dtype)], dim=1)
    return (torch.linalg.pinv(extended, rtol=1e-13) @ padded[..., None])[..., 0]


def solve(method, matrix, b, damping):
    if method == "lsmr":
        return lsmr(LinearOperator.from_matrix(matrix), b, damping=damping)
    return dense_least_squares(matrix, b, damping=damping)


@pytest.mark.parametrize("method", ["lsmr", "dense"])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("condition", "rank"), [(1, 25), (5, 25), (1, 10)])
def test_solution_is_the_pseudo_inverses(method, damping, condition, rank):
    matrix, b = problem(condition, rank=rank)
    found = solve(method, matrix, b, damping)
    expected = reference(matrix, b, damping)
    error = (found.solution - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A solution carries the condition number times rounding; so does the reference, with its damping's 1e3.
    assert (error < 10**condition * 1e-11).all()
    assert found.converged.all()


def test_lsmr_solves_consistent_systems():
    matrix, _ = problem(3)
    x = torch.randn(3, 25, dtype=torch.float64)
    found = lsmr(LinearOperator.from_matrix(matrix), torch.einsum("rmn,rn->rm", matrix, x))
    torch.testing.assert_close(found.solution, x, rtol=1e-9, atol=1e-10)


def test_lsmr_without_reorthogonalisation_gets_there_too():
    matrix, b = problem(1)
    found = lsmr(LinearOperator.from_matrix(matrix), b, reorthogonalise=False, tolerance=1e-10, max_iterations=400)
    torch.testing.assert_close(found.solution, reference(matrix, b, 0.0), rtol=1e-7, atol=1e-8)


def test_lsmr_stops_at_a_share_of_the_first_normal_equations():
    matrix, b = problem(2)
    first = (matrix.mT @ b[..., None])[..., 0].norm(dim=-1)
    shares = torch.tensor([1e-1, 1e-2, 1e-4], dtype=torch.float64)
    found = lsmr(LinearOperator.from_matrix(matrix), b, reduction=shares, check_every=1)
    left = (matrix.mT @ (b - (matrix @ found.solution[..., None])[..., 0])[..., None])[..., 0].norm(dim=-1)
    assert (left <= 1.01 * shares * first).all()
    assert (left > 1e-10 * first).all()  # and no further


def test_lsmr_reports_that_it_ran_out():
    matrix, b = problem(5)
    found = lsmr(LinearOperator.from_matrix(matrix), b, max_iterations=3, check_every=1)
    assert found.iterations == 3
    assert not found.converged.any()
    assert (found.residual > 1e-6).all()


def test_the_norm_of_the_iterates_grows_so_that_stopping_early_predicts_less():
    matrix, b = problem(4)
    norms = [lsmr(LinearOperator.from_matrix(matrix), b, max_iterations=k).solution.norm(dim=-1) for k in range(1, 25)]
    assert (torch.stack(norms).diff(dim=0) > -1e-10).all()


def test_one_problem_that_ends_early_does_not_disturb_the_others():
    matrix, b = problem(3)
    b[1] = 0
    found = lsmr(LinearOperator.from_matrix(matrix), b)
    assert torch.equal(found.solution[1], torch.zeros(25, dtype=torch.float64))
    torch.testing.assert_close(found.solution[[0, 2]], reference(matrix, b, 0.0)[[0, 2]], rtol=1e-8, atol=1e-9)


def test_per_problem_damping():
    matrix, b = problem(2)
    damping = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    expected = torch.cat([reference(matrix[r : r + 1], b[r : r + 1], damping[r]) for r in range(3)])
    for found in (
        lsmr(LinearOperator.from_matrix(matrix), b, damping=damping),
        dense_least_squares(matrix, b, damping=damping),
    ):
        torch.testing.assert_close(found.solution, expected, rtol=1e-9, atol=1e-10)
