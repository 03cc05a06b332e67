"""Passes of ExecuTorch trace the graph that they are given once more at their end, whether or not they changed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from executorch.exir.pass_base import ExportPass, _ExportPassBase
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

_TRACED = "qsweep_traced"
_BESIDE = {"call", "requires", "ensures", "_abc_impl"}
"""What a pass may have of its own and still trace a graph to the same graph."""
_TRACING = {name for own in (_ExportPassBase, ExportPass) for name in vars(own) if not name.startswith("__")} - _BESIDE


@contextmanager
def traced_where_changed() -> Iterator[None]:
    """Within it a pass that changes nothing in tracing gives a graph back that is as the last tracing has left it."""
    own = _ExportPassBase.call

    def call(self: _ExportPassBase, module: GraphModule) -> PassResult:
        now = _shape(module)
        if now is not None and now == module.meta.get(_TRACED) and _only_traces(type(self)):
            return PassResult(module, True)
        result: PassResult = own(self, module)
        result.graph_module.meta[_TRACED] = _shape(result.graph_module)
        return result

    _ExportPassBase.call = call
    try:
        yield
    finally:
        _ExportPassBase.call = own


def _only_traces(kind: type) -> bool:
    return all(getattr(kind, name) is getattr(ExportPass, name) for name in _TRACING)


def _shape(module: GraphModule) -> list[tuple[Any, ...]] | None:
    """What its nodes are and read; None where one has a graph of its own."""
    if sum(isinstance(part, GraphModule) for part in module.modules()) > 1:
        return None
    return [(node.op, node.name, node.target, str(node.args), str(node.kwargs)) for node in module.graph.nodes]
