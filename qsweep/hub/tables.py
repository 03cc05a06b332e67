"""Which columns of what a model takes are numbers of rows of a table: no engine asks whether there is such a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import EMBEDDING, REARRANGED, SIZE, aten

_MOVES = REARRANGED | {aten.to.dtype, aten.select.int, aten.expand.default, SIZE}
"""Ops by which a number stays what it is."""


class _Columns(fx.Interpreter):
    """Follows the numbers of columns in the place of values, as far as they are only moved."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.rows: dict[int, int] = {}
        """Of the smallest table that a column is looked up in."""

    def run_node(self, n: fx.Node) -> Any:
        if n.target is EMBEDDING:
            self._note(n)
        moved = (
            n.op == "call_function" and n.target in _MOVES and all(self.env[x] is not None for x in n.all_input_nodes)
        )
        return super().run_node(n) if moved or n.op == "placeholder" else None

    def _note(self, table: fx.Node) -> None:
        weight, given = table.args[0], self.env[table.args[1]]  # type: ignore[index]
        if isinstance(given, Tensor) and isinstance(weight, fx.Node) and weight.op == "get_attr":
            rows = len(attrgetter(str(weight.target))(self.module))
            for column in given.flatten().long().tolist():
                self.rows[column] = min(rows, self.rows.get(column, rows))


def with_tables(
    interface: Mapping[str, Sequence[Mapping[str, Any]]], model: QuantizedModel
) -> dict[str, list[dict[str, Any]]]:
    """`interface` (see `Manifest`) with `below` at each input whose numbers the float graph `model` looks up in tables:
    how many rows these have, one number, or one for each column, None where it is no such number."""
    found = {role: [dict(row) for row in rows] for role, rows in interface.items()}
    if not found.get("inputs"):
        return found
    shape, columns = model.example.shape[1:], _Columns(model.graph)
    columns.run(torch.arange(shape.numel(), dtype=torch.float32).reshape(1, *shape))
    begin = 0
    for row in found["inputs"]:
        width = prod(row["shape"])
        below = [columns.rows.get(column) for column in range(begin, begin + width)]
        if any(below):
            row["below"] = below[0] if len(set(below)) == 1 else below
        begin += width
    return found
