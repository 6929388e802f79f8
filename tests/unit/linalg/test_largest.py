import pytest
import torch

from gradguard.linalg import LinearOperator, largest_eigenvalue, largest_eigenvalue_bound


def symmetric(spectrum, seed=0):
    """A float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.as_tensor(spectrum, dtype=torch.float64)) @ q.T


SPECTRA = {
    "decaying": [2.0**-i for i in range(60)],
    "close pair": [1.0, 0.97, *[0.5 / i for i in range(1, 59)]],
    "flat": [1 + i / 60 for i in range(60)],
    "rank one": [3.0, *[0.0] * 59],
    "zero": [0.0] * 60,
}


@pytest.fixture
def operator():
    return LinearOperator.from_matrix(torch.stack([symmetric(s) for s in SPECTRA.values()]))


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-8])
def test_it_is_surely_within_its_tolerance(operator, tolerance):
    found = largest_eigenvalue(operator, tolerance=tolerance, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([max(s) for s in SPECTRA.values()], dtype=torch.float64)
    assert found.converged.all()
    assert (found.value <= expected * (1 + 1e-12)).all()
    assert (found.upper >= expected).all()
    assert (found.upper <= (1 + tolerance) * found.value).all()


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_upper_end_is_as_sure_as_it_says(steps, warm):
    """2,000 starts at a confidence of 0.9, early, when most Ritz values are far off; a warm start is a useless one."""
    matrix = symmetric([1.0, *torch.linspace(0, 0.9, 59).tolist()])
    operator = LinearOperator.from_matrix(matrix.expand(2000, -1, -1))
    second = torch.linalg.eigh(matrix).eigenvectors[:, -2].expand(2000, -1)
    found = largest_eigenvalue(
        operator,
        confidence=0.9,
        max_iterations=steps,
        start=second if warm else None,
        generator=torch.Generator().manual_seed(0),
    )
    assert (found.value < 0.999).double().mean() > 0.5
    assert (found.upper >= 1).double().mean() > 0.9 - 3 * (0.1 * 0.9 / 2000) ** 0.5


def test_the_vector_and_its_residual(operator):
    found = largest_eigenvalue(operator, tolerance=1e-4)
    remainder = operator.matvec(found.vector) - found.value[:, None] * found.vector
    torch.testing.assert_close(torch.linalg.vector_norm(remainder, dim=-1), found.residual, rtol=1e-3, atol=1e-12)


def test_a_start_saves_steps_and_a_useless_one_does_no_harm(operator):
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    cold = largest_eigenvalue(operator, tolerance=1e-8, generator=seeds[0])
    warm, again = (
        largest_eigenvalue(operator, tolerance=1e-2, confidence=None, start=s, generator=seeds[1])
        for s in (cold.vector, None)
    )
    assert warm.iterations < again.iterations
    torch.testing.assert_close(warm.upper - warm.value, warm.residual, rtol=1e-6, atol=1e-15)
    # The second eigenvector of each: without the random part Lanczos would stay there.
    matrices = torch.stack([symmetric(s) for s in SPECTRA.values()])
    second = torch.linalg.eigh(matrices).eigenvectors[:, :, -2]
    found = largest_eigenvalue(operator, tolerance=1e-6, start=second, generator=seeds[2])
    torch.testing.assert_close(found.value[:4], cold.value[:4], rtol=1e-5, atol=0)


def test_the_callers_random_part_makes_it_repeatable(operator):
    drawn = torch.randn(5, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (largest_eigenvalue(operator, random=drawn, max_iterations=3) for _ in range(2))
    assert torch.equal(first.value, second.value)


def test_problems_that_have_ended_are_left_behind(operator):
    """With the same answers, and each product for those only that are still going."""
    sizes = []

    def restricted(matrix):
        plain = LinearOperator.from_matrix(matrix)

        def matvec(v):
            sizes.append(len(v))
            return plain.matvec(v)

        return LinearOperator(matvec, matvec, plain.shape, plain.like, lambda rows: restricted(matrix[rows]))

    matrix = torch.stack([symmetric(s) for s in SPECTRA.values()])
    drawn = torch.randn(5, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for confidence in (0.999, None):
        sizes.clear()
        alone = [
            largest_eigenvalue(LinearOperator.from_matrix(m[None]), random=d[None], confidence=confidence)
            for m, d in zip(matrix, drawn, strict=True)
        ]
        found = largest_eigenvalue(restricted(matrix), random=drawn, confidence=confidence)
        assert sizes[0] == 5
        assert sizes[-1] < 5
        assert found.converged.all()
        together = largest_eigenvalue(operator, random=drawn, confidence=confidence)
        assert (found.value <= together.value * (1 + 1e-9)).all()
        for i, one in enumerate(alone):
            # Problems end in groups: a few steps later than alone, at most.
            assert found.value[i] >= one.value[0] * (1 - 1e-9)
            assert found.upper[i] <= one.upper[0] * (1 + 1e-9)


def test_running_out_is_reported(operator):
    found = largest_eigenvalue(operator, tolerance=1e-6, max_iterations=2)
    assert found.iterations == 2
    assert found.converged.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_bound_holds_as_often_as_it_says(steps):
    """A confidence that can be counted: of 400 independent bounds at 0.9, at least 320 hold, and not all do."""
    matrix = symmetric([1.0, *[1e-3] * 20])
    operator = LinearOperator.from_matrix(matrix.expand(400, -1, -1))
    bound = largest_eigenvalue_bound(
        operator, probes=2, steps=steps, confidence=0.9, generator=torch.Generator().manual_seed(0)
    )
    share = float((bound >= 1.0).double().mean())
    assert 0.85 < share < 0.97


def test_steps_tighten_the_bound(operator):
    bounds = torch.stack([largest_eigenvalue_bound(operator, steps=s)[:4] for s in (0, 2, 8)])
    expected = torch.tensor([max(s) for s in SPECTRA.values()], dtype=torch.float64)[:4]
    assert (bounds >= expected).all()
    assert (bounds[1:] < bounds[:-1]).all()
    assert (bounds[-1] < 1.5 * expected).all()
