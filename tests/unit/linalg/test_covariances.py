import pytest
import torch

from gradguard import InputError
from gradguard.linalg.covariances import PowerLawPrior, dct_matrix


def dense(prior, shape):
    n = int(torch.tensor(shape).prod())
    basis = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    return prior.sqrt(basis).reshape(n, n)


def test_dct_is_orthonormal():
    for n in (1, 2, 8, 13):
        matrix = dct_matrix(n, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_the_root_is_symmetric_positive_and_squares_to_the_covariance(shape):
    prior = PowerLawPrior(channel_correlation=0.8, std=0.3)
    root = dense(prior, shape)
    torch.testing.assert_close(root, root.T)
    assert torch.linalg.eigvalsh(root)[0] > 0
    covariance = root @ root
    x = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(prior.apply(x).flatten(1), x.flatten(1) @ covariance)
    assert covariance.diagonal().mean().item() == pytest.approx(0.3**2)


def test_low_frequencies_have_most_of_the_energy():
    variances = PowerLawPrior().variances(8, 8, torch.zeros((), dtype=torch.float64))
    assert variances[0, 0] / variances[1, 0] == pytest.approx(2)
    assert variances[0, 0] / variances[3, 4] == pytest.approx(26)


def test_channels_correlate_as_asked():
    covariance = dense(PowerLawPrior(channel_correlation=0.7), (3, 4, 4))
    covariance = covariance @ covariance
    assert covariance[0, 16] / covariance[0, 0] == pytest.approx(0.7)


def test_inputs_that_are_no_pictures_are_independent():
    x = torch.randn(3, 7)
    torch.testing.assert_close(PowerLawPrior(std=0.5).sqrt(x), 0.5 * x)


def test_a_prior_draw_looks_more_like_digits_than_noise_does(digit_pictures):
    """Average power of real digits over frequency follows the prior's order: correlation above white noise's zero."""
    pictures = digit_pictures.images[:500].double()
    matrix = dct_matrix(8, pictures)
    power = (matrix @ (pictures - pictures.mean(0)) @ matrix.T).square().mean((0, 1)).flatten().log()
    prior = PowerLawPrior().variances(8, 8, pictures).flatten().log()
    assert torch.corrcoef(torch.stack([power, prior]))[0, 1] > 0.5


def test_errors():
    with pytest.raises(InputError, match="channel_correlation"):
        PowerLawPrior(channel_correlation=1.0)
    with pytest.raises(InputError, match="std"):
        PowerLawPrior(std=0)
