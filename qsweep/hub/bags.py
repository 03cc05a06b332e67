"""Sums, means and maxima of rows of a table (`nn.EmbeddingBag`), as those of what an embedding gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.kinds import EMBEDDING, aten
from qsweep.hub.nodes import arguments, source
from qsweep.hub.traced import line_of

BAGS = {aten.embedding_bag.default, aten.embedding_bag.padding_idx}
_MEAN, _MAX = 1, 2
"""`mode` of the op; 0 is the sum."""


def reduced_rows(graph: fx.GraphModule, bag: fx.Node) -> fx.Node:
    """What `bag`, of BAGS, gives first: (bags, features). Raises ExportFailure for bags that differ in length."""
    call = graph.graph.call_function
    given = arguments(bag)
    length = _length(given)
    if length is None:
        raise ExportFailure(
            f"`{line_of(bag)}`: all bags must have one length, as ids of shape (N, length) have, or offsets "
            "`arange(0, n, length)`: fill shorter ones up with the `padding_idx`"
        )
    ids = call(aten.reshape.default, (given["indices"], [-1, length]))
    rows = call(EMBEDDING, (given["weight"], ids, -1, given["scale_grad_by_freq"]))
    bags, features = bag.meta["val"][0].shape
    rows.meta["val"] = bag.meta["val"][0].new_empty((bags, length, features))
    if given["per_sample_weights"] is not None:
        factors = call(aten.reshape.default, (given["per_sample_weights"], [-1, length, 1]))
        rows = call(aten.mul.Tensor, (rows, factors))
    padding = given.get("padding_idx")
    if padding is None:
        return call(*_reduction(given["mode"], rows))
    there = call(aten.reshape.default, (call(aten.ne.Scalar, (ids, padding % _rows(given))), [-1, length, 1]))
    if given["mode"] == _MAX:
        most = call(*_reduction(_MAX, call(aten.where.ScalarOther, (there, rows, -math.inf))))
        return call(aten.where.ScalarOther, (call(aten.any.dim, (there, 1)), most, 0.0))
    there = call(aten.to.dtype, (there, torch.float32))
    total = call(*_reduction(0, call(aten.mul.Tensor, (rows, there))))
    if given["mode"] != _MEAN:
        return total
    count = call(aten.clamp.default, (call(*_reduction(0, there)), 1))
    return call(aten.div.Tensor, (total, count))


def _length(given: dict[str, Any]) -> int | None:
    """Of every bag: the step of the offsets, which start at 0."""
    offsets: fx.Node = given["offsets"]
    if given["include_last_offset"] or not isinstance(offsets.target, torch._ops.OpOverload):
        return None
    numbers = arguments(offsets)
    if offsets.target is aten.mul.Tensor and isinstance(numbers["other"], int):
        inner = _length(given | {"offsets": source(offsets)})
        return None if inner is None else inner * numbers["other"]
    counts = offsets.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
    step = numbers.get("step", 1)
    return step if counts and not numbers.get("start", 0) and isinstance(step, int) else None


def _rows(given: dict[str, Any]) -> int:
    return int(given["weight"].meta["val"].shape[0])


def _reduction(mode: int, rows: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return {0: aten.sum.dim_IntList, _MEAN: aten.mean.dim, _MAX: aten.amax.default}[mode], (rows, [1])
