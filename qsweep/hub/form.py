"""The hub form: what every quantization method leaves and every engine reads.

An ATen graph of the model in inference form with batch norm folded, in which
`quantized_decomposed.quantize_per_tensor` / `dequantize_per_tensor` (int8 container, `quant_min`, `quant_max` of the bit
width) stand on activations and `dequantize_per_channel` on constant int8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule


@dataclass(frozen=True)
class QuantizedModel:
    """The hub form of one model. A model that was not quantized has no quantize ops in its graph."""

    graph: GraphModule
    example: Tensor
    """Two samples as the model takes them, float32; the batch dimension of `graph` is dynamic."""
