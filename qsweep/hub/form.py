"""The hub form: what every quantization method leaves and every engine reads.

An ATen graph of the model in inference form, batch norm folded, in which `quantized_decomposed.quantize_per_tensor` and
`dequantize_per_tensor` (integer container, `quant_min` and `quant_max` of the bit width) stand on activations and
`dequantize_per_channel` on constant int8 weights; `qsweep.hub.weights` has the other ways of storing weights. Biases
beside integer activations are float32 multiples of their accumulator's step. Where each batch sets its own grids,
`qsweep.quantize_dynamic` or `quantize_rows` stands on what layers read, and all else stays in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from qsweep.hub.macs import counted
from qsweep.hub.ops import (
    DEQUANTIZE_GROUPS,
    DEQUANTIZE_WEIGHT,
    LOOK_UP,
    QUANTIZE_DYNAMIC,
    QUANTIZE_ROWS,
    QUICK_GELU,
    STORED,
)

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed

QUANTIZE = quantized.quantize_per_tensor.default
DEQUANTIZE = quantized.dequantize_per_tensor.default

NAMESPACES = ("aten", "quantized_decomposed", "qsweep")
"""Of the ops that a graph may call: nothing else is looked up when one is loaded."""
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default}
LINEARS = {aten.linear.default}
COMPUTE = CONVOLUTIONS | LINEARS
"""Ops that multiply activations (argument 0) by a weight (argument 1) and add a bias (argument 2)."""
EMBEDDING = aten.embedding.default
"""Looks rows up in a table (argument 0)."""
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
GATED = {aten.lstm.input, aten.gru.input}
"""Recurrent layers (parameters: argument 2) whose weights are stored in few bits and made real to compute with."""
RECURRENT = GATED | {aten.rnn_tanh.input, aten.rnn_relu.input}
"""In floating point everywhere; the only ops that give several tensors."""
SIZE = aten.sym_size.int
"""A number that depends on the batch."""
BINARY = {aten.add.Tensor, aten.mul.Tensor}
"""Sums and products of two values, element by element."""
POOLS = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default}
NEAREST = aten.upsample_nearest2d.vec
SAME_GRID = {
    aten.max_pool2d.default,
    NEAREST,
    aten.pixel_shuffle.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.pad.default,
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.cat.default,
}
"""Ops that only move or select values, see `keeps_grid`."""
RECTIFIERS = {aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default}
POINTWISE = {
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.mish.default,
    aten.softplus.default,
    QUICK_GELU,
}
"""Functions of one number: of integers they are tables, computed in float64."""


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
        nodes = [node for node in nodes_of(self.graph, COMPUTE) if constant(self.graph, node.args[1]) is not None]
        return [self._layer(node, node.meta["tensor_meta"].shape) for node in nodes]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample, whatever op they are in: those of layers, of products of two activations,
        of transposed convolutions."""
        with torch.no_grad():
            return counted(lambda: self.graph(self.example))[1] // len(self.example)

    def layer_bits(self) -> dict[str, int]:
        """Bits of the weights of each layer, and of tables and recurrent layers that have few, by name, as stored."""
        return {layer.name: layer.weight_bits for layer in self.layers()} | stored_bits(self.graph)

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


def nodes_of(graph: fx.GraphModule, targets: Collection[Any]) -> list[fx.Node]:
    """The nodes that call one of `targets`, in order of execution."""
    return [node for node in graph.graph.nodes if node.target in targets]


def reached(start: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """`start`, what is near it, and so on."""
    found = set(start)
    ends = [*found]
    while ends:
        new = set(near(ends.pop())) - found
        ends += new
        found |= new
    return found


def is_real(node: fx.Node) -> bool:
    """Whether it is a tensor of real numbers, no indices or masks, as ShapeProp has seen it."""
    meta = node.meta.get("tensor_meta")
    return isinstance(meta, TensorMetadata) and meta.dtype.is_floating_point


def source(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that gives `node` its argument `index`."""
    return cast(fx.Node, node.args[index])


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
    return {str(source(node, 2).target) for node in nodes_of(graph, {DEQUANTIZE_WEIGHT})}


def keeps_grid(node: fx.Node) -> bool:
    """Whether the output of `node` stays on the grid of its inputs, which must all be on one."""
    if node.target is aten.pad.default:
        given = arguments(node)
        return given["mode"] == "constant" and not given["value"]
    return node.target in SAME_GRID


def rectified(node: fx.Node) -> tuple[float, float]:
    """Between which real values a node of RECTIFIERS leaves its input."""
    given = arguments(node)
    if node.target is aten.hardtanh.default:
        return float(given["min_val"]), float(given["max_val"])
    if node.target is aten.clamp.default:
        low, high = given["min"], given["max"]
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return 0.0, 6.0 if node.target is aten.relu6.default else math.inf


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of its op's schema, defaults filled in."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    return {argument.name: argument.default_value for argument in schema.arguments} | given


def pool_count(node: fx.Node, height: int, width: int) -> int | None:
    """Elements that each output of a pool over (B, C, height, width) averages; None where their number differs."""
    given = arguments(node)
    if node.target is aten.adaptive_avg_pool2d.default:
        return height * width if list(given["output_size"]) == [1, 1] else None
    uneven = given["ceil_mode"] or (any(given["padding"] or [0]) and not given["count_include_pad"])
    down, across = (*given["kernel_size"], *given["kernel_size"])[:2]
    return None if uneven or given["divisor_override"] is not None else int(down * across)


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The constant behind `node`: that of a get_attr, or the integers of stored weights; else None."""
    if isinstance(node, fx.Node) and node.target in STORED:
        node = source(node)
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def set_constant(root: torch.nn.Module, name: str, value: Tensor, *, trainable: bool = False) -> None:
    """Put `value` at the dotted `name`, replacing what is there."""
    *path, last = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, last):
        delattr(module, last)
    if trainable:
        module.register_parameter(last, torch.nn.Parameter(value))
    else:
        module.register_buffer(last, value)


def attributes(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The constants that the graph reads, by name, each once."""
    seen = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target not in seen:
            seen.add(node.target)
            value = constant(graph, node)
            if value is not None:
                yield str(node.target), value
