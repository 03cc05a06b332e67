"""The ops of a graph by what they do."""

from __future__ import annotations

import math

import torch
from torch import fx

from qsweep.hub.nodes import arguments
from qsweep.hub.ops import QUICK_GELU

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
NORMS = {aten.batch_norm.default}
BINARY = {aten.add.Tensor, aten.mul.Tensor}
"""Sums and products of two values, element by element."""
POOLS = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default}
NEAREST = aten.upsample_nearest2d.vec
REARRANGED = {
    aten.pixel_shuffle.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
}
"""Ops that give some of the values that they read, each once, elsewhere."""
SAME_GRID = REARRANGED | {aten.max_pool2d.default, NEAREST, aten.pad.default, aten.cat.default}
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


def pool_count(node: fx.Node, height: int, width: int) -> int | None:
    """Elements that each output of a pool over (B, C, height, width) averages; None where their number differs."""
    given = arguments(node)
    if node.target is aten.adaptive_avg_pool2d.default:
        return height * width if list(given["output_size"]) == [1, 1] else None
    uneven = given["ceil_mode"] or (any(given["padding"] or [0]) and not given["count_include_pad"])
    down, across = (*given["kernel_size"], *given["kernel_size"])[:2]
    return None if uneven or given["divisor_override"] is not None else int(down * across)
