"""What the tracer tells of the values of a graph."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]*)", line \d+, in .*\n\s*(.*)')
_TORCH = str(Path(torch.__file__).parent)


def shape_of(node: fx.Node) -> list[int] | None:
    """The traced shape with -1 for the one size that depends on the batch; None where there are more, or none known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def line_of(node: fx.Node) -> str:
    """The line of the model that `node` comes from, for messages; the op where it is not known."""
    frames = _FRAME.findall(str(node.meta.get("stack_trace")))
    own = [line for file, line in frames if not file.startswith(_TORCH)]
    return own[-1] if own else str(node.target)


def replace_by(node: fx.Node, new: fx.Node) -> None:
    """`new` for all that read `node`, of the same size."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
