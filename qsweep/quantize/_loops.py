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

from qsweep.machine import cache_folder, fingerprint

BLOCK = 2048
"""Elements of which each sum is one of; that of `_loops.c`."""
_SMALL = 2**14
"""Elements of a thread, at least."""
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


class _Layout(ctypes.Structure):
    """`layout` of `_loops.c`."""

    kept: list[Tensor]
    """What it points to."""
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("scales", ctypes.c_void_p),
        ("bottoms", ctypes.c_void_p),
        ("apart", ctypes.c_int),
    ]


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_float
_ARGUMENTS = {
    "round_to_grid": [*[_POINTER] * 3, _Layout, *[_NUMBER] * 2],
    "step_backward": [*[_POINTER] * 5, _Layout, *[_NUMBER] * 4],
    "clip_backward": [*[_POINTER] * 5, _Layout, *[_POINTER] * 2],
    "extremes": [*[_POINTER] * 2, _Layout],
}


def takes(values: Tensor) -> bool:
    """Whether there are loops for the type of `values`: where there is a compiler."""
    return _library(values.dtype) is not None


def on_grid(values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float) -> Tensor:
    """See `Kernels`."""
    outputs = torch.empty_like(values)
    _run("round_to_grid", (values, outputs, None), *_layout(values, scale, bottom), float(steps))
    return outputs


def on_grid_observed(
    values: Tensor, scale: Tensor, bottom: float | Tensor, steps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`values` on the grid of one `scale`, and their `extremes`, in one pass."""
    outputs, ends = torch.empty_like(values), torch.empty(_blocks(values.numel()), 2)
    _run("round_to_grid", (values, outputs, ends), *_layout(values, scale, bottom), float(steps))
    return outputs, ends[:, 0].amin(), ends[:, 1].amax()


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
    step, beyond = (_sums(values, scale.numel()) if wanted else None for wanted in (sums, offset))
    given = (*_layout(values, scale, bottom), float(steps), *margins)
    _run("step_backward", (gradient, values, passed, step, beyond), *given)
    return passed, None if step is None else step.sum(1).reshape(scale.shape), None if beyond is None else beyond.sum()


def clip_backward(
    gradient: Tensor, values: Tensor, low: Tensor, high: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `Kernels`."""
    passed = torch.empty_like(values)
    lowered, raised = (_sums(values, 1) if sums else None for _ in range(2))
    _run("clip_backward", (gradient, values, passed, lowered, raised), _size(values), low.data_ptr(), high.data_ptr())
    return passed, lowered if lowered is None else lowered.sum(), raised if raised is None else raised.sum()


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest of dense `values`, float32."""
    ends = torch.empty(_blocks(values.numel()), 2)
    _run("extremes", (values, ends), _size(values))
    return ends[:, 0].amin(), ends[:, 1].amax()


def _layout(values: Tensor, scale: Tensor, bottom: float | Tensor) -> tuple[_Layout, float]:
    """And `bottom`, where it is a number."""
    at, scale = _size(values, scale.numel()), scale.contiguous()
    at.scales, at.kept = scale.data_ptr(), [scale]
    if not isinstance(bottom, Tensor):
        return at, float(bottom)
    bottom = bottom.contiguous()
    at.bottoms, at.apart = bottom.data_ptr(), int(bottom.numel() > 1)
    at.kept.append(bottom)
    return at, 0.0


def _size(values: Tensor, rows: int = 1) -> _Layout:
    """On as many threads as PyTorch's ops would use."""
    threads = max(1, min(torch.get_num_threads(), values.numel() // _SMALL))
    return _Layout(rows, values.numel() // rows, threads)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _sums(values: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, _blocks(values.numel() // rows))


def _run(name: str, tensors: tuple[Tensor | None, ...], *given: _Layout | float) -> None:
    first = tensors[0]
    assert first is not None
    call: Callable[..., None] = getattr(_library(first.dtype), name)
    call(*(t if t is None else t.data_ptr() for t in tensors), *given)


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
    folder = cache_folder()
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
