"""A graph without writes into tensors."""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qsweep.errors import ExportFailure
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import reached, source
from qsweep.hub.traced import line_of

_SOMETIMES_VIEWS = {aten.reshape.default, aten.contiguous.default, aten.type_as.default}
"""Ops whose schema does not tell that what they give may be what they are given."""
_PARTS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
"""Views of a part of a tensor, and the op that gives the tensor with another part."""


def functional(graph: fx.GraphModule) -> None:
    """`relu_` as `relu`, and so on, in place; who read what was written, or a view of it, reads the result.

    Of a tensor into whose slices a model writes each write makes another. Raises ExportFailure for writes through other
    views.
    """
    for node in list(graph.graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _without_write(graph, node, node.target._schema)


def _without_write(graph: fx.GraphModule, node: fx.Node, schema: torch._C.FunctionSchema) -> None:
    name = schema.name.removeprefix("aten::")
    packet = getattr(aten, f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_"), None)
    if packet is None:
        raise ExportFailure(f"no op does to a new tensor what `{node.target}` writes into one (`{line_of(node)}`)")
    later = set(takewhile(lambda other: other is not node, reversed(graph.graph.nodes)))
    base, parts = source(node), list[fx.Node]()
    while base.target in _PARTS:
        parts.append(base)
        base = source(base)
    views = reached([base], _views)
    if any(user in later for other in reached([base], _aliases) - views for user in other.users):
        raise ExportFailure(
            f"the model writes into a tensor that is read elsewhere (`{line_of(node)}`, `{node.target}`): write into "
            "slices of the tensor itself, or make a new one (`torch.where`, `torch.cat`)"
        )
    read = parts[:1] if node.users else []
    stale = _stale(graph, views - later - {base}, later, read)
    if node.target is aten.copy_.default:
        _as_copy(graph, node)
    else:
        node.target = getattr(packet, schema.overload_name or "default")
    with graph.graph.inserting_before(node.next):
        whole = node
        for part in parts:
            scattered = (source(part), whole, *part.args[1:])
            whole = graph.graph.call_function(_PARTS[part.target], scattered, part.kwargs)
            whole.meta["val"] = source(part).meta["val"]
        new = {base: whole}
        for view in stale:
            new[view] = graph.graph.node_copy(view, lambda given: new.get(given, given))
    if read:
        new[node] = new[read[0]]
    for old, now in new.items():
        for user in [user for user in old.users if user in later]:
            user.replace_input_with(old, now)


def _as_copy(graph: fx.GraphModule, node: fx.Node) -> None:
    """What `node` copies into a tensor as one of the size and type of that, in place: `aten.copy` has no derivative."""
    into, value = source(node), source(node, 1)
    wanted, given = into.meta["val"], value.meta["val"]
    with graph.graph.inserting_before(node):
        if given.dtype != wanted.dtype:
            value = graph.graph.call_function(aten.to.dtype, (value, wanted.dtype))
        if str(given.shape) != str(wanted.shape):
            value = graph.graph.call_function(aten.expand_as.default, (value, into))
    node.target, node.args, node.kwargs = aten.clone.default, (value,), {}


def _stale(graph: fx.GraphModule, views: set[fx.Node], later: set[fx.Node], also: list[fx.Node]) -> list[fx.Node]:
    """Those of `views` that are read later, `also`, and what these are views of, in order of execution."""
    found = list[fx.Node]()
    for view in reversed(graph.graph.nodes):
        if view in views and (view in also or any(user in later or user in found for user in view.users)):
            found.append(view)
    return found[::-1]


def _views(value: fx.Node) -> list[fx.Node]:
    """What may be a view of `value`, directly."""
    return [user for user in value.users if _may_be_view(user)]


def _aliases(value: fx.Node) -> list[fx.Node]:
    """Its views, and what it may be a view of."""
    return [*_views(value), *(value.all_input_nodes[:1] if _may_be_view(value) else ())]


def _may_be_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    given = [result.alias_info for result in node.target._schema.returns]
    known = node.target in _SOMETIMES_VIEWS or any(alias is not None and not alias.is_write for alias in given)
    return known and not _copies(node)


def _copies(node: fx.Node) -> bool:
    """Whether an op that may give a view gave a new tensor as it was traced: `contiguous` of a permutation, say."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    if not all(isinstance(value, Tensor | torch.SymInt | int) for value in values):
        return False
    given = map_aggregate(
        (node.args, node.kwargs),
        lambda each: _as_traced(each.meta["val"]) if isinstance(each, fx.Node) else each,
    )
    arguments, keywords = cast(tuple[tuple[Any, ...], dict[str, Any]], given)
    result = cast(Any, node.target)(*arguments, **keywords)
    return bool(result.untyped_storage()._cdata != arguments[0].untyped_storage()._cdata)


def _as_traced(value: Any) -> Any:
    """A tensor without values, or a number, as `value` was when it was traced."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([_as_traced(each) for each in numbers] for numbers in (value.size(), value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
