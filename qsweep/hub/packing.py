"""Integers of 2 to 8 bits, packed without gaps: a 2-bit tensor takes a quarter of the bytes of an 8-bit one."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def pack(integers: Tensor, bits: int) -> Tensor:
    """int8 values in [-2^(bits-1), 2^(bits-1) - 1], any shape, as ceil(n * bits / 8) bytes, low bits first."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if integers.numel() and (int(integers.min()) < low or int(integers.max()) > high):
        raise ValueError(f"values must lie in [{low}, {high}] for {bits} bits")
    offset = (integers.flatten().to(torch.int16) - low).to(torch.uint8).numpy()
    unpacked = np.unpackbits(offset[:, None], axis=1, bitorder="little", count=bits)
    return torch.from_numpy(np.packbits(unpacked, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int8 of `shape`. Raises ValueError where `packed` holds more or fewer."""
    count = math.prod(shape)
    if packed.numel() != -(-count * bits // 8):
        raise ValueError(f"{list(shape)} of {bits} bits must take {-(-count * bits // 8)} bytes (got {packed.numel()})")
    stream = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits).reshape(count, bits)
    values = np.packbits(stream, axis=1, bitorder="little")[:, 0].astype(np.int16) - (1 << (bits - 1))
    return torch.from_numpy(values.astype(np.int8)).reshape(shape)
