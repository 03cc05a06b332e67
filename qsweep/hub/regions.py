"""Parts of a model that run without gradients or without autocast."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.nodes import nodes_of

_GRADIENTS: Any = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST: Any = torch.ops.higher_order.wrap_with_autocast
_SETTINGS = {_GRADIENTS: 1, _AUTOCAST: 4}
"""How many arguments stand before the region and what goes into it."""


def without_regions(graph: fx.GraphModule) -> None:
    """`with torch.no_grad():` and `with torch.autocast(..., enabled=False):` as plain parts of the graph, in place:
    inference is not changed by them. Raises ExportFailure where autocast is on."""
    for node in nodes_of(graph, _SETTINGS):
        if node.target is _AUTOCAST and node.args[2]:
            raise ExportFailure(
                f"the model turns autocast on (`{node.args[0]}`, {node.args[1]}), and what that makes of its types "
                "cannot be traced: leave it out of `forward`; bf16 and fp16 are the baselines' and the method `cast`'s"
            )
        place = _SETTINGS[node.target]
        (name, *given), users = cast(list[fx.Node], node.args[place:]), list(node.users)
        region = cast(fx.GraphModule, graph.get_submodule(str(name.target)))
        without_regions(region)
        with graph.graph.inserting_before(node):
            results: Any = graph.graph.graph_copy(region.graph, dict(zip(_inputs(region), given, strict=True)))
        for part in users:
            part.replace_all_uses_with(results[part.args[1]])
            graph.graph.erase_node(part)
        graph.graph.erase_node(node)
        if not name.users:
            graph.graph.erase_node(name)


def _inputs(region: fx.GraphModule) -> list[fx.Node]:
    return [node for node in region.graph.nodes if node.op == "placeholder"]
