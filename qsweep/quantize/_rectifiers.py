"""ReLUs that the fake quantizer after them makes up for: two passes less in training."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from qsweep.hub.kinds import aten
from qsweep.hub.nodes import source
from qsweep.quantize._fake import FakeActivation

RECTIFIER = aten.relu.default


def join_rectifiers(graph: fx.GraphModule) -> None:
    """Take out each ReLU that only a fake quantizer reads, and let that rectify, in place.

    A quantizer of several values does so if all of them are such ReLUs.
    """
    for nodes in _quantized(graph).values():
        rectifiers, quantizer = [source(node) for node in nodes], _quantizer(graph, nodes[0])
        alone = all(rectifier.target is RECTIFIER and len(rectifier.users) == 1 for rectifier in rectifiers)
        if not (alone and quantizer.joins):
            continue
        quantizer.rectifies = True
        for node, rectifier in zip(nodes, rectifiers, strict=True):
            node.meta["rectifier"] = dict(rectifier.meta)
            node.update_arg(0, source(rectifier))
            graph.graph.erase_node(rectifier)
    graph.recompile()


def split_rectifiers(graph: fx.GraphModule) -> None:
    """Undo `join_rectifiers`."""
    for nodes in _quantized(graph).values():
        if not _quantizer(graph, nodes[0]).rectifies:
            continue
        _quantizer(graph, nodes[0]).rectifies = False
        for node in nodes:
            with graph.graph.inserting_before(node):
                rectifier = graph.graph.call_function(RECTIFIER, (source(node),))
            rectifier.meta = node.meta.pop("rectifier")
            node.update_arg(0, rectifier)
    graph.recompile()


def _quantized(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call fake quantizers of activations, by quantizer."""
    found = defaultdict(list)
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), FakeActivation):
            found[str(node.target)].append(node)
    return found


def _quantizer(graph: fx.GraphModule, node: fx.Node) -> FakeActivation:
    quantizer = graph.get_submodule(str(node.target))
    assert isinstance(quantizer, FakeActivation)
    return quantizer
