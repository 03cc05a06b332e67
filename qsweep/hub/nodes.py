"""Nodes of a graph, what they are given and the constants behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from qsweep.hub.ops import STORED


def nodes_of(graph: fx.GraphModule, targets: Collection[Any]) -> list[fx.Node]:
    """The nodes that call one of `targets`, in order of execution."""
    return [node for node in graph.graph.nodes if node.target in targets]


def reached(start: Iterable[fx.Node], near: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """`start`, what is near it, and so on."""
    found = set(start)
    ends = [*found]
    while ends:
        new = set(near(ends.pop())) - found
        ends += new
        found |= new
    return found


def is_real(node: fx.Node) -> bool:
    """Whether it is a tensor of real numbers, no indices or masks, as ShapeProp has seen it."""
    meta = node.meta.get("tensor_meta")
    return isinstance(meta, TensorMetadata) and meta.dtype.is_floating_point


def shape_seen(node: fx.Node) -> torch.Size:
    """The shape of what `node` gives, as ShapeProp has seen it."""
    return cast(torch.Size, node.meta["tensor_meta"].shape)


def source(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that gives `node` its argument `index`."""
    return cast(fx.Node, node.args[index])


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of its op's schema, defaults filled in."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    return {argument.name: argument.default_value for argument in schema.arguments} | given


def beside_first(node: fx.Node) -> list[Any]:
    """All arguments but the first, constants by their names."""
    return [argument.target if isinstance(argument, fx.Node) else argument for argument in node.args[1:]]


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The constant behind `node`: that of a get_attr, or the integers of stored weights; else None."""
    if isinstance(node, fx.Node) and node.target in STORED:
        node = source(node)
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def is_trained(graph: fx.GraphModule, *nodes: Any) -> bool:
    """Whether a parameter that is not frozen goes into one of `nodes`."""
    given = reached((node for node in nodes if isinstance(node, fx.Node)), lambda node: node.all_input_nodes)
    return any(value.requires_grad for node in given if (value := constant(graph, node)) is not None)


def set_constant(root: torch.nn.Module, name: str, value: Tensor, *, trainable: bool = False) -> None:
    """Put `value` at the dotted `name`, replacing what is there."""
    *path, last = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, last):
        delattr(module, last)
    if trainable:
        module.register_parameter(last, torch.nn.Parameter(value))
    else:
        module.register_buffer(last, value)


def attributes(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The constants that the graph reads, by name, each once."""
    seen = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and node.target not in seen:
            seen.add(node.target)
            value = constant(graph, node)
            if value is not None:
                yield str(node.target), value
