"""What `torch.onnx` writes for each op of PyTorch, read once a process.

The exporter reads it anew in every export, from the source of 800 functions: half of a small network's time. The fork
server imports this, so that no worker does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry

OPSET = 20
"""The version of ONNX's ops that is written."""
_read = ONNXRegistry.from_torchlib


@cache
def _table(*, opset_version: int) -> ONNXRegistry:
    return _read(opset_version)


@contextmanager
def table_read_once() -> Iterator[None]:
    """Within it exports share a table. Not beyond: those of a user may add to theirs."""
    own = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


_table(opset_version=OPSET)
