"""Multiply-accumulates of any ops, as PyTorch counts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _recurrent(sequence: Any, own: Any, before: Any, *args: Any, **kwargs: Any) -> int:
    """Of one layer in one direction over (T, B, inputs), by its weights (gates, inputs) and (gates, hidden)."""
    return int(2 * math.prod(sequence[:2]) * (math.prod(own) + math.prod(before)))


_ON_A_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
}
"""What PyTorch's counter does not know."""


def counted(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` gives, and how many products convolutions, matrix products and attention have summed in it, whatever
    ops they are called by."""
    with FlopCounterMode(display=False, custom_mapping=_ON_A_CPU) as counter:
        result = run()
    return result, int(counter.get_total_flops()) // 2
