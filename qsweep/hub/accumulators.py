"""Whether sums of products fit the 32 bits that integer kernels add in, decided from the weights alone."""

from __future__ import annotations

from typing import cast

import torch

from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, QUANTIZE_ROWS

_LIMIT = 2**31


def check_accumulators(model: QuantizedModel) -> None:
    """Raises Refused where sum|w_q| * (levels - 1) + |b_q| of a channel could reach 2^31.

    Activations count from the lowest level (uint8, at worst 255), as kernels do that take zero points off afterwards.
    """
    for node in nodes_of(model.graph, COMPUTE):
        given, stored = source(node), source(node, 1)
        if given.target not in (DEQUANTIZE, QUANTIZE_ROWS) or stored.target is not DEQUANTIZE_WEIGHT:
            continue
        integers, scale = constant(model.graph, stored), constant(model.graph, stored.args[1])
        bias = constant(model.graph, node.args[2]) if len(node.args) > 2 else None
        assert integers is not None
        assert scale is not None
        grid = grid_of(given) if given.target is DEQUANTIZE else None
        # rows are symmetric: their highest level
        levels = grid.high - grid.low if grid is not None else cast(int, given.args[2])
        worst = integers.double().abs().flatten(1).sum(1) * levels
        if bias is not None and grid is not None:  # that of rows is added in floating point
            worst += (bias.double() / (torch.tensor(grid.scale) * scale).double()).abs()
        if worst.max() >= _LIMIT:
            raise Refused(
                f"`{source(stored).target}`: sums must stay below 2^31, the int32 accumulator"
                f" (its weights allow {int(worst.max())}); use fewer weight or activation bits"
            )
