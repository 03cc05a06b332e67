"""Integer activations in memory: int8, channels last, pixels around an image that hold its zero point.

A kernel that pads reads those pixels and needs no masks, whatever the zero point. Channels are padded to 16, so that
loads take 16 bytes; what the channels past the last one hold does not count, as the weights there are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNED = 16


class Halo(NamedTuple):
    """Pixels around an image."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def wide_as(self, other: Halo) -> Halo:
        """As wide as the wider of both on each side."""
        return Halo(*map(max, self, other))

    def plus(self, other: Halo) -> Halo:
        return Halo(*(one + two for one, two in zip(self, other, strict=True)))

    def minus(self, other: Halo) -> Halo:
        return Halo(*(one - two for one, two in zip(self, other, strict=True)))

    def holds(self, other: Halo) -> bool:
        return all(one >= two for one, two in zip(self, other, strict=True))


NO_HALO = Halo()


@dataclass(frozen=True)
class Value:
    """Integers as the graph sees them, wherever they lie."""

    logical: Tensor
    """int8, shaped as in the graph, any strides."""
    halo: Halo = NO_HALO
    """Pixels around `logical` that hold the zero point."""
    order: Tensor | None = None
    """Where set, `logical` (N, F) has its columns in memory's order: column i is the graph's column order[i]."""

    @property
    def pixels(self) -> Tensor:
        """(N, H, W, C) of images (N, C, H, W) and of sequences (N, C, L), which are one pixel high."""
        return channels_last(self.logical)

    def around(self, halo: Halo, channels: int) -> Tensor:
        """(N, H', W', `channels`) with `halo` pixels on each side; channels past the last one are whatever lies there.

        Needs channels beside each other, and as wide a halo of its own.
        """
        assert self.halo.holds(halo) and self.channels_together
        pixels = self.pixels
        batch, down, across, _ = pixels.stride()
        count, height, width, _ = pixels.shape
        size = count, height + halo.top + halo.bottom, width + halo.left + halo.right, channels
        start = pixels.storage_offset() - halo.top * down - halo.left * across
        return pixels.as_strided(size, (batch, down, across, 1), start)

    @property
    def channels_together(self) -> bool:
        return self.pixels.stride(3) == 1 or self.pixels.shape[3] == 1

    @property
    def rows_together(self) -> bool:
        """Whether the numbers of a row of (M, K) lie beside each other."""
        return self.logical.stride(1) == 1 or self.logical.shape[1] == 1

    def rows(self, columns: int) -> Tensor:
        """(M, `columns`) of (M, K), `columns` >= K; those past the last one are whatever lies there.

        Needs the numbers of a row beside each other.
        """
        assert self.rows_together
        return self.logical.as_strided((len(self.logical), columns), (self.logical.stride(0), 1))

    def beside(self, halo: Halo) -> Value:
        """The image with `halo` of the pixels around it: zero padding that costs nothing."""
        images = self.around(halo, self.pixels.shape[3]).permute(0, 3, 1, 2)
        return Value(images, self.halo.minus(halo))

    def part(self, start: int, size: int) -> Value:
        """Some of its channels."""
        return Value(self.logical.narrow(1, start, size), self.halo)


def channels_last(values: Tensor) -> Tensor:
    """(N, C, H, W) or (N, C, L) as (N, H, W, C)."""
    return (values if values.dim() == 4 else values.unsqueeze(2)).permute(0, 2, 3, 1)


def up(count: int, multiple: int = ALIGNED) -> int:
    """`count` rounded up."""
    return -(-count // multiple) * multiple


Take = Callable[[int, Hashable], Tensor]
"""`take(count, frame)`: int8 (count,) for an image whose halo is told by `frame`, or for anything (None)."""


def allocate(shape: torch.Size, take: Take, *, halo: Halo = NO_HALO, channels: int = 0, image: bool) -> Value:
    """A buffer in the memory that `take` gives.

    `image`: (N, C, H, W) or (N, C, L) with channels last; else the last dimension is. `channels`: as many as each pixel
    or row has room for, 0: those of `shape`, rounded up to 16.
    """
    if not image:
        rows, columns = shape[:-1], shape[-1]
        room = take(rows.numel() * (channels or up(columns)), None)
        return Value(room.view(*rows, -1)[..., :columns])
    batch, count, *size = shape
    height, width = size if len(size) == 2 else (1, *size)
    wide = width + halo.left + halo.right, channels or up(count)
    sizes = batch, height + halo.top + halo.bottom, *wide
    room = take(torch.Size(sizes).numel(), None if halo == NO_HALO else (sizes, halo)).view(sizes)
    inside = room[:, halo.top : halo.top + height, halo.left : halo.left + width, :count].permute(0, 3, 1, 2)
    return Value(inside if len(size) == 2 else inside.squeeze(2), halo)


def as_rows(values: Tensor) -> Tensor:
    """(..., K) as (M, K), the numbers of a row side by side; copied where they do not lie so."""
    rows = values.reshape(-1, values.shape[-1])
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)
