"""Means and maxima over images, and adaptive pools, as the pools that have integer kernels in runtimes."""

from __future__ import annotations

import math
import operator
from itertools import pairwise

from torch import fx

from qsweep.hub.kinds import RECTIFIERS, aten, rectified
from qsweep.hub.nodes import arguments, nodes_of, source
from qsweep.hub.traced import replace_by, shape_of

_MEANS = {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default}
_MAXIMA = {aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default}

Windows = list[tuple[int, int]]
"""Where each window of a pool begins and ends, along one dimension."""


def with_pools(graph: fx.GraphModule) -> None:
    """Pools whose windows are all of one size, a stride apart that they name, and one op for means of whole images, in
    place; sequences are images one pixel high."""
    for node in nodes_of(graph, {operator.getitem, *_MEANS}):
        pool = node if node.target in _MEANS else source(node)
        if pool is node or (pool.target in _MAXIMA and node.args[1] == 0):
            _replace_adaptive(graph, node, pool)
    for node in nodes_of(graph, {aten.max_pool2d.default}):
        _without_infinities(node)
    for node in nodes_of(graph, {aten.avg_pool2d.default, aten.max_pool2d.default}):
        given = arguments(node)
        given["stride"] = given["stride"] or given["kernel_size"]  # ExecuTorch looks for them
        given["ceil_mode"] = given["ceil_mode"] and not _ends_at_the_border(node)
        node.args, node.kwargs = tuple(given.values()), {}
    for node in nodes_of(graph, {aten.avg_pool2d.default}):
        _replace_global(graph, node)
    for node in nodes_of(graph, {aten.mean.dim, aten.amax.default}):
        _replace_reduction(graph, node)


def _without_infinities(pool: fx.Node) -> None:
    """A max pool behind a pad of -inf, as "same" pools are written, with a padding of its own, which is that; or behind
    zeros, where it reads no number below."""
    pad, given = source(pool), arguments(pool)
    if pad.target is not aten.pad.default or len(pad.users) > 1 or any(given["padding"]):
        return
    around = arguments(pad)
    if around["value"] != -math.inf or len(around["pad"]) != 4:
        return
    left, right, top, bottom = around["pad"]
    kernel = (list(given["kernel_size"]) * 2)[:2]
    before = source(pad)
    if before.target in RECTIFIERS and rectified(before)[0] >= 0:
        pad.args = (before, around["pad"], "constant", 0.0)
    elif (top, left) == (bottom, right) and 2 * top <= kernel[0] and 2 * left <= kernel[1]:
        pool.args = (before, kernel, given["stride"], [top, left], given["dilation"], given["ceil_mode"])


def _ends_at_the_border(node: fx.Node) -> bool:
    """Whether the windows of a pool of `ceil_mode` end where the image does, so that it makes no difference."""
    given, shape = arguments(node), shape_of(source(node))
    if shape is None or not given["ceil_mode"]:
        return False
    kernel, padding, dilation = list(given["kernel_size"]), list(given["padding"]), list(given.get("dilation", [1]))
    options = [(each * 2)[:2] for each in (kernel, list(given["stride"]) or kernel, padding, dilation)]
    return all(
        (size + 2 * padding - dilation * (kernel - 1) - 1) % stride == 0
        for size, kernel, stride, padding, dilation in zip(shape[-2:], *options, strict=True)
    )


def _replace_reduction(graph: fx.GraphModule, node: fx.Node) -> None:
    given, shape, largest = arguments(node), shape_of(source(node)), node.target is aten.amax.default
    if shape is None or given.get("dtype") is not None:
        return
    over, flat = sorted(dim % len(shape) for dim in given["dim"] or []), len(shape) == 3
    if (len(shape), over) not in ((4, [2, 3]), (3, [2])) or (largest and min(shape[2:]) < 0):
        return
    call = graph.graph.call_function
    with graph.graph.inserting_before(node):
        image = call(aten.unsqueeze.default, (source(node), 2)) if flat else source(node)
        pooled = _pooled(graph, image, [[(0, size)] for size in (1, *shape[2:])[-2:]], largest=largest)
        assert pooled is not None
        if not given["keepdim"]:
            pooled = call(aten.flatten.using_ints, (pooled, 1))
        elif flat:
            pooled = call(aten.squeeze.dim, (pooled, 2))
        replace_by(node, pooled)


