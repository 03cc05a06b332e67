"""Products with parameters, however they are written, as linears."""

from __future__ import annotations

import re
from typing import NamedTuple, cast

import torch
from torch import fx

from qsweep.hub.fixed import fixed_nodes
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import constant, nodes_of, reached, source
from qsweep.hub.traced import replace_by, shape_of

_PRODUCTS = {aten.addmm.default, aten.mm.default, aten.matmul.default}


def with_linears(graph: fx.GraphModule) -> None:
    """Products with a matrix of parameters on the right as linears, in place: `x @ w`, the `Conv1D` of GPT-2, and
    `einsum("bth,hnd->btnd", x, w)` as in XLNet."""
    fixed = fixed_nodes(graph)
    parameters = {node for node in fixed if isinstance(constant(graph, node), torch.nn.Parameter)}

    def is_weight(node: fx.Node) -> bool:
        return node in fixed and bool(reached([node], lambda each: each.all_input_nodes) & parameters)

    for node in nodes_of(graph, _PRODUCTS):
        *bias, given, weight = cast(list[fx.Node], node.args)
        ranks = [value.meta["val"].dim() for value in (*bias, given, weight)]
        if node.kwargs or given in fixed or not is_weight(weight):
            continue
        if ranks[-1] == 2 and ranks[-2] >= 2 and ranks[:-2] <= [1]:
            with graph.graph.inserting_before(node):
                replace_by(node, _linear(graph, node.meta["val"], given, _turned(graph, weight), *bias))
    for node in nodes_of(graph, {aten.einsum.default}):
        operands = cast(list[fx.Node], node.args[1])
        for given, weight in (operands, operands[::-1]) if len(operands) == 2 else ():
            names = _names(str(node.args[0]), given is not operands[0])
            if names is not None and given not in fixed and is_weight(weight) and shape_of(node) is not None:
                _replace(graph, node, given, weight, names)
                break


class _Names(NamedTuple):
    """The dimensions of an einsum."""

    kept: str
    """Of the activation, in front."""
    summed: str
    """Of the activation, behind."""
    new: str
    """Of the weight, behind `kept` in the result."""
    weight: str


def _names(equation: str, weight_first: bool) -> _Names | None:
    """Those of a linear; None for any other product."""
    found = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation.replace(" ", ""))
    if found is None or any(len(set(part)) < len(part) for part in found.groups()):
        return None
    one, other, result = found.groups()
    given, weight = (other, one) if weight_first else (one, other)
    summed = "".join(name for name in given if name in weight)
    kept, new = given.removesuffix(summed), "".join(name for name in result if name not in given)
    linear = (kept + summed, kept + new, sorted(summed + new)) == (given, result, sorted(weight))
    return _Names(kept, summed, new, weight) if linear and kept and summed and new else None


def _replace(graph: fx.GraphModule, node: fx.Node, given: fx.Node, weight: fx.Node, names: _Names) -> None:
    call, kept = graph.graph.call_function, len(names.kept)
    order = [names.weight.index(name) for name in names.new + names.summed]
    depth = given.meta["val"].shape[kept:].numel()
    with graph.graph.inserting_before(node):
        if order != sorted(order):
            weight = _like(call(aten.permute.default, (weight, order)), weight.meta["val"].permute(order))
        if len(order) > 2:
            weight = _like(call(aten.reshape.default, (weight, [-1, depth])), weight.meta["val"].reshape(-1, depth))
        if len(names.summed) > 1:
            given = _like(call(aten.flatten.using_ints, (given, kept)), given.meta["val"].flatten(kept))
        result = _linear(graph, node.meta["val"].flatten(kept), given, weight)
        if len(names.new) > 1:
            result = call(aten.reshape.default, (result, shape_of(node)))
        replace_by(node, result)


def _turned(graph: fx.GraphModule, weight: fx.Node) -> fx.Node:
    if weight.target is aten.t.default:
        return source(weight)
    return _like(graph.graph.call_function(aten.t.default, (weight,)), weight.meta["val"].t())


def _linear(graph: fx.GraphModule, traced: torch.Tensor, *given: fx.Node) -> fx.Node:
    return _like(graph.graph.call_function(aten.linear.default, given), traced)


def _like(node: fx.Node, traced: torch.Tensor) -> fx.Node:
    node.meta["val"] = traced
    return node
