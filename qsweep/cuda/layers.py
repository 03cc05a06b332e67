"""Convolutions and linears: which kernel runs one, its packed weights, and how its block shape is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qsweep.cuda import conv, depthwise, linear
from qsweep.cuda.arithmetic import Tile
from qsweep.cuda.buffers import Value, channels_last, up
from qsweep.cuda.numbers import requantize, residual
from qsweep.cuda.place import IMAGE_CHANNELS, padding_of
from qsweep.cuda.steps import Layer, RowLayer
from qsweep.hub.form import weight_bits_of
from qsweep.hub.kinds import LINEARS, aten
from qsweep.hub.nodes import arguments, constant, source

FEW_ROWS = 64
"""Products of at most so many rows are bound by reading their weights: linears read those of 4 bits packed.

A GPU that does 1500 T operations a second on 4.3 TB/s has 350 operations a byte to spend; a row costs 2 for each byte
of weights. Up to 64 rows most of the time is the weights' even where bandwidth is not fully reached.
"""


@dataclass
class Product:
    """A layer's kernel, ready to launch."""

    name: str
    """Of its weight."""
    kind: str
    """Kernel and all that its speed depends on but the block shape."""
    rows: int
    columns: int
    depth: int
    """Sums, and products in each."""
    launch: Callable[..., Any]
    splits: bool = True
    """Whether the kernel can split the products of a sum among programs."""
    depthwise: bool = False
    """Whether it is no matrix product, and its rows are four pixels each."""
    tile: Tile | None = None
    """None: the kernel's own choice."""

    def __call__(self) -> None:
        self.launch(tile=self.tile)


def product(graph: fx.GraphModule, layer: Layer, given: Value, other: Tensor | None, out: Tensor) -> Product:
    """`layer` from `given` into `out` (shaped as in the graph); `other`: its residual, shaped so too."""
    stored = source(layer.node, 1)
    integers = constant(graph, stored)
    assert integers is not None
    if layer.node.target in LINEARS:
        made = _linear(graph, layer, integers, given, other, out)
    else:
        made = _convolution(graph, layer, integers, given, other, out)
    made.name = str(source(stored).target)
    return made


def row_product(graph: fx.GraphModule, layer: RowLayer, rows: Tensor, row_scale: Tensor, out: Tensor) -> Product:
    """`layer` from rows (M, KP) with scales (M,) into `out` (M, N)."""
    node, stored = layer.node, source(layer.node, 1)
    integers, scale = constant(graph, stored), constant(graph, stored.args[1])
    assert integers is not None and scale is not None
    bias = constant(graph, node.args[2]) if len(node.args) > 2 else None
    launch = partial(
        linear.linear_rows,
        rows,
        row_scale,
        linear.pack_weight(integers).to(out.device),
        scale.detach().float().to(out.device),
        None if bias is None else bias.detach().float().to(out.device),
        out,
    )
    (count, columns), depth = out.shape, rows.shape[1]
    kind = f"linear_rows {count}x{columns}x{depth} {str(out.dtype).removeprefix('torch.')}"
    return Product(str(source(stored).target), kind, count, columns, depth, launch, splits=False)


def _linear(
    graph: fx.GraphModule, layer: Layer, integers: Tensor, given: Value, other: Tensor | None, out: Tensor
) -> Product:
    (rows, depth), columns = given.logical.shape, len(integers)
    if given.order is not None:
        integers = integers[:, given.order.to(integers.device)]
    packed4 = weight_bits_of(source(layer.node, 1)) <= 4 and rows <= FEW_ROWS and depth < linear.W4_DEPTH
    pack, kernel = (linear.pack_weight4, linear.linear_w4) if packed4 else (linear.pack_weight, linear.linear)
    weight = pack(integers).to(out.device)
    x = given.rows(weight.shape[1] * (2 if packed4 else 1))
    launch = partial(
        kernel,
        x,
        weight,
        requantize(graph, layer, out.device),
        out,
        residual=None if other is None else residual(layer, other),
    )
    kind = f"{kernel.__name__} {rows}x{columns}x{x.shape[1]}{_loads(x)}{_ending(layer)}"
    return Product("", kind, rows, columns, depth, launch)