def _replace_adaptive(graph: fx.GraphModule, node: fx.Node, pool: fx.Node) -> None:
    """`node`: the values that `pool` gives."""
    shape, counts = shape_of(source(pool)), list(arguments(pool)["output_size"])
    flat = len(counts) == 1
    if shape is None or len(shape) < 3 or min(shape[-len(counts) :]) < 0:
        return
    call, sizes = graph.graph.call_function, shape[-len(counts) :]
    windows = [_windows(size, count) for size, count in zip(sizes, counts, strict=True)]
    with graph.graph.inserting_before(node):
        image = call(aten.unsqueeze.default, (source(pool), 2)) if flat else source(pool)
        pooled = _pooled(graph, image, [[(0, 1)], *windows][-2:], largest=pool.target in _MAXIMA)
        if pooled is not None:
            replace_by(node, call(aten.squeeze.dim, (pooled, 2)) if flat else pooled)


def _replace_global(graph: fx.GraphModule, node: fx.Node) -> None:
    """An average pool whose window is the image."""
    given, shape = arguments(node), shape_of(source(node))
    if shape is None or any(given["padding"]) or given["divisor_override"] is not None:
        return
    if (list(given["kernel_size"]) * 2)[:2] == shape[-2:]:
        with graph.graph.inserting_before(node):
            pooled = _pooled(graph, source(node), [[(0, size)] for size in shape[-2:]], largest=False)
            assert pooled is not None
            replace_by(node, pooled)


def _windows(size: int, count: int) -> Windows:
    return [(place * size // count, -(-(place + 1) * size // count)) for place in range(count)]


def _pooled(graph: fx.GraphModule, image: fx.Node, windows: list[Windows], *, largest: bool) -> fx.Node | None:
    """`image` pooled over `windows` of its height and width; None for means over windows that differ in size."""
    call = graph.graph.call_function
    if not largest and all(len(each) == 1 for each in windows):
        return call(aten.adaptive_avg_pool2d.default, (image, [1, 1]))
    even = [found for each in windows if (found := _even(each)) is not None]
    if len(even) == len(windows):
        kernel, stride = ([*sizes] for sizes in zip(*even, strict=True))
        return call(aten.max_pool2d.default if largest else aten.avg_pool2d.default, (image, kernel, stride))
    for dim, each in zip((-2, -1), windows, strict=True) if largest else ():
        parts = [call(aten.slice.Tensor, (image, dim, start, end)) for start, end in each]
        image = call(aten.cat.default, ([call(aten.amax.default, (part, [dim], True)) for part in parts], dim))
    return image if largest else None


def _even(windows: Windows) -> tuple[int, int] | None:
    """Size and stride, where all windows have one; that of windows over one and the same pixel would be 0."""
    starts, sizes = [start for start, _ in windows], {end - start for start, end in windows}
    strides = {after - start for start, after in pairwise(starts)} or {*sizes}
    return (sizes.pop(), strides.pop()) if len(sizes) == len(strides) == 1 and strides != {0} else None


def with_plain_borders(graph: fx.GraphModule) -> None:
    """Average pools of `ceil_mode` that count the padding, behind a pad of zeros instead: runtimes do not agree on what
    windows past the padding count."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.avg_pool2d.default}):
        given = arguments(node)
        if not (given["ceil_mode"] and given["count_include_pad"] and given["divisor_override"] is None):
            continue
        with graph.graph.inserting_before(node):
            value, padding = source(node), (list(given["padding"]) * 2)[:2]
            if any(padding):
                value = call(aten.pad.default, (value, [padding[1], padding[1], padding[0], padding[0]]))
            window = given["kernel_size"], given["stride"]
            replace_by(node, call(aten.avg_pool2d.default, (value, *window, [0, 0], True, False)))
