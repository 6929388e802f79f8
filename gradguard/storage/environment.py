"""What a number was measured with."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version

import torch


def environment(device: torch.device | str, dtype: torch.dtype) -> dict[str, str]:
    """Versions, device, dtype and date."""
    return {
        "gradguard": version("gradguard"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
    }
