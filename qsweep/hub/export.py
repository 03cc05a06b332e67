"""From an eager model to the float graph that the hub form is made of."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from qsweep.errors import ExportFailure
from qsweep.hub.form import QuantizedModel, aten
from qsweep.hub.norm import fold_batch_norm
from qsweep.hub.save import load, save
from qsweep.stage import Context

if TYPE_CHECKING:
    from pathlib import Path

_WHOLE = 2**63 - 1
"""`slice` up to this index takes everything."""


def float_graph(model: nn.Module, context: Context) -> QuantizedModel:
    """The folded float graph of `model`, the uncompressed or pruned one of `context`; exported once, then kept."""

    def compute(folder: Path) -> None:
        live = export(model, example_of(context))
        save(QuantizedModel(fold_batch_norm(live.graph), live.example), folder)

    return load(context.store.folder(context.store.key("float_graph", 1, context.key, torch.__version__), compute))


def example_of(context: Context) -> Tensor:
    """Two training samples as the model takes them."""
    return context.task.transform(context.task.samples("train").inputs[:2]).to(torch.float32)


def export(model: nn.Module, example: Tensor) -> QuantizedModel:
    """Trace a copy of `model` in eval mode, batch norm kept; raises ExportFailure with the tracer's reason.

    `example`: (2, ...) float32. The graph takes any batch size.
    """
    model = copy.deepcopy(model).eval().cpu()
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        graph = program.module(check_guards=False)
    except Exception as error:  # the tracer raises dozens of types; all mean the same to the person who reads it
        raise ExportFailure(f"`torch.export` cannot trace the model: {_reason(error)}") from error
    assert isinstance(graph, fx.GraphModule)
    return QuantizedModel(_plain(graph), example)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


def _plain(graph: fx.GraphModule) -> fx.GraphModule:
    """One tensor in, one tensor out, without ops that do nothing, in the ops that engines know."""
    graph.graph.set_codegen(fx.graph.CodeGen())
    output = graph.graph.output_node()
    result: Any = output.args[0]
    if isinstance(result, tuple | list):
        if len(result) != 1:
            raise ExportFailure(f"the model must give one tensor (got {len(result)} outputs)")
        output.args = (result[0],)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        raise ExportFailure(f"the model must take one tensor (got {len(placeholders)} inputs)")
    for node in list(graph.graph.nodes):
        if node.target is aten.slice.Tensor and _takes_all(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.mean.dim and _is_global_pool(node):
            _use_global_pool(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _takes_all(node: fx.Node) -> bool:
    start, end, step = (*node.args[2:], *(None, None, None))[:3]
    return start in (None, 0) and end in (None, _WHOLE) and step in (None, 1)


def _is_global_pool(node: fx.Node) -> bool:
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    dims = sorted(dim % 4 for dim in node.args[1]) if value is not None and value.dim() == 4 else []  # type: ignore[union-attr]
    return dims == [2, 3] and not node.kwargs.get("dtype")


def _use_global_pool(graph: fx.GraphModule, node: fx.Node) -> None:
    """`x.mean((2, 3))` as the pooling op, which runtimes have an integer kernel for."""
    keep = len(node.args) > 2 and bool(node.args[2])
    with graph.graph.inserting_before(node):
        pooled = graph.graph.call_function(aten.adaptive_avg_pool2d.default, (node.args[0], [1, 1]))
        result = pooled if keep else graph.graph.call_function(aten.flatten.using_ints, (pooled, 1))
    node.replace_all_uses_with(result)
