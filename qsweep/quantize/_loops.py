"""Fake quantization on the CPU in one pass forward and one back: `_loops.c`, compiled when it is first needed.

PyTorch's ops take four passes over an activation forward and three back. The loops are compiled in 0.5 s and kept in
`$XDG_CACHE_HOME/qsweep`; where there is no C compiler, plain ops do the same. They run on the threads of PyTorch's own
ops, which spin between two of these: threads beside them took half as long again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qsweep.machine import fingerprint

BLOCK = 2048
"""Elements of which each sum is one of; that of `_loops.c`."""
_SMALL = 2**14
"""Elements under which plain ops, which are called with less ado, are as quick."""
_SOURCE = Path(__file__).with_name("_loops.c")
_FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_POINTER, _COUNT, _NUMBER, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "round_to_grid": [_POINTER] * 2 + [_COUNT, _FLAG] + [_NUMBER] * 4 + [_FLAG],
    "step_backward": [_POINTER] * 5 + [_COUNT, _FLAG] + [_NUMBER] * 5 + [_FLAG] * 2,
    "clip_backward": [_POINTER] * 5 + [_COUNT, _FLAG] + [_NUMBER] * 2,
}


def takes(values: Tensor, scale: Tensor, bottom: float | Tensor) -> bool:
    """Whether the loops are for these: many float32 or bf16 values, and numbers as scale and bottom."""
    if values.dtype not in (torch.float32, torch.bfloat16) or values.numel() < _SMALL:
        return False
    numbers = [scale, bottom] if isinstance(bottom, Tensor) else [scale]
    fits = all(number.dim() == 0 and number.dtype is torch.float32 for number in numbers)
    return fits and _library(values.dtype) is not None


def on_grid(values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float) -> Tensor:
    """See `Kernels`."""
    outputs, (inverse, size) = torch.empty_like(values), _scales(scale)
    given = (inverse, size, float(bottom), float(steps), isinstance(bottom, Tensor))
    _run("round_to_grid", (values, outputs), given)
    return outputs


def step_backward(
    gradient: Tensor,
    values: Tensor,
    scale: Tensor,
    bottom: float | Tensor,
    steps: float,
    margins: tuple[float, float],
    *,
    sums: bool,
    offset: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `Kernels`."""
    passed = torch.empty_like(values)
    step, beyond = (_sums(values) if wanted else None for wanted in (sums, offset))
    given = (_scales(scale)[0], float(bottom), float(steps), *margins, isinstance(bottom, Tensor), offset)
    _run("step_backward", (gradient, values, passed, step, beyond), given)
    return passed, step if step is None else step.sum(), beyond if beyond is None else beyond.sum()


def clip_backward(
    gradient: Tensor, values: Tensor, low: Tensor, high: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `Kernels`."""
    passed = torch.empty_like(values)
    lowered, raised = (_sums(values) if sums else None for _ in range(2))
    given = (low.to(values.dtype).item(), (1 / (high - low)).item())  # PyTorch subtracts in the type of the values
    _run("clip_backward", (gradient, values, passed, lowered, raised), given)
    return passed, lowered if lowered is None else lowered.sum(), raised if raised is None else raised.sum()


def _scales(scale: Tensor) -> tuple[float, float]:
    """1 / scale as PyTorch has it, and the scale."""
    return (1 / scale).item(), scale.item()


def _sums(values: Tensor) -> Tensor:
    return torch.empty(-(-values.numel() // BLOCK), dtype=torch.float32)


def _run(name: str, tensors: tuple[Tensor | None, ...], given: tuple[float, ...]) -> None:
    """Call `name` for all elements of the first tensor, on as many threads as PyTorch's ops would use."""
    first = tensors[0]
    assert first is not None
    call: Callable[..., None] = getattr(_library(first.dtype), name)
    threads = max(1, min(torch.get_num_threads(), first.numel() // _SMALL))
    call(*(t if t is None else t.data_ptr() for t in tensors), first.numel(), threads, *given)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loops for values of `dtype`; None where they cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    pool = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))[:1]  # PyTorch's own, if it brings one
    flags = [*_FLAGS, *(["-DBF16"] if dtype is torch.bfloat16 else [])]
    content = repr((_SOURCE.read_text(), flags, os.path.realpath(compiler), fingerprint(), *map(str, pool)))
    name = f"loops-{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qsweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                built = Path(place) / name
                subprocess.run(
                    [compiler, *flags, str(_SOURCE), *map(str, pool), "-o", str(built), "-lm"],
                    check=True,
                    capture_output=True,
                )
                os.replace(built, folder / name)
        library = ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.CalledProcessError):
        return None
    for function, arguments in _ARGUMENTS.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    return library
