"""Activation functions: written in steps as the one op that they are, and what they give of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qsweep.hub.fixed import fixed_nodes
from qsweep.hub.form import Grid
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import constant, nodes_of
from qsweep.hub.ops import QUICK_GELU
from qsweep.hub.traced import replace_by

_LAST = {aten.mul.Tensor, aten.div.Tensor}
_STEPS = _LAST | {
    aten.add.Tensor, aten.sub.Tensor, aten.pow.Tensor_Scalar, aten.tanh.default, aten.sigmoid.default, aten.erf.default,
    aten.softplus.default, aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default,
}  # fmt: skip
_MOST = 10
"""Steps that a function is looked for in."""
_KNOWN: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (aten.silu.default, {}),
    (QUICK_GELU, {}),
    (aten.gelu.default, {}),
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.hardswish.default, {}),
    (aten.hardsigmoid.default, {}),
    (aten.mish.default, {}),
]
_POINTS = torch.linspace(-12, 12, 2401, dtype=torch.float64)


def with_activations(graph: fx.GraphModule) -> None:
    """One op for the steps of `x * sigmoid(x)` and the like, in place; told by what they give, however it is written.

    Integer kernels then look the whole function up in one table. Steps with parameters, which may be trained, stay.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    fixed = fixed_nodes(graph)
    for node in reversed(nodes_of(graph, _LAST)):
        traced = node.meta.get("val")
        if not isinstance(traced, Tensor) or not traced.is_floating_point():
            continue
        steps: list[fx.Node] = []
        given = {node}
        while len(steps) < _MOST and given and (step := max(given, key=order.__getitem__)).target in _STEPS:
            steps.append(step)
            given = (given - {step}) | {value for value in step.all_input_nodes if value not in fixed}
            found = _known(graph, steps, *given) if len(given) == 1 and len(steps) > 1 else None
            if found is not None:
                with graph.graph.inserting_before(node):
                    replace_by(node, graph.graph.call_function(found[0], (*given,), found[1]))
                break


def function_of(node: fx.Node, given: Grid, integers: Tensor) -> Tensor:
    """What a node of POINTWISE or RECTIFIERS gives of `integers` on the grid `given`, float32, computed in float64."""
    real = (integers - given.zero_point).float() * torch.tensor(given.scale, dtype=torch.float32)
    return cast(Any, node.target)(real.double(), *node.args[1:], **node.kwargs).float()  # type: ignore[no-any-return]


def _known(
    graph: fx.GraphModule, steps: list[fx.Node], given: fx.Node
) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The op that gives what `steps`, the last one first, give of `given`."""
    values: dict[fx.Node, Any] = {given: _POINTS}

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        number = constant(graph, node)
        if number is None or number.numel() != 1 or isinstance(number, nn.Parameter):
            raise ValueError(node)
        return number.detach().double().reshape(())

    try:
        for step in reversed(steps):
            op: Any = step.target
            values[step] = op(*fx.map_arg(step.args, value), **fx.map_arg(step.kwargs, value))
    except (ValueError, RuntimeError):  # constants that are no numbers, types that do not go together
        return None
    for op, options in _KNOWN:
        if torch.allclose(values[steps[0]], op(_POINTS, **options), rtol=0, atol=1e-5):
            return op, options
    return None
