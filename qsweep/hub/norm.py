"""Batch norm into the convolution or linear before it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qsweep.hub.form import COMPUTE, aten, constant, set_constant


def fold_batch_norm(graph: fx.GraphModule) -> fx.GraphModule:
    """Fold every batch norm that follows a convolution or linear, in place; computed in float64.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta (Jacob et al. 2018, section 3.2).
    """
    for norm in [node for node in graph.graph.nodes if node.target is aten.batch_norm.default]:
        compute = norm.args[0]
        if compute.target in COMPUTE and len(compute.users) == 1:
            weight, bias = folded(graph, compute, norm)
            replace_weight(graph, compute, weight, bias)
            norm.replace_all_uses_with(compute)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@torch.no_grad()
def folded(graph: fx.GraphModule, compute: fx.Node, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32, of `compute` with the batch norm `norm` folded in."""
    gamma, beta, mean, var = (constant(graph, argument) for argument in norm.args[1:5])
    weight = constant(graph, compute.args[1])
    bias = constant(graph, compute.args[2]) if len(compute.args) > 2 else None
    assert weight is not None and mean is not None and var is not None
    factor = (var.double() + norm.args[7]).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = ((bias.double() if bias is not None else 0) - mean.double()) * factor
    if beta is not None:
        shift = shift + beta.double()
    scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return scaled.float(), shift.float()


def replace_weight(graph: fx.GraphModule, compute: fx.Node, weight: Tensor, bias: Tensor) -> None:
    """Give `compute` its own constants, so that a layer that shared them keeps what it had."""
    source = compute.args[1]
    assert isinstance(source, fx.Node)
    base = str(source.target).removesuffix(".weight")
    name = base if len(source.users) == 1 else f"{base}_{compute.name}"
    with graph.graph.inserting_before(compute):
        set_constant(graph, f"{name}.weight", weight, trainable=True)
        set_constant(graph, f"{name}.bias", bias, trainable=True)
        new = graph.graph.get_attr(f"{name}.weight"), graph.graph.get_attr(f"{name}.bias")
    compute.args = (compute.args[0], *new, *compute.args[3:])
