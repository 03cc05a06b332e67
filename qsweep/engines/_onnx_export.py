"""A graph of ATen ops in ONNX: PyTorch's exporter, without what it does over again.

In every export it reads what it writes for each op, from the source of 800 functions, and traces the graph a second
time to decompose the ops that it does not know. For a small network that is three quarters of the time. The fork server
imports this, so that no worker reads the table.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.passes.shape_prop import ShapeProp
from torch.onnx._internal.exporter._registration import ONNXRegistry

from qsweep.engines._decompositions import decomposed_where, ops_of
from qsweep.errors import Refused, why
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import nodes_of, shape_seen, source

if TYPE_CHECKING:
    import onnx

_FLATTEN = aten.flatten.using_ints
_RESHAPES = aten.reshape.default, aten.view.default
_OPSET = 20
"""The version of ONNX's ops that is written."""
_read = ONNXRegistry.from_torchlib


def exported(graph: torch.fx.GraphModule, example: Tensor) -> onnx.ModelProto:
    """`graph`, which is changed, for any batch size; `example` is (2, ...). Raises Refused."""
    _in_known_ops(graph)
    _with_flattens_as_reshapes(graph, example)
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _once(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                output_names=["outputs"],
                opset_version=_OPSET,
                verbose=False,
                external_data=False,
            )
    except Exception as error:  # the exporter raises many types; all mean that this engine cannot take the model
        raise Refused(f"`torch.onnx` cannot export the model: {why(error)}") from error
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what its optimizer says of constants that it leaves as they are."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _in_known_ops(graph: torch.fx.GraphModule) -> None:
    """Write ops that most models have and the table has not by those that it has."""
    for node in graph.graph.nodes:
        if node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [-1, -2], True)
        elif node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
    graph.recompile()


def _with_flattens_as_reshapes(graph: torch.fx.GraphModule, example: Tensor) -> None:
    """Write flattens of values that are flattened twice, or come from a reshape, as reshapes: the exporter names the
    shape that it makes of a flatten by the value, and of two shapes of one name loses one."""
    nodes = [node for node in nodes_of(graph, {_FLATTEN}) if _named_twice(source(node))]
    if not nodes:
        return
    sizes, others = (_shapes(graph, nodes, batch) for batch in (example, torch.cat([example, example[:1]])))
    for node, size, other in zip(nodes, sizes, others, strict=True):
        if len(size) == 2 and size[1] == other[1]:  # no matter how many samples
            node.target, node.args, node.kwargs = aten.reshape.default, (source(node), [-1, size[1]]), {}
    graph.recompile()


def _named_twice(value: fx.Node) -> bool:
    return value.target in (_FLATTEN, *_RESHAPES) or sum(user.target is _FLATTEN for user in value.users) > 1


def _shapes(graph: torch.fx.GraphModule, nodes: list[fx.Node], batch: Tensor) -> list[torch.Size]:
    ShapeProp(graph).propagate(batch)
    return [shape_seen(node) for node in nodes]


@cache
def _table(*, opset_version: int) -> ONNXRegistry:
    return _read(opset_version)


@contextmanager
def _once() -> Iterator[None]:
    """Within it exports share a table, and decompose only what has to be. Not beyond: those of a user may add to the
    table."""
    own = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(_table)  # type: ignore[method-assign]
    try:
        with decomposed_where(_unknown):
            yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]


def _unknown(program: ExportedProgram, *_: object, **__: object) -> bool:
    """Whether the table lacks an op; else the program would be the same once it is decomposed."""
    table, ops = _table(opset_version=_OPSET), ops_of(program)
    if ops is None:
        return True
    return any(op._schema.is_mutable or not table.is_registered(op) for op in ops if isinstance(op, OpOverload))


_table(opset_version=_OPSET)
