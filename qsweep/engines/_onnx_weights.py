"""Stored weights that floats are multiplied by, in ONNX.

Where weights alone are quantized, linears read them packed (`MatMulNBits`, an op of ONNX Runtime's that OpenVINO knows,
too), in blocks that share a scale; all others are made real when a runtime loads the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from qsweep.engines._onnx_nodes import RUNTIME, add, attribute, import_runtime, producers_of, set_nodes, stored_factor
from qsweep.hub.form import QuantizedModel, weight_bits_of
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.ops import STORED
from qsweep.hub.packing import pack

if TYPE_CHECKING:
    import onnx

PACKED_PRODUCT = "MatMulNBits"
_BLOCKS = (128, 64, 32)
"""Inputs of a linear that share a scale, as kernels take them: the more, the quicker."""
_WIDTHS = (2, 4, 8)
"""Bits that they take."""
_IN_INTEGERS = 4
"""The `accuracy_level` of quick kernels: they round what they multiply, block by block, to 8 bits."""
_ROUNDED = 1e-4
"""Of the largest result: floats are two orders of magnitude below, 8 bits one above."""


def with_real_weights(content: onnx.ModelProto, model: QuantizedModel) -> None:
    """Spell out, in place, the DequantizeLinear of tables, and of all stored weights where `model` has no others:
    packed products for linears, and ops that a runtime computes when it loads the model.

    (A DequantizeLinear it would compute in every call, for all rows of a table.)
    """
    stored = {str(source(node).target): node for node in nodes_of(model.graph, STORED)}
    alone, producers = model.weights_alone, producers_of(content)
    tables = {node.input[0] for node in content.graph.node if node.op_type in ("Gather", "Slice")}
    nodes: list[onnx.NodeProto] = []
    for node in content.graph.node:
        if alone and (found := stored_factor(node, producers)) and _block_of(model.graph, stored[found[0]]):
            nodes += _packed(model.graph, node, stored[found[0]])
        elif _is_stored(node, stored) and (alone or node.output[0] in tables):
            nodes += _real(content, node, model.graph, stored[node.input[0]])
        else:
            nodes.append(node)
    set_nodes(content, nodes)
    if any(node.op_type == PACKED_PRODUCT for node in nodes):
        import_runtime(content)


def _is_stored(node: onnx.NodeProto, stored: dict[str, fx.Node]) -> bool:
    return node.op_type == "DequantizeLinear" and node.input[0] in stored


def _group_of(graph: fx.GraphModule, stored: fx.Node) -> tuple[Tensor, int]:
    """The integers, and how many of a channel share a scale."""
    integers, scale = constant(graph, stored), constant(graph, stored.args[1])
    assert integers is not None and scale is not None
    return integers, integers[0].numel() * len(scale) // scale.numel()


def _names(graph: fx.GraphModule, stored: fx.Node) -> list[str]:
    """Of the integers, their scales and, where they are not all 0, their zero points."""
    offsets = constant(graph, stored.args[2])
    parts = 3 if offsets is not None and offsets.any() else 2
    return [str(source(stored, place).target) for place in range(parts)]


def _block_of(graph: fx.GraphModule, stored: fx.Node) -> int | None:
    """The block size in which a linear with these weights is a packed product; None: it is none."""
    integers, group = _group_of(graph, stored)
    if weight_bits_of(stored) > max(_WIDTHS):
        return None
    fitting = [block for block in _BLOCKS if group % block == 0]
    # with one scale a channel the last block may reach past the end
    return fitting[0] if fitting else min(_BLOCKS) if group == integers.shape[1] else None


def _packed(graph: fx.GraphModule, node: onnx.NodeProto, stored: fx.Node) -> list[onnx.NodeProto]:
    """`node` as a product that reads packed weights, for `pack_weights`, and its bias."""
    from onnx import helper

    (count, depth), block = _group_of(graph, stored)[0].shape, _block_of(graph, stored)
    weights = _names(graph, stored)
    result, biased = node.output[0], len(node.input) > 2
    product = f"{result}.product" if biased else result
    about: dict[str, Any] = {
        "K": depth,
        "N": count,
        "bits": min(width for width in _WIDTHS if width >= weight_bits_of(stored)),
        "block_size": block,
        "accuracy_level": _IN_INTEGERS,
    }
    given = [node.input[0], *weights]
    found = [helper.make_node(PACKED_PRODUCT, given, [product], name=node.name, domain=RUNTIME, **about)]
    return [*found, helper.make_node("Add", [product, node.input[2]], [result], name=result)] if biased else found


def _real(
    content: onnx.ModelProto, node: onnx.NodeProto, graph: fx.GraphModule, stored: fx.Node
) -> list[onnx.NodeProto]:
    """(q - offset) * scale of each group of a channel, in place of `node`."""
    from onnx import TensorProto, helper

    integers, group = _group_of(graph, stored)
    name, scale, *offset = _names(graph, stored)
    real, nodes, whole = node.output[0], [], group == integers[0].numel()

    def emit(kind: str, given: list[str], result: str, **more: Any) -> str:
        nodes.append(helper.make_node(kind, given, [result], name=result, **more))
        return result

    def sizes(what: str, *numbers: int) -> str:
        known = {tensor.name for tensor in content.graph.initializer}
        return what if what in known else add(content, what, np.array(numbers))

    count = len(integers)
    ends = (
        sizes(f"ends{integers.dim()}", -1, *[1] * (integers.dim() - 1))
        if whole
        else sizes(f"{real}.ends", count, -1, 1)
    )
    levels = emit("Cast", [name], f"{real}.integers", to=TensorProto.FLOAT)
    if not whole:
        levels = emit("Reshape", [levels, sizes(f"{real}.parts", count, -1, group)], f"{real}.levels")
    if offset:
        below = emit("Cast", offset, f"{real}.offset", to=TensorProto.FLOAT)
        levels = emit("Sub", [levels, emit("Reshape", [below, ends], f"{real}.offsets")], f"{real}.steps")
    scales = emit("Reshape", [scale, ends], f"{real}.scales")
    values = emit("Mul", [levels, scales], real if whole else f"{real}.values")
    if not whole:
        emit("Reshape", [values, sizes(f"{real}.shape", *integers.shape)], real)
    return nodes


def pack_weights(content: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Give packed products their weights, in place, as the op takes them; those that several read once."""
    given: dict[str, list[str]] = {}
    for node in content.graph.node:
        if node.op_type == PACKED_PRODUCT:
            name = node.input[1]
            if name not in given:
                values = _blocks(node, *(weights[each] for each in node.input[1:]))
                given[name] = [add(content, f"{name}.{what}", value.numpy()) for what, value in values.items()]
            node.input[1:] = given[name]


