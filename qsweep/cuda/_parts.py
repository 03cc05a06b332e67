"""Sums whose products are split among programs: a workspace for the parts, and the kernel that adds them up."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qsweep.cuda._launch import EXACT
from qsweep.cuda._product import finish_parts
from qsweep.cuda.arithmetic import Tile


def parts_of(tile: Tile, depth: int, rows: int, columns: int, device: torch.device) -> tuple[int, Tensor | None]:
    """Into how many parts the products of each sum are split, none of them empty, and, if there are several, room for
    them, int32 (parts, rows, columns)."""
    steps = -(-depth // tile.depth)
    split = -(-steps // -(-steps // tile.split))
    return split, torch.empty((split, rows, columns), dtype=torch.int32, device=device) if split > 1 else None


def add_up(parts: Tensor, arguments: dict[str, Any]) -> None:
    """Add up `parts` and end as `arguments`, from `finish_arguments`, say."""
    split, rows, columns = parts.shape
    blocks = (triton.cdiv(rows, 16), triton.cdiv(columns, 64))
    finish_parts[blocks](parts, M=rows, OC=columns, BM=16, BN=64, SPLIT=split, **arguments, **EXACT)
