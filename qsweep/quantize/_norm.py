"""Batch norm that stays live in training while the weights are rounded as they will be shipped: folded."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsweep.hub.kinds import NORMS, aten
from qsweep.hub.nodes import arguments, constant, nodes_of, set_constant, source
from qsweep.hub.norm import alike, joins, own_name, replace_weight
from qsweep.quantize._arithmetic import WeightLevels
from qsweep.quantize._fake import FakeWeight, times
from qsweep.quantize._observers import NearestWeight

_NOTHING = 1e-12
"""A channel that its norm multiplies by less is off: its weights count as zeros."""


class FoldedNorm(nn.Module):
    """A convolution or linear and its batch norm, with weights that are shipped as integers times folded scales.

    With f = gamma / sqrt(running_var + eps), evaluation computes op(x, w_q * f) + (b - running_mean) * f + beta.

    `fold_scales`: the integers are those of the weights as they are, and f goes into the scales of their channels (a
    negative one turns the signs around), exactly; training is y = batch_norm(op(x, w_q) + b), as without folding.
    Else, where channels share a scale: the weights are rounded after folding; training is
    y = batch_norm(op(x, q(w * f)) / f + b), so that the batch's own statistics normalise, and the running ones scale
    what is rounded (Krishnamoorthi 2018, section 3.2.2; Jacob et al. 2018, section 3.2). DoReFa bends before it folds.
    """

    def __init__(
        self, op: Any, settings: tuple[Any, ...], norm: dict[str, Any], quantizer: FakeWeight, *, fold_scales: bool
    ) -> None:
        super().__init__()
        self.op, self.eps, self.momentum = op, norm["eps"], norm["momentum"]
        self.settings = tuple(list(value) if isinstance(value, list) else value for value in settings)  # fx has its own
        self.quantizer, self.fold_scales = quantizer, fold_scales

    def forward(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> Tensor:
        if not self.training:
            folded = self.shipped(weight, bias, gamma, beta, mean, var)[0]
            return cast(Tensor, self.op(inputs, folded, self.shift(bias, gamma, beta, mean, var), *self.settings))
        if self.fold_scales:
            outputs = self.op(inputs, self.quantizer(weight), bias, *self.settings)
            return F.batch_norm(outputs, mean, var, gamma, beta, True, self.momentum, self.eps)
        factor = self._factor(gamma, var)
        outputs = self.op(inputs, self.quantizer(weight, factor), None, *self.settings)
        shape = (1, -1, *[1] * (outputs.dim() - 2))
        outputs = outputs / torch.where(factor.abs() < _NOTHING, 1.0, factor).reshape(shape)
        if bias is not None:
            outputs = outputs + bias.reshape(shape)
        return F.batch_norm(outputs, mean, var, gamma, beta, True, self.momentum, self.eps)

    def constants(self, graph: fx.GraphModule, node: fx.Node) -> list[Any]:
        """Weight, bias, gamma, beta, mean, variance at the `node` that calls this module."""
        return [constant(graph, argument) for argument in node.args[1:]]

    def trained_weight(
        self, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        """What the quantizer rounds in training."""
        return weight if self.fold_scales else times(weight, self._factor(gamma, var))

    def shipped(
        self, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, WeightLevels | None]:
        """The real weights that are shipped, norm folded, and their levels (None until the quantizer has started)."""
        factor = self._factor(gamma, var)
        if not self.quantizer.enabled:
            return times(weight, factor), None
        if self.fold_scales:
            integers, levels = _scaled(*self.quantizer.integers(weight), factor)
        else:
            integers, levels = self.quantizer.integers(weight, factor)
        return levels.real(integers), levels

    def unfolded(
        self,
        integers: Tensor,
        levels: WeightLevels,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> tuple[Tensor, WeightLevels]:
        """What the quantizer is to round to so that `integers` on `levels` are shipped, with `fold_scales`: the way
        back of `shipped`."""
        assert self.fold_scales
        factor = self._factor(gamma, var)
        return _scaled(integers, levels, torch.where(factor.abs() < _NOTHING, factor, 1 / factor))

    def shift(
        self, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        """The bias with the norm folded in."""
        shift = (bias - mean if bias is not None else -mean) * self._factor(gamma, var)
        return shift if beta is None else shift + beta

    def _factor(self, gamma: Tensor | None, var: Tensor) -> Tensor:
        factor: Tensor = (var + self.eps).rsqrt()
        return factor if gamma is None else gamma * factor


def _scaled(integers: Tensor, levels: WeightLevels, factor: Tensor) -> tuple[Tensor, WeightLevels]:
    """The integers and levels of weights (C, ...) whose channels are multiplied by `factor` (C,)."""
    off = factor.abs() < _NOTHING
    scale = levels.scale * torch.where(off, 1.0, factor.abs()).unsqueeze(1)
    turned, total = (factor < 0).unsqueeze(1), levels.low + levels.high
    zero_point = torch.where(turned, total - levels.zero_point, levels.zero_point)
    parts = integers.reshape(*scale.shape, -1)
    parts = torch.where(turned.unsqueeze(-1), total - parts, parts)
    parts = torch.where(off.reshape(-1, 1, 1), zero_point.unsqueeze(-1), parts)
    return parts.reshape(integers.shape), replace(levels, scale=scale, zero_point=zero_point)


class LiveNorm(nn.Module):
    """A batch norm that no layer takes in: it normalises with the batch's statistics in training, as any."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        super().__init__()
        self.settings = settings
        """Of the op: training, momentum, eps, cudnn."""

    def forward(self, inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(inputs, mean, var, gamma, beta, self.training, self.settings[1], self.settings[2])


def weight_quantizers(graph: fx.GraphModule) -> list[tuple[fx.Node, FoldedNorm | FakeWeight]]:
    """What rounds weights, each once, and where it is called first."""
    found = [(nodes[0], graph.get_submodule(name)) for name, nodes in _calls(graph).items()]
    return [(node, module) for node, module in found if isinstance(module, FoldedNorm | FakeWeight)]


def _calls(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Of each module, in order of execution."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def join_norms(graph: fx.GraphModule, *, fold_scales: bool) -> None:
    """Replace each convolution or linear whose weight is observed and the batch norm after it by a FoldedNorm, other
    batch norms by a LiveNorm."""
    norms = nodes_of(graph, NORMS)
    joined = [norm for norm in norms if joins(norm) and source(source(norm), 1).op == "call_module"]
    for norm in norms:
        if norm not in joined:
            _enliven(graph, norm)
    for group in alike(joined):
        _join(graph, group, fold_scales=fold_scales)
    graph.recompile()


def _join(graph: fx.GraphModule, norms: list[fx.Node], *, fold_scales: bool) -> None:
    """One FoldedNorm for `norms`, the same one called again, and the layers before them."""
    first = source(norms[0])
    observed = source(first, 1)
    quantizer = graph.get_submodule(str(observed.target))
    assert isinstance(quantizer, FakeWeight)
    if len(observed.users) > len(norms):  # others read the weight, too: with another norm, or none
        quantizer = copy.deepcopy(quantizer)
    name, settings = f"folded_{first.name}", first.args[3:]
    graph.add_submodule(
        name, FoldedNorm(first.target, tuple(settings), arguments(norms[0]), quantizer, fold_scales=fold_scales)
    )
    for norm in norms:
        compute = source(norm)
        bias = compute.args[2] if len(compute.args) > 2 else None
        with graph.graph.inserting_before(norm):
            call = graph.graph.call_module(name, (source(compute), source(observed), bias, *norm.args[1:5]))
        call.meta = dict(norm.meta)
        norm.replace_all_uses_with(call)
        graph.graph.erase_node(norm)
        graph.graph.erase_node(compute)
    if not observed.users:
        graph.graph.erase_node(observed)
        graph.delete_submodule(str(observed.target))


def _enliven(graph: fx.GraphModule, norm: fx.Node) -> None:
    if not all(isinstance(statistics, fx.Node) for statistics in norm.args[3:5]):
        return  # it has none: every batch sets its own, then and later
    name = f"live_{norm.name}"
    graph.add_submodule(name, LiveNorm(norm.args[5:]))
    with graph.graph.inserting_before(norm):
        call = graph.graph.call_module(name, norm.args[:5])
    call.meta = dict(norm.meta)
    norm.replace_all_uses_with(call)
    graph.graph.erase_node(norm)


def _settle(graph: fx.GraphModule, node: fx.Node, module: LiveNorm) -> None:
    with graph.graph.inserting_before(node):
        norm = graph.graph.call_function(aten.batch_norm.default, (*node.args, *module.settings))
    norm.meta = dict(node.meta)
    node.replace_all_uses_with(norm)
    graph.graph.erase_node(node)
    graph.delete_submodule(str(node.target))


@torch.no_grad()
def split_norms(graph: fx.GraphModule) -> None:
    """Undo `join_norms` after training: plain convolutions and linears with folded weights on their levels."""
    for name, nodes in _calls(graph).items():
        module = graph.get_submodule(name)
        if isinstance(module, LiveNorm):
            _settle(graph, nodes[0], module)
        elif isinstance(module, FoldedNorm):
            _split(graph, nodes, module)
            graph.delete_submodule(name)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _split(graph: fx.GraphModule, calls: list[fx.Node], module: FoldedNorm) -> None:
    """Layers with one weight, norm folded, for the `calls` of `module`."""
    constants = module.constants(graph, calls[0])
    (weight, levels), bias = module.shipped(*constants), module.shift(*constants[1:])
    computes = []
    for node in calls:
        with graph.graph.inserting_before(node):
            computes.append(graph.graph.call_function(module.op, (*node.args[:2], None, *module.settings)))
        computes[-1].meta = dict(node.meta)
        node.replace_all_uses_with(computes[-1])
        graph.graph.erase_node(node)
    replace_weight(graph, computes, weight, bias)
    name = f"observe_{computes[0].name}_weight"
    graph.add_submodule(name, _shipped(module.quantizer, levels))
    with graph.graph.inserting_before(computes[0]):
        observed = graph.graph.call_module(name, (source(computes[0], 1),))
    for compute in computes:
        compute.update_arg(1, observed)


@torch.no_grad()
def ship_weights(graph: fx.GraphModule) -> None:
    """Put the weights behind fake quantizers on their levels, as `split_norms` does with those before norms."""
    for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
        quantizer = graph.get_submodule(str(node.target))
        if not isinstance(quantizer, FakeWeight) or not quantizer.enabled:
            continue
        weight = constant(graph, source(node))
        assert weight is not None
        integers, levels = quantizer.integers(weight)
        name = own_name(graph, str(source(node).target), *node.users)
        set_constant(graph, name, levels.real(integers))
        graph.set_submodule(str(node.target), _shipped(quantizer, levels))
        with graph.graph.inserting_before(node):
            node.update_arg(0, graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _shipped(quantizer: FakeWeight, levels: WeightLevels | None) -> NearestWeight:
    shipped = NearestWeight(quantizer.config, quantizer.place)
    shipped.bits, shipped.levels = quantizer.bits, levels
    return shipped
