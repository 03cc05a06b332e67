"""An exported ONNX model with the inputs and outputs of the model that it was made of, where these are several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from qsweep.engines._onnx_nodes import add, set_nodes

if TYPE_CHECKING:
    import onnx

    from qsweep.tasks._parts import Parts

_BATCH = "batch"


def with_parts(content: onnx.ModelProto, parts: Mapping[str, Parts]) -> None:
    """Let `content`, which takes and gives one tensor, take and give each of `parts` by its name, in place; an output
    that is called like an input has `_out` behind its name."""
    inputs, outputs = parts.get("inputs"), parts.get("outputs")
    given = [part.called("input") for part in inputs.parts] if inputs else []
    shown = [part.called("output") for part in outputs.parts] if outputs else []
    shown = [f"{name}_out" if name in given else name for name in shown]
    _free(content, {*given, *shown})
    nodes = list(content.graph.node)
    before = _joined(content, inputs, given) if inputs else ()
    behind = _apart(content, outputs, shown) if outputs else ()
    set_nodes(content, [*before, *nodes, *behind])


def _free(content: onnx.ModelProto, names: set[str]) -> None:
    """Rename the values of `content` that are called like one of `names`."""
    graph = content.graph
    for value in [*graph.input, *graph.output, *graph.initializer, *graph.value_info]:
        value.name = _other(value.name, names)
    for node in graph.node:
        node.input[:] = [_other(name, names) for name in node.input]
        node.output[:] = [_other(name, names) for name in node.output]


def _other(name: str, names: set[str]) -> str:
    return f"{name}.within" if name in names else name


def _joined(content: onnx.ModelProto, parts: Parts, names: list[str]) -> Iterator[onnx.NodeProto]:
    """Makes the input of inputs of its own; of whole numbers alone in integers, of which bf16 takes nothing."""
    from onnx import TensorProto, helper

    name = content.graph.input[0].name
    whole = not any(part.dtype.is_floating_point for part in parts.parts)
    del content.graph.input[:], content.graph.value_info[:]  # which have another type now
    columns = []
    for part, own, width in zip(parts.parts, names, parts.widths, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=part.dtype).numpy().dtype)
        content.graph.input.append(helper.make_tensor_value_info(own, kind, [_BATCH, *part.shape]))
        yield helper.make_node(
            "Cast", [own], [f"parts/{own}/cast"], to=TensorProto.INT64 if whole else TensorProto.FLOAT
        )
        shape = add(content, f"parts/{own}/flat", np.array([-1, width] if parts.several else [-1, *part.shape]))
        columns.append(f"parts/{own}/columns" if parts.several else name)
        yield helper.make_node("Reshape", [f"parts/{own}/cast", shape], columns[-1:])
    if parts.several:
        yield helper.make_node("Concat", columns, [name], axis=1)


def _apart(content: onnx.ModelProto, parts: Parts, names: list[str]) -> Iterator[onnx.NodeProto]:
    """Makes outputs of its own of the output."""
    from onnx import TensorProto, helper

    name = content.graph.output[0].name
    del content.graph.output[:]
    columns = [f"parts/{own}/columns" for own in names] if parts.several else [name]
    if parts.several:
        widths = add(content, "parts/widths", np.array(parts.widths))
        yield helper.make_node("Split", [name, widths], columns, axis=1)
    for part, own, given in zip(parts.parts, names, columns, strict=True):
        content.graph.output.append(helper.make_tensor_value_info(own, TensorProto.FLOAT, [_BATCH, *part.shape]))
        shape = add(content, f"parts/{own}/shape", np.array([-1, *part.shape]))
        yield helper.make_node("Reshape", [given, shape], [own])
