import pytest
import torch

from gradguard.linalg import LinearOperator, krylov_space, largest_eigenpairs


def symmetric(spectrum, rows=3, seed=0):
    """`rows` matrices with the same spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    q, _ = torch.linalg.qr(torch.randn(rows, n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(spectrum) @ q.mT


SPECTRA = {
    "decaying": torch.logspace(0, -8, 40, dtype=torch.float64),
    "flat top": torch.cat([torch.ones(5), torch.full((35,), 0.5)]).double(),
    "rank 6": torch.cat([torch.arange(6, 0, -1), torch.zeros(34)]).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_largest_eigenpairs_are_eighs(spectrum):
    matrix = symmetric(spectrum)
    found = largest_eigenpairs(LinearOperator.from_matrix(matrix), 1, tolerance=1e-9)
    reference = torch.linalg.eigvalsh(matrix)[:, -1:]
    assert found.converged.all()
    torch.testing.assert_close(found.values, reference, rtol=1e-10, atol=0)
    residual = torch.einsum("rmn,rkn->rkm", matrix, found.vectors) - found.values[..., None] * found.vectors
    torch.testing.assert_close(residual.norm(dim=-1), found.residual, rtol=1e-3, atol=1e-9)


def test_several_pairs_of_a_decaying_spectrum():
    matrix = symmetric(SPECTRA["decaying"])
    found = largest_eigenpairs(LinearOperator.from_matrix(matrix), 8, tolerance=1e-9)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrix).flip(-1)[:, :8], rtol=1e-8, atol=0)


def test_a_ritz_value_is_below_the_largest_and_an_eigenvalue_is_within_the_residual():
    matrix = symmetric(torch.linspace(1, 0.9, 60, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    for steps in range(1, 12, 3):
        found = largest_eigenpairs(LinearOperator.from_matrix(matrix), 1, max_iterations=steps, tolerance=0)
        assert (found.values[:, 0] <= eigenvalues[:, -1] * (1 + 1e-14)).all()
        distance = (eigenvalues - found.values).abs().amin(dim=1)
        assert (distance <= found.residual[:, 0] + 1e-14).all()


def test_a_warm_start_needs_fewer_steps():
    operator = LinearOperator.from_matrix(symmetric(torch.linspace(1, 0, 80, dtype=torch.float64)))
    cold = largest_eigenpairs(operator, 1, tolerance=1e-8)
    warm = largest_eigenpairs(operator, 1, tolerance=1e-8, start=cold.vectors[:, 0])
    assert warm.iterations < cold.iterations


def test_running_out_of_steps_is_reported():
    operator = LinearOperator.from_matrix(symmetric(torch.linspace(1, 0.99, 80, dtype=torch.float64)))
    assert not largest_eigenpairs(operator, 1, tolerance=1e-12, max_iterations=3).converged.any()


def test_the_same_generator_gives_the_same_result():
    operator = LinearOperator.from_matrix(symmetric(SPECTRA["decaying"]))
    first, second = (krylov_space(operator, 5, generator=torch.Generator().manual_seed(3)).diagonal for _ in range(2))
    assert torch.equal(first, second)


def test_krylov_basis_is_orthonormal_and_tridiagonalises():
    matrix = symmetric(SPECTRA["decaying"])
    space = krylov_space(LinearOperator.from_matrix(matrix), 12)
    identity = torch.eye(12, dtype=torch.float64).expand(3, 12, 12)
    torch.testing.assert_close(space.basis @ space.basis.mT, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(space.basis @ matrix @ space.basis.mT, space.tridiagonal(), rtol=0, atol=1e-12)
