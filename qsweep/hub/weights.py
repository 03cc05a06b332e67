"""How a layer's weights are stored in the hub form, and how their real values come back.

Per output channel and symmetric is what integer kernels take: `quantized_decomposed.dequantize_per_channel`. All other
forms are ops of qsweep's own, which runtimes in floating point replace by the real weights when they load an artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, fx

from qsweep.errors import ExportFailure
from qsweep.hub.nodes import attributes, constant, set_constant
from qsweep.hub.ops import DEQUANTIZE_GROUPS, DEQUANTIZE_WEIGHT, LOOK_UP, dequantize_groups, look_up


class Stored(Protocol):
    """Weights as they are shipped."""

    def write(self, graph: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
        """Put the constants at `name` and beside it; returns the node, set in front of `before`, of the real ones."""


@dataclass(frozen=True)
class Channels:
    """Symmetric integers (int8) with a scale (C,) for each output channel."""

    integers: Tensor
    scale: Tensor
    low: int
    high: int

    def write(self, graph: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
        zero_point = torch.zeros(len(self.integers), dtype=torch.int64)
        values = {"": self.integers, "_scale": self.scale, "_zero_point": zero_point}
        rest = (0, self.low, self.high, self.integers.dtype)
        return _write(graph, name, values, before, DEQUANTIZE_WEIGHT, rest)


@dataclass(frozen=True)
class Groups:
    """Integers (int8 or int16) with scales and zero points (C, G) for G equal parts of each output channel.

    Scales are stored as float16 where that holds all of them as they are, else as float32.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def write(self, graph: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
        offsets, half = self.zero_point.to(self.integers.dtype), self.scale.half()
        scale = half if torch.equal(half.float(), self.scale) else self.scale
        values = {"": self.integers, "_scale": scale, "_offset": offsets}
        return _write(graph, name, values, before, DEQUANTIZE_GROUPS, (self.low, self.high))


@dataclass(frozen=True)
class Codebook:
    """Indices (int8, from -2^(bits-1)) into a table (1 or C, 2^bits) of float16 values, times a scale (1 or C,).

    Float16 because tables weigh: the scale leaves its ten bits to the differences between values.
    """

    integers: Tensor
    table: Tensor
    scale: Tensor
    bits: int

    def write(self, graph: fx.GraphModule, name: str, before: fx.Node) -> fx.Node:
        values = {"": self.integers, "_table": self.table, "_scale": self.scale}
        return _write(graph, name, values, before, LOOK_UP, (self.bits,))

    def real(self) -> Tensor:
        """The values (C, ...), float32."""
        return cast(Tensor, look_up(self.integers, self.table, self.scale, self.bits))


def _write(
    graph: fx.GraphModule,
    name: str,
    values: dict[str, Tensor],
    before: fx.Node,
    op: torch._ops.OpOverload,
    rest: tuple[object, ...],
) -> fx.Node:
    taken = {known for known, _ in attributes(graph)} & {f"{name}{suffix}" for suffix in values if suffix}
    if taken:
        raise ExportFailure(f"`{taken.pop()}`: must have another name, as what belongs to `{name}` is stored there")
    for suffix, value in values.items():
        set_constant(graph, f"{name}{suffix}", value)
    with graph.graph.inserting_before(before):
        parts = [graph.graph.get_attr(f"{name}{suffix}") for suffix in values]
        return graph.graph.call_function(op, (*parts, *rest))  # type: ignore[arg-type]


def real_weight(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The values (float32) that a node of STORED gives."""
    integers, second, third = (constant(graph, argument) for argument in node.args[:3])
    assert integers is not None and second is not None and third is not None
    if node.target is LOOK_UP:
        real: Tensor = look_up(integers, second, third, cast(int, node.args[3]))
    elif node.target is DEQUANTIZE_GROUPS:
        real = dequantize_groups(integers, second, third, *cast(tuple[int, int], node.args[3:5]))
    else:
        real = integers.float() * second.reshape(-1, *[1] * (integers.dim() - 1))
    return real
