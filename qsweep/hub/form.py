"""The hub form: what every quantization method leaves and every engine reads.

An ATen graph of the model in inference form, batch norm folded, in which `quantized_decomposed.quantize_per_tensor` and
`dequantize_per_tensor` (integer container, `quant_min` and `quant_max` of the bit width) stand on activations and
`dequantize_per_channel` on constant int8 weights; `qsweep.hub.weights` has the other ways of storing weights. Biases
beside integer activations are float32 multiples of their accumulator's step. Where each batch sets its own grids,
`qsweep.quantize_dynamic` or `quantize_rows` stands on what layers read, and all else stays in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, GATED, QUANTIZE
from qsweep.hub.macs import counted
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.ops import (
    DEQUANTIZE_GROUPS,
    DEQUANTIZE_WEIGHT,
    LOOK_UP,
    QUANTIZE_DYNAMIC,
    QUANTIZE_ROWS,
    STORED,
)


class Grid(NamedTuple):
    """Real value = (integer - zero_point) * scale, integer from low to high."""

    scale: float
    zero_point: int
    low: int
    high: int


class RowGrid(NamedTuple):
    """Integers from low to high whose scale each row, the last dimension, sets anew: QUANTIZE_ROWS."""

    low: int
    high: int

    @classmethod
    def of(cls, bits: int) -> RowGrid:
        high = (1 << (bits - 1)) - 1
        return cls(-high, high)


class DynamicGrid(NamedTuple):
    """Integers from low to high whose scale and zero point each batch sets anew: QUANTIZE_DYNAMIC."""

    low: int
    high: int
    symmetric: bool


@dataclass(frozen=True)
class Layer:
    """A convolution or linear of the graph."""

    node: fx.Node
    name: str
    """Name of its weight, such as `layer1.0.conv1.weight`."""
    macs: int
    """Multiply-accumulates of one sample."""
    weight: Tensor
    """As stored: int8 when quantized."""
    weight_bits: int
    activation_bits: int


@dataclass(frozen=True)
class QuantizedModel:
    """The hub form of one model. A model that was not quantized has no quantize ops in its graph."""

    graph: fx.GraphModule
    """Takes and gives one tensor; the batch dimension is dynamic."""
    example: Tensor
    """Two samples as the model takes them, float32."""
    dtype: torch.dtype = torch.float32
    """Of the arithmetic that is not integer; inputs and outputs of the artifact are float32 all the same."""

    def cast_to(self, dtype: str) -> QuantizedModel:
        """The same model with weights and arithmetic in another floating-point type."""
        return replace(self, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])

    @property
    def dynamic(self) -> bool:
        """Whether ranges follow each batch: what a sample gives depends on those that it shares a batch with."""
        return bool(nodes_of(self.graph, {QUANTIZE_DYNAMIC}))

    def layers(self) -> list[Layer]:
        """Its convolutions and linears, in order of execution."""
        with torch.no_grad():
            ShapeProp(self.graph).propagate(self.example)
        return [self._layer(node, node.meta["tensor_meta"].shape) for node in layers_of(self.graph)]

    @property
    def weights_alone(self) -> bool:
        """Whether weights are quantized and nothing else is."""
        activations = {QUANTIZE, QUANTIZE_DYNAMIC, QUANTIZE_ROWS}
        return bool(nodes_of(self.graph, STORED)) and not nodes_of(self.graph, activations)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, whatever op they are in: those of layers, of products of two activations,
        of transposed convolutions."""
        with torch.no_grad():
            return counted(lambda: self.graph(self.example))[1] // len(self.example)

    def layer_bits(self) -> dict[str, int]:
        """Bits of the weights of each layer, and of tables and recurrent layers that have few, by name, as stored."""
        return {layer.name: layer.weight_bits for layer in self.layers()} | stored_bits(self.graph)

    @property
    def recurrent_weights(self) -> list[str]:
        """Names of the weights of LSTMs and GRUs."""
        return [str(given.target) for _, given in gated_weights(self.graph)]

    def _layer(self, node: fx.Node, shape: torch.Size) -> Layer:
        given, stored = source(node), source(node, 1)
        weight_bits = input_bits = 8 * self.dtype.itemsize
        if stored.target in STORED:
            weight_bits = weight_bits_of(stored)
            stored = source(stored)
        if given.target is DEQUANTIZE:
            grid = grid_of(given)
            input_bits = (grid.high - grid.low).bit_length()
        elif given.target in (QUANTIZE_DYNAMIC, QUANTIZE_ROWS):
            input_bits = (cast(int, given.args[2]) - cast(int, given.args[1])).bit_length()
        weight = constant(self.graph, stored)
        assert weight is not None
        macs = shape.numel() * weight[0].numel() // len(self.example)
        return Layer(node, str(stored.target), macs, weight, weight_bits, input_bits)


def layers_of(graph: fx.GraphModule) -> list[fx.Node]:
    """The convolutions and linears whose weights are constants, in order of execution."""
    return [node for node in nodes_of(graph, COMPUTE) if constant(graph, node.args[1]) is not None]


def gated_weights(graph: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """LSTMs and GRUs, each with each of its weights."""
    read = [(node, given) for node in nodes_of(graph, GATED) for given in cast(Sequence[fx.Node], node.args[2])]
    return [each for each in read if (value := constant(graph, each[1])) is not None and value.dim() > 1]


def grid_of(node: fx.Node) -> Grid:
    """The grid of a quantize or dequantize node of activations."""
    return Grid(*cast(tuple[float, int, int, int], node.args[1:5]))


def weight_bits_of(node: fx.Node) -> int:
    """Bit width of the integers behind a node of STORED."""
    if node.target is LOOK_UP:
        return cast(int, node.args[3])
    low, high = (3, 4) if node.target is DEQUANTIZE_GROUPS else (4, 5)
    return (cast(int, node.args[high]) - cast(int, node.args[low])).bit_length()


def stored_bits(graph: fx.GraphModule) -> dict[str, int]:
    """Bit widths of the weights that are stored as integers, by name."""
    return {str(source(node).target): weight_bits_of(node) for node in nodes_of(graph, STORED)}


def beside_weights(graph: fx.GraphModule) -> set[str]:
    """Names of the scales, zero points and tables of stored weights: constants that are no parameters."""
    return {str(source(node, place).target) for node in nodes_of(graph, STORED) for place in (1, 2)}


def idle_zero_points(graph: fx.GraphModule) -> set[str]:
    """Names of the zero points of symmetric weights, which are all 0."""
    nodes = nodes_of(graph, {DEQUANTIZE_WEIGHT, DEQUANTIZE_GROUPS})
    found = {str(source(node, 2).target): constant(graph, node.args[2]) for node in nodes}
    return {name for name, value in found.items() if value is not None and not value.any()}
