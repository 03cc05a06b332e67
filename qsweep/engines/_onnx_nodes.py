"""Nodes and constants of an ONNX graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if TYPE_CHECKING:
    import onnx


RUNTIME = "com.microsoft"
"""Ops that ONNX Runtime has beside those of ONNX."""


def import_runtime(content: onnx.ModelProto) -> None:
    """Let `content` call ops of `RUNTIME`."""
    from onnx import helper

    if all(each.domain != RUNTIME for each in content.opset_import):
        content.opset_import.append(helper.make_opsetid(RUNTIME, 1))


def add(content: onnx.ModelProto, name: str, value: Any) -> str:
    """Give `content` the constant `name`; returns its name."""
    from onnx import numpy_helper

    content.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def set_nodes(content: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make these, some of which may be there already, the nodes of `content`."""
    ordered = [copy.deepcopy(node) for node in nodes]
    del content.graph.node[:]
    content.graph.node.extend(ordered)


def drop_unused(content: onnx.ModelProto) -> None:
    """Remove nodes and constants that nothing reads."""
    needed = {output.name for output in content.graph.output}
    kept = []
    for node in reversed(content.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    set_nodes(content, reversed(kept))
    constants = [copy.deepcopy(tensor) for tensor in content.graph.initializer if tensor.name in needed]
    del content.graph.initializer[:]
    content.graph.initializer.extend(constants)


def drop_notes(content: onnx.ModelProto) -> None:
    """Remove what the exporter wrote for debugging: stack traces are four fifths of a small model's file."""
    for item in [content, content.graph, *content.graph.node, *content.graph.input, *content.graph.output]:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


def producers_of(content: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that gives each value."""
    return {name: node for node in content.graph.node for name in node.output}


def dequantizes(node: onnx.NodeProto | None) -> TypeGuard[onnx.NodeProto]:
    return node is not None and node.op_type == "DequantizeLinear"


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def stored_factor(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """Names of the integers (N, K) and of their scales, whose real values' transpose the product `node` multiplies by;
    none where it multiplies by anything else."""
    if node.op_type not in ("MatMul", "Gemm"):
        return []
    source, transposed = producers.get(node.input[1]), bool(attribute(node, "transB", 0))
    if source is not None and source.op_type == "Transpose" and not transposed:
        source, transposed = producers.get(source.input[0]), True
    known = source is not None and source.op_type == "DequantizeLinear" and transposed
    return list(source.input[:2]) if source is not None and known else []