def _convolution(
    graph: fx.GraphModule, layer: Layer, integers: Tensor, given: Value, other: Tensor | None, out: Tensor
) -> Product:
    node, given_arguments = layer.node, arguments(layer.node)
    stride, dilation, groups = (given_arguments[name] for name in ("stride", "dilation", "groups"))
    if node.target is aten.conv1d.default:
        integers, stride, dilation = integers.unsqueeze(2), [1, *stride], [1, *dilation]
    apart = 1 < groups == len(integers) == given.pixels.shape[3]
    kernel: Any = depthwise if apart else conv
    channels = up(given.pixels.shape[3])
    if kernel is conv and groups == 1 and given.pixels.shape[3] <= IMAGE_CHANNELS and given.pixels.stride(2) == 4:
        channels = IMAGE_CHANNELS
    x, pixels, window = given.around(padding_of(node), channels), channels_last(out), tuple(integers.shape[2:])
    if channels == IMAGE_CHANNELS and window[1] > 1 and dilation[-1] == 1:
        x, integers = lines(x, integers, stride[-1], pixels.shape[2])
        channels, stride = x.shape[3], [stride[0], 1]
    launch = partial(
        kernel.conv2d,
        x,
        kernel.pack_weight(integers, groups, channels).to(out.device),
        requantize(graph, layer, out.device),
        pixels,
        stride=_pair(stride),
        dilation=_pair(dilation),
        groups=groups,
        residual=None if other is None else residual(layer, channels_last(other)),
    )
    sizes = f"{'x'.join(map(str, x.shape))} to {'x'.join(map(str, pixels.shape))}"
    numbers = f"k{'x'.join(map(str, window))} s{_pair(stride)} d{_pair(dilation)} g{groups}"
    kind = f"{'depthwise fours' if apart else 'conv'} {sizes} {numbers}{_loads(x)}{_ending(layer)}"
    depth = integers[0].numel() // integers.shape[1] * (channels // groups or 1)
    count = depthwise.rows_of(pixels) if apart else pixels.shape[:3].numel()
    return Product("", kind, count, len(integers), depth, launch, splits=not apart, depthwise=apart)


def lines(x: Tensor, weight: Tensor, stride: int, width: int) -> tuple[Tensor, Tensor]:
    """A convolution of images as one whose windows are one pixel wide: a line of a window lies together in memory.

    `x`: int8 (N, H, W, 4), contiguous along a line, with its halo; `weight`: int8 (OC, C, KH, KW), C <= 4; `stride`: of
    the columns. Returns x as (N, H, `width`, CP), pixels that overlap, and the weights as (OC, CP, KH, 1), CP = 4 * KW
    rounded up to 16. Loads are then as wide as 4 * `stride` bytes, and what is past a line's end meets weights of 0.
    """
    batch, down, across, _ = x.stride()
    count, channels, height, _ = weight.shape
    apart = torch.nn.functional.pad(weight.permute(0, 2, 3, 1), (0, across - channels)).reshape(count, height, -1)
    taps = torch.nn.functional.pad(apart, (0, up(apart.shape[2]) - apart.shape[2])).permute(0, 2, 1).unsqueeze(3)
    size = (len(x), x.shape[1], width, taps.shape[1])
    return x.as_strided(size, (batch, down, across * stride, 1), x.storage_offset()), taps


def _pair(sizes: list[int]) -> tuple[int, int]:
    return (sizes[0], sizes[-1])


def _loads(x: Tensor) -> str:
    """Parts of a buffer may lie so that a kernel for 16 bytes at a time cannot read them."""
    steps = [x.data_ptr(), *(stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)]
    return " unaligned" if any(step % 16 for step in steps) else ""


def _ending(layer: Layer) -> str:
    return (" residual" if layer.residual else "") + (" table" if layer.then else "") + ("" if layer.grid else " real")
