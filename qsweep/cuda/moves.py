"""Ops that only move integers: most are views of what they move, which costs nothing; the rest are copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from qsweep.cuda import pointwise, pool
from qsweep.cuda.buffers import Value
from qsweep.cuda.place import Places, joins_channels, spatial_pad
from qsweep.cuda.steps import Layer, Move
from qsweep.hub.kinds import LINEARS, NEAREST, aten
from qsweep.hub.nodes import arguments

Launch = Callable[[], Any]

_IDLE = {aten.contiguous.default, aten.clone.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def move(step: Move, given: Value, places: Places) -> list[Launch]:
    """What has to run for `step` on `given`, the first value it moves; its result is put among `places`."""
    node, out = step.node, step.out.node
    if node.target is aten.max_pool2d.default:
        return [_max_pool(node, given, places[out])]
    if node.target is NEAREST:
        return [partial(pointwise.repeat, given.pixels, places[out].pixels)]
    if node.target is aten.cat.default:
        return _concatenation(step, places)
    if node.target is aten.pad.default:
        return _pad(step, given, places)
    view = given if node.target in _IDLE else _view(node, given)
    if view is None and node.target in _RESHAPES and _only_linears_read(out, places):
        view = _in_memory_order(given, places.plan.shapes[out])
    if view is not None:
        places.found[out] = view
        return []
    return [copied(node, given.logical, places[out].logical)]


def _view(node: fx.Node, given: Value) -> Value | None:
    """The result without copying, where that is possible."""
    moved = _applied(node, given.logical)
    same = moved.untyped_storage().data_ptr() == given.logical.untyped_storage().data_ptr()
    return Value(moved) if same and given.order is None else None


def _applied(node: fx.Node, values: Tensor) -> Tensor:
    target: Any = aten.reshape.default if node.target is aten.view.default else node.target
    return cast(Tensor, target(values, *node.args[1:], **node.kwargs))


def copied(node: fx.Node, given: Tensor, out: Tensor) -> Launch:
    """Writes `given`, moved by `node`, into `out`."""
    if node.target is aten.pixel_shuffle.default:  # in one pass
        times = int(arguments(node)["upscale_factor"])
        apart = torch.unflatten(torch.unflatten(out, 3, (-1, times)), 2, (-1, times))
        return copy(torch.unflatten(given, 1, (-1, times, times)).permute(0, 1, 4, 2, 5, 3), apart)
    try:  # a reshape is a copy between views of one shape
        into = out.view(given.shape) if node.target in _RESHAPES else None
    except RuntimeError:
        into = None
    if into is not None and given.dim() <= pointwise.DIMENSIONS:
        return copy(given, into)
    return lambda: out.copy_(_applied(node, given))


def copy(given: Tensor, out: Tensor) -> Launch:
    """Writes `given` into `out`, both int8 of one shape; the numbers beside each other in `out` come last."""
    if out.dim() > pointwise.DIMENSIONS:
        return partial(out.copy_, given)
    to, values = inner_last(out, given)
    return partial(pointwise.copy, values, to)


def inner_last(out: Tensor, *others: Tensor, by: Tensor | None = None) -> list[Tensor]:
    """All with their dimensions in the order in which those of `by`, else of `out`, lie in memory; where there are more
    than kernels take, all as rows: those of `out` lie together, others are copied where theirs do not."""
    if out.dim() > pointwise.DIMENSIONS:
        return [out.view(-1, out.shape[-1]), *(other.reshape(-1, out.shape[-1]) for other in others)]
    order = memory_order(out if by is None else by)
    return [tensor.permute(order) for tensor in (out, *others)]


def memory_order(values: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the one whose numbers are beside each other last."""
    strides = values.stride()
    return sorted(range(values.dim()), key=lambda dim: (-strides[dim], dim))


