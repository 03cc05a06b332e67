"""Batch norm into the convolution or linear before it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.kinds import COMPUTE, NORMS, TRANSPOSED, aten
from qsweep.hub.nodes import arguments, beside_first, constant, is_trained, nodes_of, set_constant, shape_seen, source


def fold_batch_norm(graph: fx.GraphModule, layers: Collection[fx.Node] | None = None) -> fx.GraphModule:
    """Fold every batch norm that follows a convolution, transposed or not, or a linear, in place; computed in float64.
    With `layers`, those behind these alone.

    (PyTorch's exporter to ONNX and its compiler fold those of transposed convolutions wrongly or under old names.)
    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta (Jacob et al. 2018, section 3.2).
    """
    found = [norm for norm in nodes_of(graph, NORMS) if joins(norm, COMPUTE | TRANSPOSED)]
    for norms in alike(norm for norm in found if layers is None or source(norm) in layers):
        layer = source(norms[0])
        weight, bias = folded(graph, layer, norms[0])
        trainable = is_trained(graph, layer.args[1])
        replace_weight(graph, list(map(source, norms)), weight, bias, trainable=trainable)
        for norm in norms:
            norm.replace_all_uses_with(source(norm))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@torch.no_grad()
def without_norms_of_norms(graph: fx.GraphModule) -> None:
    """Let every batch norm be what the one that alone reads it makes of it, in place: a layer takes in one norm."""
    for norm in nodes_of(graph, NORMS):
        first = source(norm)
        if first.target not in NORMS or len(first.users) > 1 or not (_has_statistics(first) and _has_statistics(norm)):
            continue
        factor, shift = affine(graph, norm)
        gamma, beta = (constant(graph, given) for given in first.args[1:3])
        weight = factor if gamma is None else gamma.double() * factor
        bias = shift if beta is None else beta.double() * factor + shift
        trainable = is_trained(graph, *first.args[1:3], *norm.args[1:3])
        replace_weight(graph, [first], weight.float(), bias.float(), trainable=trainable)
        norm.replace_all_uses_with(first)
        graph.graph.erase_node(norm)
    graph.recompile()


def alike(norms: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """`norms` that can be folded, in groups of those that are one norm behind one layer, called again."""
    groups: dict[str, list[fx.Node]] = {}
    for norm in norms:
        groups.setdefault(repr([source(norm).target, beside_first(source(norm)), beside_first(norm)]), []).append(norm)
    return list(groups.values())


@torch.no_grad()
def affine(graph: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Factor and shift (C,), float64, that the batch norm `norm` is by its running statistics."""
    gamma, beta, mean, var = (constant(graph, argument) for argument in norm.args[1:5])
    assert mean is not None and var is not None
    factor = (var.double() + arguments(norm)["eps"]).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() * factor
    return factor, shift if beta is None else shift + beta.double()


def spell_out_norms(graph: fx.GraphModule, example: Tensor) -> None:
    """Every batch norm that no layer has taken in as a product and a sum, in place; `example`: (2, ...)."""
    if not (norms := nodes_of(graph, NORMS)):
        return
    ShapeProp(graph).propagate(example)
    for norm in norms:
        axes, value = [1] * (len(shape_seen(norm)) - 2), source(norm)
        for op, number in zip((aten.mul.Tensor, aten.add.Tensor), affine(graph, norm), strict=True):
            name = f"{norm.name}_{op.__name__.partition('.')[0]}"
            set_constant(graph, name, number.float().reshape(-1, *axes))
            with graph.graph.inserting_before(norm):
                value = graph.graph.call_function(op, (value, graph.graph.get_attr(name)))
        norm.replace_all_uses_with(value)
    graph.graph.eliminate_dead_code()
    graph.recompile()


@torch.no_grad()
def folded(graph: fx.GraphModule, compute: fx.Node, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32, of `compute` with the batch norm `norm` folded in."""
    weight = constant(graph, compute.args[1])
    bias = constant(graph, compute.args[2]) if len(compute.args) > 2 else None
    assert weight is not None
    factor, shift = affine(graph, norm)
    if bias is not None:
        shift = shift + bias.double() * factor
    if compute.target in TRANSPOSED:  # weights (C, OC / groups, ...)
        apart = weight.double().reshape(arguments(compute)["groups"], -1, *weight.shape[1:])
        by_group = factor.reshape(len(apart), 1, -1, *[1] * (weight.dim() - 2))
        return (apart * by_group).flatten(0, 1).float(), shift.float()
    scaled = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return scaled.float(), shift.float()


def joins(norm: fx.Node, layers: Collection[Any] = COMPUTE) -> bool:
    """Whether the batch norm `norm` can be folded into the layer before it: the weight of the layer is fixed, so are
    the statistics of the norm, and the norm alone reads the result."""
    compute = source(norm)
    if compute.target not in layers or len(compute.users) > 1:
        return False
    weight = source(compute, 1)
    weight = source(weight) if weight.op == "call_module" else weight  # observed
    return weight.op == "get_attr" and _has_statistics(norm)


def _has_statistics(norm: fx.Node) -> bool:
    return all(isinstance(node, fx.Node) and node.op == "get_attr" for node in norm.args[3:5])


def stands_alone(norm: fx.Node) -> bool:
    """Whether it is a batch norm with statistics, over one or two dimensions, that no layer takes in. Takes what
    ShapeProp knows."""
    fixed = all(isinstance(statistics, fx.Node) for statistics in norm.args[3:5])
    return fixed and not joins(norm) and len(norm.meta["tensor_meta"].shape) in (3, 4)


def replace_weight(
    graph: fx.GraphModule, computes: Sequence[fx.Node], weight: Tensor, bias: Tensor, *, trainable: bool = False
) -> None:
    """Give `computes` constants of their own, so that a layer that shared them keeps what it had."""
    first = computes[0]
    read = str(first.args[1].target) if isinstance(first.args[1], fx.Node) else f"{first.name}_weight"
    name = own_name(graph, read, *computes)
    bias_name = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
    bias_name = own_name(graph, bias_name, *computes)
    with graph.graph.inserting_before(first):
        set_constant(graph, name, weight, trainable=trainable)
        set_constant(graph, bias_name, bias, trainable=trainable)
        new = graph.graph.get_attr(name), graph.graph.get_attr(bias_name)
    for compute in computes:
        compute.args = (source(compute), *new, *compute.args[3:])


def own_name(graph: fx.GraphModule, name: str, *computes: fx.Node) -> str:
    """`name` if `computes` alone read it (through an observer, if there is one), else one made for their first."""
    constants = [node for node in graph.graph.nodes if node.op == "get_attr" and node.target == name]
    direct = {user for node in constants for user in node.users}
    observers = {user for user in direct if user.op == "call_module" and str(user.target).startswith("observe_")}
    readers = (direct - observers) | {reader for observer in observers for reader in observer.users}
    return name if readers <= {*computes} else f"{name}_{computes[0].name}"
