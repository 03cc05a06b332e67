"""Where a graph computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def on_device(graph: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """`graph` with its constants, and what it makes itself (masks, tokens, positions), on `device`; in place.

    A graph names the device that it was traced on wherever it makes a tensor, and `Module.to` leaves that as it is.
    """
    device = torch.device(device)
    graph.to(device)

    def placed(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), placed)
    graph.recompile()
    return graph
