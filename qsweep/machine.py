"""What this machine is, as far as figures depend on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Processor features that int8 and bf16 kernels use."""


NO_TRITON = "Triton is not installed: `pip install 'qsweep[cuda]'`"


def cpu() -> str:
    """Name of the processor."""
    return _line("model name") or platform.processor() or platform.machine()


def features() -> list[str]:
    """Those of FEATURES that the processor has."""
    flags = set((_line("flags") or _line("Features")).split())
    return [name for name in FEATURES if name in flags]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """What this machine has made once and may make again: `$XDG_CACHE_HOME/qsweep`, by default `~/.cache/qsweep`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsweep"


def pin(threads: int) -> None:
    """Keep all threads of this process on as many cores as are to be used, the last ones that may be: they do not
    wander then. Where the system cannot, nothing is done."""
    if not hasattr(os, "sched_setaffinity") or threads >= cores():
        return
    bind(sorted(os.sched_getaffinity(0))[-threads:])


def bind(numbers: Collection[int]) -> None:
    """Keep all threads of this process on the cores of these numbers."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), numbers)


def no_compiler() -> str | None:
    """Why `torch.compile` cannot work on the CPU, or None."""
    if any(shutil.which(compiler) for compiler in ("g++", "clang++")):
        return None
    return "`torch.compile` needs a C++ compiler (g++ or clang++) on the PATH"


def no_gpu() -> str | None:
    """Why there is no CUDA device that PyTorch can use, or None."""
    import torch

    if torch.version.cuda is None:
        return f"`device: cuda` needs a PyTorch built with CUDA (this one is {torch.__version__})"
    return None if torch.cuda.is_available() else "`device: cuda` needs a CUDA device (PyTorch finds none)"


def no_kernels() -> str | None:
    """Why Triton, and so `torch.compile`, cannot run kernels on the CUDA device, or None.

    Triton builds what launches them with the machine's C compiler, the first time and whenever its cache is empty;
    images of CUDA without development tools have none.
    """
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except ImportError:
        return NO_TRITON
    except Exception as error:  # of whatever type its drivers and the compiler raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"Triton cannot start, which needs a C compiler (gcc or clang) and Python's headers: {reason[:200]}"
    return None


def gpu() -> str:
    """Name of the current CUDA device, its capability and memory, empty where there is none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = torch.cuda.get_device_properties()
    return f"{found.name} (sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB)"


def use_gpu(place: int) -> None:
    """Let this process see one GPU alone, of several another for each `place` from 0 on. For a process that has not
    begun to use CUDA."""
    import torch

    count = torch.cuda._device_count_nvml()  # the public one begins with CUDA where NVML does not answer
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu_of(place, count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_of(place: int, count: int, visible: str | None) -> str:
    """What `CUDA_VISIBLE_DEVICES`, now `visible`, is to be where there are `count` GPUs."""
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[place % count].strip()


def fingerprint(device: str = "cpu") -> str:
    """Figures of equal fingerprints may be compared: processor, its features, cores, system; on `cuda` the GPU too."""
    parts = [cpu(), f"{cores()} cores", " ".join(features()), f"{platform.system()} {platform.machine()}"]
    return "; ".join([*parts, gpu()] if device == "cuda" else parts)


def _line(key: str) -> str:
    """The value of the first such line of `/proc/cpuinfo`, empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
