import math

import pytest
import torch

from gradguard import InputError
from gradguard.leakage import fidelity, mean_picture_psnr


def test_psnr_is_its_formula(digit_pictures):
    truth = digit_pictures.images[:3]
    noisy = (truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = fidelity(noisy, truth)
    mse = (noisy.double() - truth.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(found.mse, mse)
    torch.testing.assert_close(found.psnr, -10 * mse.log10())


def test_reconstructions_are_assigned_to_the_examples_they_show(digit_pictures):
    truth = digit_pictures.images[:5]
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = truth[order] + 0.01
    found = fidelity(shuffled, truth)
    assert torch.equal(order[found.assignment], torch.arange(5))
    # Shifted by 0.01, which clamping takes back where a digit is white.
    assert (found.psnr >= 40 - 1e-4).all()
    assert (found.matched - truth.double()).abs().max() <= 0.01 + 1e-6


def test_identical_pictures(digit_pictures):
    found = fidelity(digit_pictures.images[:2], digit_pictures.images[:2])
    assert (found.ssim > 1 - 1e-6).all()
    assert (found.psnr > 100).all()


def test_ssim_falls_with_noise_and_is_nan_without_pictures(digit_pictures):
    truth = torch.nn.functional.interpolate(digit_pictures.images[:1], size=(32, 32), mode="bilinear")
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    little, much = (fidelity(truth + s * noise, truth).ssim.item() for s in (0.05, 0.5))
    assert 1 > little > much
    assert math.isnan(fidelity(torch.rand(2, 7), torch.rand(2, 7)).ssim[0])


def test_an_attack_that_ended_in_nan_scores_as_grey(digit_pictures):
    truth = digit_pictures.images[:1]
    found = fidelity(torch.full_like(truth, float("nan")), truth)
    torch.testing.assert_close(found.mse, (0.5 - truth.double()).square().mean()[None])


def test_value_range(digit_pictures):
    truth = 2 * digit_pictures.images[:1] - 1
    guess = truth.clone()
    guess[0, 0, 0, 0] += 0.8
    assert fidelity(guess, truth, value_range=(-1, 1)).psnr.item() == pytest.approx(
        20 * math.log10(2) - 10 * math.log10(0.64 / 64), abs=1e-4
    )


def test_errors(digit_pictures):
    with pytest.raises(InputError, match=r"shape \(1, 1, 8, 8\), `truth` \(2, 1, 8, 8\)"):
        fidelity(digit_pictures.images[:1], digit_pictures.images[:2])
    with pytest.raises(InputError, match="low < high"):
        fidelity(digit_pictures.images[:1], digit_pictures.images[:1], value_range=(1, 0))


def test_a_perceptual_distance_gets_matched_pictures_in_0_1():
    truth = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    swapped = truth.flip(0) + 0.1
    seen = []

    def distance(one, other):
        seen.append((one, other))
        return (one - other).abs().mean()

    found = fidelity(swapped, truth, value_range=(-1, 1), perceptual=distance)
    for one, other in seen:
        assert one.shape == (1, 1, 8, 8)
        assert 0 <= one.min() <= one.max() <= 1
        assert 0 <= other.min() <= other.max() <= 1
    assert found.perceptual.shape == (2,)
    assert (found.perceptual < 0.051).all()
    assert fidelity(swapped, truth).perceptual is None


def test_the_mean_picture_is_the_attacker_without_a_gradient():
    pictures = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = fidelity(pictures.mean(0, keepdim=True).expand(3, -1, -1, -1), truth)
    torch.testing.assert_close(mean_picture_psnr(truth, pictures), expected.psnr, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="`pictures` must be"):
        mean_picture_psnr(truth, pictures[:, 0])