def _only_linears_read(node: fx.Node, places: Places) -> bool:
    """Whether linears multiply it, and nothing does anything else with it, not even add it to their results."""
    readers = places.readers[node]
    return bool(readers) and all(
        isinstance(step, Layer)
        and step.node.target in LINEARS
        and (step.residual is None or step.residual.node is not node)
        for step in readers
    )


def _in_memory_order(given: Value, shape: torch.Size) -> Value | None:
    """Images (N, C, H, W) as rows (N, H * W * C), which linears with their weights in this order can read."""
    if given.logical.dim() != 4 or len(shape) != 2 or len(given.logical) != shape[0]:
        return None
    pixels = given.pixels
    _, height, width, count = pixels.shape
    if pixels.stride()[1:] != (width * count, count, 1):
        return None
    order = torch.arange(count * height * width).view(count, height, width).permute(1, 2, 0).reshape(-1)
    return Value(pixels.reshape(shape), order=order)


def _max_pool(node: fx.Node, given: Value, out: Value) -> Launch:
    kernel, stride, padding = windows(node)
    dilation = _pair(arguments(node)["dilation"])
    if kernel == given.pixels.shape[1:3] and not any(padding):
        return partial(pool.global_max_pool, given.pixels, out.pixels[:, 0, 0])
    return partial(
        pool.max_pool2d, given.pixels, out.pixels, kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )


def windows(node: fx.Node) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and padding of a pool."""
    sizes = arguments(node)
    kernel = _pair(sizes["kernel_size"])
    return kernel, _pair(sizes["stride"]) if sizes["stride"] else kernel, _pair(sizes["padding"])


def _pair(sizes: Any) -> tuple[int, int]:
    return (sizes[0], sizes[-1])


def _concatenation(step: Move, places: Places) -> list[Launch]:
    """Nothing where all parts were written in place; else copies of those that were not."""
    out = step.out.node
    whole = _standing(step, places)
    if whole is not None and out not in places.homes:
        places.found[out] = whole
        return []
    launches, start, dim = [], 0, int(arguments(step.node)["dim"])
    for part in step.given:
        given, size = places[part.node].logical, places.plan.shapes[part.node][dim]
        into = places[out].logical.narrow(dim, start, size)
        if (given.data_ptr(), given.stride()) != (into.data_ptr(), into.stride()):
            launches.append(copy(given, into))
        start += size
    return launches


def _standing(step: Move, places: Places) -> Value | None:
    """The parts as one value, where they lie in order beside each other in the buffer of some other concatenation."""
    if not joins_channels(step.node, len(places.plan.shapes[step.out.node])):
        return None
    homes = [places.homes.get(part.node) for part in step.given]
    first = homes[0]
    if first is None or first[0] is step.out.node:
        return None
    start, channels = first[1], [places.plan.shapes[part.node][1] for part in step.given]
    starts = [start + sum(channels[:place]) for place in range(len(channels))]
    if homes != [(first[0], place) for place in starts]:
        return None
    return places[first[0]].part(start, sum(channels))


def _pad(step: Move, given: Value, places: Places) -> list[Launch]:
    """The halo as part of the image where it is wide enough, else a copy into a buffer that is full of zero points."""
    out = step.out.node
    halo = spatial_pad(step.node, given.logical.dim())
    if halo is not None and given.halo.holds(halo) and given.channels_together:
        beside = given.beside(halo)
        places.found[out] = beside if given.logical.dim() == 4 else Value(beside.logical.squeeze(2), beside.halo)
        return []
    inside = places[out].logical
    pads = arguments(step.node)["pad"]
    taken = given.logical
    for place in range(len(pads) // 2):
        dim, before, after = -1 - place, int(pads[2 * place]), int(pads[2 * place + 1])
        taken = taken.narrow(dim, max(0, -before), taken.shape[dim] + min(0, before) + min(0, after))
        inside = inside.narrow(dim, max(0, before), taken.shape[dim])
    return [copy(taken, inside)]
