"""What the tracer tells of the values of a graph."""

from __future__ import annotations

import torch
from torch import fx


def shape_of(node: fx.Node) -> list[int] | None:
    """The traced shape with -1 for the one size that depends on the batch; None where there are more, or none known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    return sizes if sizes.count(-1) <= 1 else None


def line_of(node: fx.Node) -> str:
    """The line of the model that `node` comes from, for messages; the op where it is not known."""
    return str(node.meta.get("stack_trace") or node.target).splitlines()[-1].strip()


def replace_by(node: fx.Node, new: fx.Node) -> None:
    """`new` for all that read `node`, of the same size."""
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
