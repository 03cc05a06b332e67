"""Ops that move or select values, of integers where these are on a grid."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from qsweep.engines._litert_ops import NONE, shape_of, write
from qsweep.engines._litert_values import Value, Values, channels_last, plain
from qsweep.engines._litert_windows import every, maximum, padded
from qsweep.errors import Refused
from qsweep.hub.kinds import NEAREST, aten
from qsweep.hub.nodes import arguments, source


@write(aten.permute.default)
def _permuted(values: Values, node: fx.Node) -> Value:
    """Nothing is moved until something wants it so."""
    given = values.value(source(node))
    dims = [dim % len(given.shape) for dim in arguments(node)["dims"]]
    order = tuple(dims.index(dim) for dim in given.order)
    return Value(given.index, tuple(shape_of(node)), order, given.dtype, given.grid)


@write(
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims, aten.squeeze.dim,
    aten._unsafe_view.default, aten.flatten.using_ints,
)  # fmt: skip
def _view(values: Values, node: fx.Node) -> Value:
    return values.reshaped(values.value(source(node)), shape_of(node))


@write(aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default)
def _same(values: Values, node: fx.Node) -> Value:
    return values.value(source(node))


@write(aten.slice.Tensor, aten.select.int)
def _slice(values: Values, node: fx.Node) -> Value:
    given, named = values.value(source(node)), arguments(node)
    dim, size = named["dim"] % len(given.shape), given.shape[named["dim"]]
    alone = node.target is aten.select.int
    start = named["index"] % size if alone else _within(named["start"] or 0, size)
    end = start + 1 if alone else _within(size if named["end"] is None else named["end"], size)
    step = 1 if alone else named["step"]
    if step > 1 and len(given.shape) == 4 and dim > 1 and (given.grid or given.dtype == torch.float32):
        whole = given if (start, end) == (0, size) else _sliced(values, given, dim, start, end)
        return every(values, whole, dim, step)
    made = _sliced(values, given, dim, start, end, step)
    return values.reshaped(made, shape_of(node)) if alone else made


def _sliced(values: Values, given: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    shape = [*given.shape]
    shape[dim] = len(range(start, end, step))
    place = given.order.index(dim)
    begin, ends, steps = [0] * len(shape), given.lies, [1] * len(shape)
    begin[place], ends[place], steps[place] = start, end, step
    bounds = [values.numbers(*begin), values.numbers(*ends), values.numbers(*steps)]
    return values.moved("STRIDED_SLICE", given, bounds, shape, given.order, "StridedSliceOptions")


def _within(index: int, size: int) -> int:
    return min(size, max(0, index + size if index < 0 else index))


@write(operator.getitem)
def _part(values: Values, node: fx.Node) -> Value:
    split, index = source(node), int(str(node.args[1]))
    if split.target is not aten.split_with_sizes.default:
        raise Refused(f"LiteRT has no operator for `{split.target}`")
    given, named = values.value(source(split)), arguments(split)
    sizes, dim = named["split_sizes"], named["dim"] % len(given.shape)
    start = sum(sizes[:index])
    return _sliced(values, given, dim, start, start + sizes[index])


@write(aten.cat.default)
def _joined(values: Values, node: fx.Node) -> Value:
    nodes = [each for each in arguments(node)["tensors"] if math.prod(shape_of(each))]  # caches begin with nothing
    known = [values.value(each) for each in nodes]
    alike = len({(each.grid and each.grid[:2], each.dtype) for each in known}) == 1
    order = known[0].order
    given = [values.value(each, order) if alike else values.real(each, order) for each in nodes]
    axis = order.index(arguments(node)["dim"] % len(order))
    options: dict[str, Any] = {"axis": axis, "fusedActivationFunction": NONE}
    return values.moved("CONCATENATION", given[0], given[1:], shape_of(node), order, "ConcatenationOptions", **options)


@write(aten.constant_pad_nd.default, aten.pad.default)
def _pad(values: Values, node: fx.Node) -> Value:
    named, given = arguments(node), values.value(source(node))
    if named.get("mode", "constant") != "constant":
        raise Refused(f"LiteRT pads with constants here (`{node.target}`: {named['mode']})")
    if named["value"] and given.grid is not None:
        given = values.real(source(node))
    around = [(0, 0)] * len(given.shape)
    for place, start in enumerate(range(0, len(named["pad"]), 2)):
        around[len(given.shape) - 1 - place] = tuple(named["pad"][start : start + 2])
    if any(side < 0 for sides in around for side in sides):
        raise Refused("LiteRT does not pad by less than nothing")
    laid = [list(around[dim]) for dim in given.order]
    return padded(values, given, laid, shape_of(node), named["value"] or None)


@write(aten.expand.default)
def _expanded(values: Values, node: fx.Node) -> Value:
    shape = shape_of(node)
    given = values.widened(values.real(source(node)), len(shape))
    if given.shape == tuple(shape):
        return given
    sizes = values.numbers(*(shape[dim] for dim in given.order))
    return values.moved("BROADCAST_TO", given, [sizes], shape, given.order, "BroadcastToOptions")


@write(aten.repeat.default)
def _repeated(values: Values, node: fx.Node) -> Value:
    times = arguments(node)["repeats"]
    given = values.widened(values.real(source(node)), len(times))
    laid = values.numbers(*(times[dim] for dim in given.order))
    return values.moved("TILE", given, [laid], shape_of(node), given.order)


@write(aten.max_pool2d.default)
def _max_pool(values: Values, node: fx.Node) -> Value:
    return maximum(values, node, values.value(source(node)), shape_of(node))


@write(NEAREST)
def _nearest(values: Values, node: fx.Node) -> Value:
    given, shape = values.value(source(node), channels_last(4)), shape_of(node)
    if any(now % before for now, before in zip(shape[2:], given.shape[2:], strict=True)):
        raise Refused("LiteRT repeats pixels a whole number of times")
    size = values.numbers(*shape[2:])
    return values.moved("RESIZE_NEAREST_NEIGHBOR", given, [size], shape, given.order, "ResizeNearestNeighborOptions")


@write(aten.upsample_bilinear2d.vec)
def _bilinear(values: Values, node: fx.Node) -> Value:
    given, shape = values.real(source(node), channels_last(4)), shape_of(node)
    corners = bool(arguments(node)["align_corners"])
    options = {"alignCorners": corners, "halfPixelCenters": not corners}
    size = values.numbers(*shape[2:])
    return values.moved("RESIZE_BILINEAR", given, [size], shape, given.order, "ResizeBilinearOptions", **options)


@write(aten.pixel_shuffle.default)
def _shuffled(values: Values, node: fx.Node) -> Value:
    given, times = values.value(source(node)), int(arguments(node)["upscale_factor"])
    count, channels, height, width = given.shape
    parts = values.reshaped(given, [count, channels // times**2, times, times, height, width])
    turned = (0, 1, 4, 2, 5, 3)
    laid = values.arranged(parts, turned)
    moved = Value(laid.index, tuple(laid.lies), plain(6), laid.dtype, laid.grid)
    return values.reshaped(moved, shape_of(node))


@write(aten.embedding.default)
def _rows(values: Values, node: fx.Node) -> Value:
    return _gathered(values, node, source(node), source(node, 1), 0)


@write(aten.index_select.default)
def _selected(values: Values, node: fx.Node) -> Value:
    return _gathered(values, node, source(node), source(node, 2), int(arguments(node)["dim"]))


@write(aten.index.Tensor)
def _indexed(values: Values, node: fx.Node) -> Value:
    places: list[fx.Node | None] = arguments(node)["indices"]
    used = [axis for axis, each in enumerate(places) if each is not None]
    if len(used) == 1:
        return _gathered(values, node, source(node), cast(fx.Node, places[used[0]]), used[0])
    if used != list(range(len(places))):
        raise Refused("LiteRT looks places up in the first dimensions")
    shape = np.broadcast_shapes(*(tuple(each.meta["val"].shape) for each in places if each is not None))
    return _picked(values, node, [_spread(values, values.value(each), shape) for each in places if each is not None])


@write(aten.unfold.default)
def _unfolded(values: Values, node: fx.Node) -> Value:
    """Windows by their places, which the operator puts where the dimension was; they go last."""
    rows, named, shape = values.real(source(node)), arguments(node), shape_of(node)
    rows = values.arranged(rows, plain(len(rows.shape)))
    axis = named["dimension"] % len(rows.shape)
    places = named["step"] * torch.arange(shape[axis])[:, None] + torch.arange(named["size"])
    laid, found = values.constant(places.to(torch.int32)), [*shape[:-1]]
    found.insert(axis + 1, shape[-1])
    made = values.make("GATHER", [rows, laid], found, dtype=rows.dtype, kind="GatherOptions", axis=axis)
    order = (*range(axis + 1), len(shape) - 1, *range(axis + 1, len(shape) - 1))
    return Value(made.index, tuple(shape), order, made.dtype, made.grid)


@write(aten.flip.default)
def _flipped(values: Values, node: fx.Node) -> Value:
    found, shape = values.real(source(node)), shape_of(node)
    found = values.arranged(found, plain(len(shape)))
    for dim in arguments(node)["dims"]:
        given: list[Value | int] = [found, values.numbers(dim % len(shape))]
        found = values.make("REVERSE_V2", given, shape, dtype=found.dtype, kind="ReverseV2Options")
    return found


@write(aten.gather.default)
def _taken(values: Values, node: fx.Node) -> Value:
    named, shape = arguments(node), shape_of(node)
    grids = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    places = [values.constant(grid.to(torch.int32)) for grid in grids]
    places[named["dim"] % len(shape)] = _spread(values, values.value(named["index"]), shape)
    return _picked(values, node, places)


def _spread(values: Values, places: Value, shape: Sequence[int]) -> Value:
    """Indices of one dimension for each of `shape`, int32."""
    places = values.arranged(values.widened(places, len(shape)), plain(len(shape)))
    places = values.typed(places, torch.int32)
    if places.shape == tuple(shape):
        return places
    return values.moved("BROADCAST_TO", places, [values.numbers(*shape)], shape, kind="BroadcastToOptions")


def _picked(values: Values, node: fx.Node, places: Sequence[Value]) -> Value:
    """What stands at `places`, of one shape, in the first dimensions of what `node` is given."""
    data = values.real(source(node))
    data, kept = values.arranged(data, plain(len(data.shape))), data.dtype
    if kept == torch.bool:  # of which there is no kernel
        data = values.typed(data, torch.int32)
    columns = [values.reshaped(each, [*each.shape, 1]) for each in places]
    rank = len(columns[0].shape) - 1
    joined: dict[str, Any] = {"axis": rank, "fusedActivationFunction": NONE}
    wide = [*places[0].shape, len(columns)]
    which = values.moved("CONCATENATION", columns[0], columns[1:], wide, kind="ConcatenationOptions", **joined)
    found = values.make("GATHER_ND", [data, which], shape_of(node), dtype=data.dtype, kind="GatherNdOptions")
    return values.typed(found, kept)


def _gathered(values: Values, node: fx.Node, table: fx.Node, places: fx.Node, axis: int) -> Value:
    rows, laid = values.real(table), values.value(places)
    rows, laid = (values.arranged(each, plain(len(each.shape))) for each in (rows, laid))
    options: dict[str, Any] = {"axis": axis % len(rows.shape)}
    return values.make("GATHER", [rows, laid], shape_of(node), dtype=rows.dtype, kind="GatherOptions", **options)
