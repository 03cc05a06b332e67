"""Batch norm that stays live in training while the weights are rounded as they will be shipped: folded."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsweep.hub.form import arguments, aten, constant, nodes_of, source
from qsweep.hub.norm import joins, replace_weight


class FoldedNorm(nn.Module):
    """A convolution or linear and its batch norm, with the weights rounded after folding.

    Training: y = batch_norm(op(x, q(w * f)) / f + b) with f = gamma / sqrt(running_var + eps), so that the batch's own
    statistics normalise, and the running ones scale what is rounded (Krishnamoorthi 2018, section 3.2.2; Jacob et al.
    2018, section 3.2). Evaluation: y = op(x, q(w * f)) + (b - running_mean) * f + beta.
    """

    def __init__(self, op: Any, settings: tuple[Any, ...], eps: float, momentum: float, quantizer: nn.Module) -> None:
        super().__init__()
        self.op, self.settings, self.eps, self.momentum = op, settings, eps, momentum
        self.quantizer = quantizer

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
            folded, shift = self.folded(weight, bias, gamma, beta, mean, var)
            return cast(Tensor, self.op(inputs, self.quantizer(folded), shift, *self.settings))
        factor = self._factor(gamma, var)
        rounded = self.quantizer(weight * factor.reshape(-1, *[1] * (weight.dim() - 1)))
        outputs = self.op(inputs, rounded, None, *self.settings)
        shape = (1, -1, *[1] * (outputs.dim() - 2))
        outputs = outputs / torch.where(factor.abs() < 1e-12, 1.0, factor).reshape(shape)
        if bias is not None:
            outputs = outputs + bias.reshape(shape)
        return F.batch_norm(outputs, mean, var, gamma, beta, True, self.momentum, self.eps)

    def folded(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias with the running statistics folded in, by the same arithmetic as in training."""
        assert weight is not None and mean is not None and var is not None
        factor = self._factor(gamma, var)
        shift = (bias - mean if bias is not None else -mean) * factor
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), shift if beta is None else shift + beta

    def _factor(self, gamma: Tensor | None, var: Tensor) -> Tensor:
        factor = (var + self.eps).rsqrt()
        return factor if gamma is None else gamma * factor


def join_norms(graph: fx.GraphModule) -> None:
    """Replace each convolution or linear (its weight observed) and the batch norm after it by a FoldedNorm."""
    for norm in nodes_of(graph, {aten.batch_norm.default}):
        compute = source(norm)
        if not joins(compute):
            continue
        observed, settings = source(compute, 1), arguments(norm)
        bias, *rest = compute.args[2:] or (None,)
        quantizer = graph.get_submodule(str(observed.target))
        name = f"folded_{compute.name}"
        graph.add_submodule(
            name, FoldedNorm(compute.target, tuple(rest), settings["eps"], settings["momentum"], quantizer)
        )
        with graph.graph.inserting_before(norm):
            joined = graph.graph.call_module(name, (source(compute), source(observed), bias, *norm.args[1:5]))
        norm.replace_all_uses_with(joined)
        for node in (norm, compute, observed):
            graph.graph.erase_node(node)
        graph.delete_submodule(str(observed.target))
    graph.recompile()


def split_norms(graph: fx.GraphModule) -> None:
    """Undo `join_norms` after training: plain convolutions and linears with folded, observed weights, in place."""
    for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
        module = graph.get_submodule(str(node.target))
        if not isinstance(module, FoldedNorm):
            continue
        with torch.no_grad():
            weight, bias = module.folded(*(constant(graph, argument) for argument in node.args[1:]))
        with graph.graph.inserting_before(node):
            compute = graph.graph.call_function(module.op, (*node.args[:2], None, *module.settings))
        node.replace_all_uses_with(compute)
        graph.graph.erase_node(node)
        graph.delete_submodule(str(node.target))
        replace_weight(graph, compute, weight, bias)
        name = f"observe_{compute.name}_weight"
        graph.add_submodule(name, module.quantizer)
        with graph.graph.inserting_before(compute):
            observed = graph.graph.call_module(name, (source(compute, 1),))
        compute.update_arg(1, observed)
    graph.graph.eliminate_dead_code()
    graph.recompile()
