"""Whether a layer's equations have one solution: by a proof where its shape gives one, else by solving for a probe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradguard.chain import LayerSystem
from gradguard.linalg.cgls import cgls

#: Part of what one open unknown would leave of a random input that rounding may leave.
_OPEN = 1e-2
#: Smallest square of `|W x| / |x|`, relative to the largest, that proves a layer: far above rounding.
_SURE = 1e-8
#: Entries of a convolution's matrices over all frequencies above which the probe is cheaper.
_MOST_ENTRIES = 2**22


def determines(system: LayerSystem, *, max_iterations: int) -> bool:
    """Whether a layer's equations have one solution, at the accuracy they are solved with: not by count, by effect.

    Duplicate filters, zero filters and pixels that no filter meets are equations by count only.
    """
    if system.layer.kind == "Linear":
        scale = system.scales[1]
        if system.gradient_constraints and scale is not None and bool(scale.any()):
            return True  # grad W = k x^T, with a k that is not zero
    elif weights_determine(system):
        return True
    return _probed(system, max_iterations)


def weights_determine(system: LayerSystem) -> bool:
    """Whether a convolution's outputs alone are proved to determine its input; `False` may be either.

    If no further position would meet a pixel, the outputs are all of the infinite convolution's that are not zero.
    With a stride `s` it is one of stride 1 on the `s^2` pictures of every `s`-th pixel, a product with a matrix
    `M(w)`, filters by pictures, at each frequency `w`. On a grid of at least as many frequencies as outputs Parseval's
    identity holds, so `|W x| >= min_w sigma_min(M(w)) |x|`.
    """
    layer, w = system.layer, system.weights
    sides = zip(layer.input_shape[1:], layer.output_shape[1:], layer.kernel, layer.stride, layer.padding, strict=True)
    complete = all(pad + s >= k and out * s - pad >= size for size, out, k, s, pad in sides)
    if not complete or not system.complete or layer.before is not None or max(layer.dilation) > 1:
        return False
    groups, filters, _ = w.shape
    (k_h, k_w), (s_h, s_w) = layer.kernel, layer.stride
    taps = (-(-k_h // s_h), -(-k_w // s_w))  # of the convolution of stride 1
    # One tap has the same matrix at every frequency.
    height, width = (1 if n == 1 else max(n, out) for n, out in zip(taps, layer.output_shape[1:], strict=True))
    pictures = layer.input_shape[0] // groups * s_h * s_w
    frequencies = height * (width // 2 + 1)  # of a real picture half are the others' conjugates
    if filters < pictures or groups * frequencies * filters * pictures > _MOST_ENTRIES:
        return False
    w = F.pad(w.reshape(groups, filters, -1, k_h, k_w), (0, taps[1] * s_w - k_w, 0, taps[0] * s_h - k_h))
    w = w.reshape(groups, filters, -1, taps[0], s_h, taps[1], s_w).permute(0, 1, 2, 4, 6, 3, 5)
    m = torch.fft.rfft2(w.reshape(groups, filters, pictures, *taps), s=(height, width)).permute(0, 3, 4, 1, 2)
    return _least_square_above(m.mH @ m, _SURE)


def _least_square_above(gram: Tensor, share: float) -> bool:
    """Whether all eigenvalues of `gram` `(..., n, n)` are above `share` times a bound of the largest."""
    largest = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max()
    if not bool(largest > 0):
        return False
    shift = share * largest * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return not bool(torch.linalg.cholesky_ex(gram - shift).info.any())


def _probed(system: LayerSystem, max_iterations: int) -> bool:
    """Whether a random input is the one solution of its own equations.

    Of `n` unknowns a single one left open shows as `1 / sqrt(n)` of its length. What is open is never found, so the
    iteration may stop as soon as less than that is missing.
    """
    operator = system.operator
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, operator.shape[2], generator=generator, dtype=torch.float64).to(operator.like)
    most = _OPEN * torch.linalg.vector_norm(v) / v.numel() ** 0.5

    def found(x: Tensor) -> bool:
        return bool(torch.linalg.vector_norm(x - v) < most)

    with torch.inference_mode():
        solved = cgls(
            operator,
            operator.matvec(v),
            column_lengths=system.column_lengths,
            tolerance=1e-10,
            max_iterations=max_iterations,
            check_every=5,
            enough=found,
        )
        return found(solved.solution)
