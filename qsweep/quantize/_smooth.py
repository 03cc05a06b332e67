"""SmoothQuant: what makes activations hard to quantize moves into the weights that read them, in float."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.errors import NotFinite
from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import constant, nodes_of, shape_seen, source
from qsweep.quantize._channels import (
    input_maxima,
    output_axis,
    readers,
    replace_constant,
    scale_inputs,
    wide_constant,
)

_BATCH = 128
_AFFINE: dict[object, tuple[int, ...]] = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
    aten.batch_norm.default: (1, 2),
}
"""Ops that end with a factor and a shift for each channel: the arguments that hold them."""


class Site(NamedTuple):
    """A normalization with a factor for each channel, and the layers that alone read it."""

    norm: fx.Node
    layers: tuple[fx.Node, ...]


def sites(model: QuantizedModel) -> list[Site]:
    """Where scales can move, in order of execution: norms with constants of their own that only layers read."""
    with torch.no_grad():
        ShapeProp(model.graph).propagate(model.example)
    found = []
    for norm in nodes_of(model.graph, _AFFINE):
        if _has_own_factor(model.graph, norm):
            axis = 1 if norm.target is aten.batch_norm.default else len(shape_seen(norm)) - 1
            reading = readers(model.graph, norm, axis)
            if reading:
                found.append(Site(norm, tuple(reading)))
    return found


@torch.no_grad()
def channel_maxima(model: QuantizedModel, inputs: Tensor) -> dict[str, Tensor]:
    """(C,) largest absolute value over `inputs` (N, ...) of each channel that the layers of a site read, by its norm.

    Raises NotFinite where an activation is not.
    """
    found = sites(model)
    interpreter = _Maxima(model.graph, found)
    if found:
        for batch in torch.split(inputs, _BATCH):
            interpreter.run(batch)
    return interpreter.maxima


class _Maxima(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, found: list[Site]) -> None:
        super().__init__(graph)
        self.norm_of = {source(layer): (site.norm, layer) for site in found for layer in site.layers}
        self.maxima: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.norm_of and value.numel():
            norm, layer = self.norm_of[n]
            largest = value.abs().movedim(output_axis(self.module, layer), 0).flatten(1).amax(1)  # type: ignore[arg-type]
            if not largest.isfinite().all():
                raise NotFinite("an activation is NaN or infinite on the calibration samples")
            self.maxima[norm.name] = torch.maximum(self.maxima.get(norm.name, largest), largest)
        return value


@torch.no_grad()
def smooth(model: QuantizedModel, maxima: dict[str, Tensor], alpha: float) -> int:
    """Divide each channel that a norm gives by s_j, and multiply the weights that read it, in place; returns the sites.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), `maxima` (`channel_maxima`) over what the layers read and W over all of
    their weights; the factor and shift of the norm take 1/s_j, so no op is added. Exact but for float32 rounding. Norms
    are layer, RMS and unfolded batch norms whose result nothing but convolutions and linears reads, through ReLU,
    pooling or a change of shape at most. Channels without a finite s_j above 0 stay as they are.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
    (2023), section 4, equation 4.
    """
    found = [site for site in sites(model) if site.norm.name in maxima]
    for site in found:
        _smooth(model.graph, site, maxima[site.norm.name].double(), alpha)
    model.graph.graph.eliminate_dead_code()
    model.graph.recompile()
    return len(found)


def _smooth(graph: fx.GraphModule, site: Site, given: Tensor, alpha: float) -> None:
    weights = {layer: wide_constant(graph, layer, 1) for layer in site.layers}
    taken = torch.stack([input_maxima(layer, weight) for layer, weight in weights.items()]).amax(0)
    scale = given.pow(alpha) / taken.pow(1 - alpha)
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    for index in _AFFINE[site.norm.target]:
        if len(site.norm.args) > index and constant(graph, site.norm.args[index]) is not None:
            replace_constant(graph, site.norm, index, wide_constant(graph, site.norm, index) / scale)
    for layer, weight in weights.items():
        replace_constant(graph, layer, 1, scale_inputs(layer, weight, scale))


def _has_own_factor(graph: fx.GraphModule, norm: fx.Node) -> bool:
    """Whether it has one, for the last dimension alone where it is a layer norm, that can be changed."""
    index = _AFFINE[norm.target][0]
    factor = constant(graph, norm.args[index]) if len(norm.args) > index else None
    return factor is not None and factor.dim() == 1
