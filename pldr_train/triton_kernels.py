"""Where the package's own Triton kernels may run."""

from __future__ import annotations

import os

import torch

SWITCH = "PLDR_TRAIN_TRITON"
"""Environment variable; `0` keeps every run to the operations of torch."""


def capability_for_kernels(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device; None: it is no CUDA device, or the kernels are switched off."""
    if device.type != "cuda" or torch.version.hip is not None or os.environ.get(SWITCH) == "0":
        return None
    return torch.cuda.get_device_capability(device)
