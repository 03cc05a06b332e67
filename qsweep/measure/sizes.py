"""Work and parameters of a model."""

from __future__ import annotations

import math

from torch import Tensor

from qsweep.hub.form import Layer, QuantizedModel, beside_weights, idle_zero_points, stored_bits
from qsweep.hub.kinds import DEQUANTIZE
from qsweep.hub.nodes import attributes, source
from qsweep.hub.ops import STORED
from qsweep.hub.weights import real_weight

_GRID_BITS = 64
"""Scale and zero point of one activation, 32 bits each."""


def work(model: QuantizedModel) -> dict[str, float]:
    """`macs`, `bit_operations`, `params`, `sparsity`, `size_theoretical_bytes` of one model.

    What is no layer, such as a product of two activations, counts at the bits of the model's type.
    """
    layers = model.layers()
    bits = stored_bits(model.graph)
    weights = {layer.name: _real(model, layer) for layer in layers}
    idle, beside = idle_zero_points(model.graph), beside_weights(model.graph)
    constants = {name: value for name, value in attributes(model.graph) if name not in idle}
    grids = {node.args[1:3] for node in model.graph.graph.nodes if node.target is DEQUANTIZE}
    stored = sum(
        _stored_bits(weights.get(name, value), bits.get(name, _value_bits(value, model)))
        for name, value in constants.items()
    )
    params = {name: value for name, value in constants.items() if name not in beside}
    macs = model.macs
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    return {
        "macs": macs,
        "bit_operations": sum(layer.macs * layer.weight_bits * layer.activation_bits for layer in layers)
        + (macs - sum(layer.macs for layer in layers)) * (8 * model.dtype.itemsize) ** 2,
        "params": sum(value.numel() for value in params.values()),
        "sparsity": zeros / total if total else 0.0,
        "size_theoretical_bytes": math.ceil((stored + len(grids) * _GRID_BITS) / 8),
    }


def _real(model: QuantizedModel, layer: Layer) -> Tensor:
    """The weights as numbers: which of them are zero, integers do not tell where zero points or tables are."""
    stored = source(layer.node, 1)
    return real_weight(model.graph, stored) if stored.target in STORED else layer.weight


def _value_bits(value: Tensor, model: QuantizedModel) -> int:
    size = value.element_size()
    return 8 * (min(size, model.dtype.itemsize) if value.is_floating_point() else size)


def _stored_bits(value: Tensor, bits: int) -> int:
    """Dense, or a mask and the values that are not zero, whichever is less."""
    dense = value.numel() * bits
    return min(dense, value.numel() + int((value != 0).sum()) * bits)
