"""The precision that derivatives of derivatives need: the dtype that was asked for, and no faster one in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, no TF32 and no inference mode inside, whatever surrounds it; also a decorator.

    A training loop's mixed precision would round products with the Jacobian to bfloat16, and PyTorch lets cuDNN round
    float32 convolutions to TF32 by default: errors of percents and of 1e-3, where influence is made of eigenvalues that
    are 1e-6 of the largest.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.backends.cudnn.is_available() and torch.backends.cudnn.allow_tf32:
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
            torch.backends.cudnn.allow_tf32 = False
        if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
            stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", True)
            torch.backends.cuda.matmul.allow_tf32 = False
        yield
