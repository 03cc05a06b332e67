"""Bits by layer, as a budget allows."""

from __future__ import annotations

from torch import nn

from qsweep.hub.form import Layer
from qsweep.quantize._allocate import allocate
from qsweep.quantize._calibrate import calibration_inputs
from qsweep.quantize._prepare import prepared
from qsweep.quantize._sensitivity import sensitivity
from qsweep.quantize.mixed import Mixed
from qsweep.stage import Context


def chosen(config: Mixed, model: nn.Module, context: Context) -> dict[str, int]:
    """Bits by the name of the weight, those of the least score within the budget; raises Refused where nothing fits."""
    graph = prepared(config, model, context, lambda: calibration_inputs(config, context))
    layers = graph.layers()
    config.check_layers(layers, graph.recurrent_weights)
    every = sensitivity(config, graph, context)
    scores = {name: found for name, found in every.items() if not config.stays_float(name)}
    settled = _settled(config, layers)
    options = {name: {settled[name]: 0.0} if name in settled else found for name, found in scores.items()}
    sizes = dict.fromkeys(scores, 0)
    for number, layer in enumerate(layers):
        if layer.name not in sizes:
            continue
        cost = _cost_of_a_bit(config, layer, edge=number in (0, len(layers) - 1))
        shared = config.budget == "bytes"  # what several layers read is stored once
        sizes[layer.name] = cost if shared else sizes[layer.name] + cost
    found = allocate(list(options.values()), list(sizes.values()), config.average_bits)
    return dict(zip(options, found, strict=True))


def _settled(config: Mixed, layers: list[Layer]) -> dict[str, int]:
    """The bits that are given, not chosen."""
    edges = {layer.name: config.edge_bits for layer in (*layers[:1], *layers[-1:]) if config.edge_bits}
    patterns = {layer.name: config.pattern_of(layer.name) for layer in layers}
    return edges | {name: config.layer_bits[pattern] for name, pattern in patterns.items() if pattern is not None}


def _cost_of_a_bit(config: Mixed, layer: Layer, *, edge: bool) -> int:
    if config.budget == "bytes":
        return layer.weight.numel()
    if config.activation_bits is None:
        return layer.macs * 32
    return layer.macs * (config.edge_bits if edge and config.edge_bits else config.activation_bits)
