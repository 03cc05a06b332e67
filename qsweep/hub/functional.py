"""A graph without writes into tensors."""

from __future__ import annotations

import operator
from itertools import takewhile

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.form import aten, source

_SOMETIMES_VIEWS = {
    aten.reshape.default,
    aten.contiguous.default,
    aten.type_as.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
"""Ops whose schema does not tell that what they give may be what they are given."""


def functional(graph: fx.GraphModule) -> None:
    """`relu_` as `relu`, and so on; who read the tensor that was written reads the result."""
    for node in list(graph.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        schema = node.target._schema
        packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
        given = source(node)
        later = _later(graph, node)
        if packet is None or any(user in later for alias in _aliases(given) - {given} for user in alias.users):
            raise ExportFailure(f"the model writes into a tensor that is read elsewhere (`{node.target}`)")
        node.target = getattr(packet, schema.overload_name or "default")
        for user in [user for user in given.users if user in later]:
            user.replace_input_with(given, node)


def _later(graph: fx.GraphModule, node: fx.Node) -> set[fx.Node]:
    return set(takewhile(lambda other: other is not node, reversed(graph.graph.nodes)))


def _aliases(value: fx.Node) -> set[fx.Node]:
    """What may share memory with `value`, itself included."""
    found, reached = {value}, [value]
    while reached:
        node = reached.pop()
        near = {user for user in node.users if _may_be_view(user)}
        near |= set(node.all_input_nodes[:1]) if _may_be_view(node) else set()
        reached += near - found
        found |= near
    return found


def _may_be_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    given = [result.alias_info for result in node.target._schema.returns]
    return node.target in _SOMETIMES_VIEWS or any(alias is not None and not alias.is_write for alias in given)
