"""How close a reconstruction is to the truth: PSNR, SSIM and MSE, with the best assignment within a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gradguard.errors import InputError


@dataclass(frozen=True)
class Fidelity:
    """How close each reconstruction is, per true example and in the truth's order.

    Args:
        psnr: Shape `(B,)`, dB relative to the value range.
        ssim: Shape `(B,)`, in [-1, 1]; `nan` for inputs that are not pictures.
        mse: Shape `(B,)`, mean over elements, in input units squared.
        assignment: Shape `(B,)`: which reconstruction stands for each example.
        matched: The reconstructions in that order, shape `(B, *input_shape)`.
        perceptual: Shape `(B,)`: what the given perceptual distance says; `None` without one.
    """

    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    assignment: Tensor
    matched: Tensor
    perceptual: Tensor | None = None


def fidelity(
    reconstruction: Tensor,
    truth: Tensor,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Fidelity:
    """Score reconstructions against the true inputs.

    A gradient does not say in which order its examples came: reconstructions are assigned to examples so that the
    summed squared error is least (Hungarian algorithm). Values are clamped to `value_range` first, as an attacker
    who knows the range would. PSNR is computed in that range: pass pictures in [0, 1] pixel space, not normalised.

    Args:
        reconstruction: Shape `(B, *input_shape)`.
        truth: The same shape.
        value_range: Lowest and highest value an input can have.
        perceptual: A distance between two pictures `(1, C, H, W)` in [0, 1], for instance LPIPS by
            `torchmetrics.image.LearnedPerceptualImagePatchSimilarity(normalize=True)`, whose weights gradguard does not
            bring.

    Returns:
        One number per true example and measure.

    Raises:
        InputError: If the shapes differ, or `value_range` is empty.
    """
    # Imported here: torchmetrics loads matplotlib, which nothing else needs until something is drawn.
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if reconstruction.shape != truth.shape:
        raise InputError(f"`reconstruction` has shape {tuple(reconstruction.shape)}, `truth` {tuple(truth.shape)}.")
    low, high = value_range
    if not high > low:
        raise InputError(f"`value_range` must be (low, high) with low < high, got {value_range}.")
    guess = torch.nan_to_num(reconstruction.detach(), nan=(low + high) / 2).clamp(low, high).double().cpu()
    truth = truth.detach().double().cpu()
    pairwise = torch.cdist(truth.reshape(len(truth), -1), guess.reshape(len(guess), -1)) ** 2
    _, columns = linear_sum_assignment(pairwise.numpy())
    assignment = torch.from_numpy(columns)
    matched = guess[assignment]
    mse = (matched - truth).square().reshape(len(truth), -1).mean(dim=1)
    pairs = list(zip(matched[:, None], truth[:, None], strict=True))
    psnr = torch.stack([peak_signal_noise_ratio(g, t, data_range=high - low) for g, t in pairs])
    ssim = torch.stack([_ssim(g, t, high - low) for g, t in pairs])
    seen = None
    if perceptual is not None:
        unit = [((part.float() - low) / (high - low) for part in pair) for pair in pairs]
        with torch.no_grad():
            seen = torch.stack([torch.as_tensor(perceptual(*pair)).double().reshape(()) for pair in unit])
    return Fidelity(psnr, ssim, mse, assignment, matched, seen)


def mean_picture_psnr(truth: Tensor, pictures: Tensor, *, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """PSNR of an attacker who sees no gradient and always answers the mean picture. Compare every attack with it.

    Args:
        truth: Shape `(B, *input_shape)`.
        pictures: What the attacker knows, shape `(N, *input_shape)`; should hold none of `truth`.
        value_range: Lowest and highest value an input can have.

    Returns:
        Shape `(B,)`, in dB.

    Raises:
        InputError: If there are no pictures, or their shape is not that of `truth`.
    """
    if pictures.shape[1:] != truth.shape[1:] or not len(pictures):
        raise InputError(f"`pictures` must be (N, *input_shape), got {tuple(pictures.shape)} for {tuple(truth.shape)}.")
    guess = pictures.double().mean(0, keepdim=True).expand_as(truth)
    low, high = value_range
    mse = (guess - truth.double()).square().reshape(len(truth), -1).mean(1)
    return 10 * torch.log10((high - low) ** 2 / mse.clamp_min(torch.finfo(torch.float64).tiny))


def _ssim(guess: Tensor, truth: Tensor, span: float) -> Tensor:
    """SSIM of one picture `(1, C, H, W)` with the usual Gaussian window, smaller for pictures under 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if guess.ndim != 4 or min(guess.shape[-2:]) < 3:
        return torch.full((), float("nan"), dtype=torch.float64)
    side = min(11, min(guess.shape[-2:]))
    side -= 1 - side % 2
    value = structural_similarity_index_measure(
        guess, truth, data_range=span, gaussian_kernel=side == 11, kernel_size=side
    )
    return value if isinstance(value, Tensor) else value[0]
