"""What a model computes from parameters alone."""

from __future__ import annotations

import torch
from torch import fx

from qsweep.hub.form import COMPUTE, aten, nodes_of, set_constant

_READERS = COMPUTE | {aten.batch_norm.default}


def with_fixed_weights(graph: fx.GraphModule) -> None:
    """Make what layers and norms multiply by a constant where no input goes into it, in place.

    Weight norm, standardized weights and the like: their layers are then layers as any other, to be folded, quantized
    and trained.
    """
    fixed = fixed_nodes(graph)
    wanted = {node for reader in nodes_of(graph, _READERS) for node in reader.all_input_nodes[1:] if node in fixed}
    computed = [node for node in graph.graph.nodes if node in wanted and node.op != "get_attr"]
    if not computed:
        return
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        for node in fixed:
            interpreter.env[node] = interpreter.run_node(node)
    for node in computed:
        name = f"{_first(node).target}_{node.name}"
        set_constant(graph, name, interpreter.env[node].clone(), trainable=True)
        with graph.graph.inserting_before(node):
            new = graph.graph.get_attr(name)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)


def fixed_nodes(graph: fx.GraphModule) -> dict[fx.Node, None]:
    """The constants and the nodes that depend on constants alone, in order of execution."""
    found: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        computed = node.op == "call_function" and node.all_input_nodes and not _random(node)
        if node.op == "get_attr" or (computed and all(given in found for given in node.all_input_nodes)):
            found[node] = None
    return found


def _random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
    )


def _first(node: fx.Node) -> fx.Node:
    """The first constant that goes into `node`."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node
