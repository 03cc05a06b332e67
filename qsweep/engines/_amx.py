"""What a kernel of oneDNN's for AMX, `brgconv_avx512_amx` of int8, gets wrong where zero is not the integer 0. OpenVINO
2026 and PyTorch 2.13 call it; found by trying shapes (`LOG.md`)."""

from __future__ import annotations

from collections.abc import Sequence

WIDE = 32
"""Channels of a group from which on all is right."""


def wrong_in_groups(channels: int, kernel: Sequence[int]) -> bool:
    """Whether of several groups of so many channels all but the first are garbage, at many sizes of images."""
    return WIDE // 2 < channels < WIDE and set(kernel) != {1}


def wrong_in_a_row(channels: int, taps: int) -> bool:
    """Whether all that a convolution over one dimension gives is garbage. Over images one pixel wide it is right."""
    return channels < WIDE and channels * taps >= 128 and channels * taps % 64 == 0
