"""A training that begins with the integers which rounding after training has chosen."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from qsweep.hub.nodes import constant, source
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._calibrate import calibrated
from qsweep.quantize._norm import FoldedNorm, weight_quantizers
from qsweep.quantize._observers import NearestWeight
from qsweep.quantize._rounding import round_weights
from qsweep.quantize.ptq import PTQ
from qsweep.stage import Context

_WITHIN = 0.49
"""Of a step: how far a weight begins from the level it is to round to."""


@torch.no_grad()
def begin_rounded(graph: fx.GraphModule, ptq: PTQ, model: nn.Module, context: Context) -> None:
    """Move each weight of the training graph of `model` no further than it must, so that it rounds to the integer that
    `ptq` gives it, and let its quantizer begin with the levels of these; in place. One that is read with several norms,
    each of which makes another weight of it, begins as it is.

    Scales must be folded into those of the channels (`FoldedNorm.fold_scales`).
    """
    chosen = _chosen(ptq, model, context)
    quantizers = weight_quantizers(graph)
    weights = [source(node, 1 if isinstance(module, FoldedNorm) else 0) for node, module in quantizers]
    readers = Counter(given.target for given in weights)
    for (node, module), given in zip(quantizers, weights, strict=True):
        weight, name = constant(graph, given), str(given.target)
        if weight is None or name not in chosen or readers[name] > 1:
            continue
        integers, levels = chosen[name]
        if isinstance(module, FoldedNorm):
            integers, levels = module.unfolded(integers, levels, *module.constants(graph, node)[2:])
        (module.quantizer if isinstance(module, FoldedNorm) else module).levels = levels
        lowest, highest = (levels.real(integers + end) for end in (-_WITHIN, _WITHIN))
        weight.copy_(weight.clamp(lowest, highest))


def _chosen(ptq: PTQ, model: nn.Module, context: Context) -> dict[str, tuple[Tensor, WeightLevels]]:
    """Integers and levels of folded weights, by name; of a weight that several layers share, those of one of them."""
    observed = calibrated(ptq, model, context)
    round_weights(ptq, observed, context)
    found = {}
    for node in [node for node in observed.graph.graph.nodes if node.op == "call_module"]:
        observer, weight = observed.graph.get_submodule(str(node.target)), constant(observed.graph, node.args[0])
        if isinstance(observer, NearestWeight) and observer.levels is not None and weight is not None:
            found[str(source(node).target)] = observer.levels.integers(weight), observer.levels
    return found
