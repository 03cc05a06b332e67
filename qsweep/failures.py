"""Which of qsweep's errors an error of a library is."""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError

from qsweep.errors import BundleError, Crashed, DiskFull, OutOfMemory, QsweepError, Refused, TaskFailure, causes, why

_OF_THE_DEVICE = (
    "CUDA error",
    "CUDA driver error",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
    "Triton Error [CUDA]",
)
"""What errors say that are plain RuntimeErrors, of libraries and compilers."""


def known(error: Exception) -> QsweepError:
    """`error` where it is qsweep's own, else what it means to a sweep: no room on the disk or in memory, a device that
    is lost to this process (Crashed) or has no kernels, a task that is wrong."""
    text = str(error)
    if isinstance(error, BundleError) and error.__cause__ is not None:
        text = f"{text} {error.__cause__}"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or (isinstance(error, OSError | SafetensorError | RuntimeError) and "No space left" in text):
        return DiskFull(f"no space left for the artifact ({text})")
    for cause in causes(error):
        text = str(cause)
        if "no kernel image is available" in text:
            return Refused(f"PyTorch {torch.__version__} has no kernels for this GPU")
        broken = isinstance(cause, torch.AcceleratorError) or any(mark in text for mark in _OF_THE_DEVICE)
        short = "out of memory" in text or "ALLOC_FAILED" in text
        if isinstance(cause, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            return OutOfMemory(text)
        if "unable to find an engine" in text and _device_is_full():  # as cuDNN tells it, and of what it does not know
            return OutOfMemory(text)
        if broken:
            return OutOfMemory(text) if short else Crashed(text)
    return error if isinstance(error, QsweepError) else TaskFailure(why(error))


def _device_is_full() -> bool:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    free, total = torch.cuda.mem_get_info()
    return free < total / 10
