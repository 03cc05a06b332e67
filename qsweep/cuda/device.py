"""Whether a device can run the kernels."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from qsweep.machine import NO_TRITON, no_kernels

OLDEST = (8, 0)
"""Compute capability from which on there are matrix instructions for int8 that the kernels compile to."""


def refusal(device: torch.device | str = "cuda") -> str | None:
    """Why the kernels cannot run on `device`, or None. The CPU can, slowly, where Triton interprets its kernels
    (`TRITON_INTERPRET=1`)."""
    device = torch.device(device)
    if find_spec("triton") is None:
        return NO_TRITON
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "its kernels need a CUDA device (got `cpu`)"
    if torch.version.cuda is None:
        return f"it needs a PyTorch built with CUDA (this one is {torch.__version__})"
    if not torch.cuda.is_available():
        return "it needs a CUDA device (PyTorch finds none)"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 8.0 (Ampere) or newer: {name} has {found[0]}.{found[1]}"
    return no_kernels()