def _blocks(node: onnx.NodeProto, integers: Tensor, scale: Tensor, offset: Tensor | None = None) -> dict[str, Tensor]:
    bits, block, depth = (attribute(node, each) for each in ("bits", "block_size", "K"))
    scales, first = scale.reshape(len(integers), -1), torch.arange(0, depth, block)
    group = first * scales.shape[1] // depth
    padded = torch.nn.functional.pad(integers, (0, len(first) * block - depth))
    blocks = _packed_rows(padded, bits).reshape(len(integers), len(first), -1)
    offsets = {} if offset is None else {"block_offsets": _packed_rows(offset[:, group], bits)}
    return {"blocks": blocks, "block_scales": scales[:, group]} | offsets


def _packed_rows(integers: Tensor, bits: int) -> Tensor:
    """Each row (N, ...) of integers in whole bytes."""
    padded = torch.nn.functional.pad(integers, (0, -integers.shape[1] % (8 // bits)))
    return pack(padded, bits).reshape(len(integers), -1)


def rounding(content: onnx.ModelProto, run: Callable[[onnx.ModelProto, Tensor], Tensor]) -> dict[str, tuple[int, int]]:
    """The packed products, by name with (N, K), that `run` computes on integers: what it gives for a sum of two inputs
    is not what it gives for them one by one."""
    from onnx import TensorProto, helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    found = {}
    for node in content.graph.node:
        if node.op_type != PACKED_PRODUCT:
            continue
        count, depth = attribute(node, "N"), attribute(node, "K")
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])
            for name, size in ((node.input[0], depth), (node.output[0], count))
        ]
        graph = helper.make_graph([node], "product", ends[:1], ends[1:], [constants[name] for name in node.input[1:]])
        alone = helper.make_model(graph, opset_imports=content.opset_import, ir_version=content.ir_version)
        one, other = torch.randn(2, 1, depth, generator=torch.Generator().manual_seed(0))
        results = run(alone, torch.cat([one, other, one + other]))
        off = (results[2] - results[0] - results[1]).abs().max()
        if off > _ROUNDED * results.abs().max():
            found[node.name] = count, depth
    return found
