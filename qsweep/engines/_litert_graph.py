"""The hub form as a graph of LiteRT."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor, fx

from qsweep.engines import _litert_functions, _litert_moves  # noqa: F401  # with the ops that they write
from qsweep.engines._decompositions import ops_of
from qsweep.engines._litert_file import File
from qsweep.engines._litert_layers import convolution, linear, weight_of
from qsweep.engines._litert_ops import NONE, OPS, Result, dtype_of, shape_of
from qsweep.engines._litert_sums import reduced
from qsweep.engines._litert_values import Value, Values, plain
from qsweep.engines._litert_windows import average
from qsweep.engines._program import by_rows
from qsweep.errors import Refused
from qsweep.hub.form import Grid, QuantizedModel, grid_of
from qsweep.hub.integer import UNBOUNDED, Bounds
from qsweep.hub.kinds import (
    BINARY,
    COMPUTE,
    DEQUANTIZE,
    LINEARS,
    POOLS,
    QUANTIZE,
    RECTIFIERS,
    aten,
    pool_count,
    rectified,
)
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.norm import spell_out_norms
from qsweep.hub.ops import DEQUANTIZE_WEIGHT

_ACTIVATIONS = {
    Bounds(0.0, torch.inf): schema.ActivationFunctionType.RELU,
    Bounds(0.0, 6.0): schema.ActivationFunctionType.RELU6,
    Bounds(-1.0, 1.0): schema.ActivationFunctionType.RELU_N1_TO_1,
}
_NOTHING = {DEQUANTIZE_WEIGHT, aten._assert_tensor_metadata.default, aten.split_with_sizes.default}
"""Nodes that are written where others read them, or not at all."""
_FILLED = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}
"""Ops that read the shape of what they are given alone."""
_LOW, _HIGH = -128, 127


class Step(NamedTuple):
    """What stands between integers and the quantize op behind them, as one operator."""

    core: fx.Node
    rectifiers: list[fx.Node]

    @property
    def bounds(self) -> Bounds:
        found = UNBOUNDED
        for node in self.rectifiers:
            found = found.within(*rectified(node))
        return found


def write_graph(model: QuantizedModel, batch_size: int, path: Path) -> None:
    """Write `model` for batches of `batch_size`. Raises Refused for ops that have no operator.

    What stands between integers and the next quantize op is one operator where there is one; what moves integers moves
    them as they are; all else is real.
    """
    graph = _static(model, batch_size)
    values = Values(File())
    steps = {node: step for node in nodes_of(graph, {QUANTIZE}) if (step := _step(node)) is not None}
    absorbed = {inner for step in steps.values() for inner in (step.core, *step.rectifiers)}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            shape = shape_of(node)
            given = values.of[node] = Value(values.file.tensor(shape, torch.float32), tuple(shape), plain(len(shape)))
        elif node.op == "output":
            (last,) = node.all_input_nodes
            result = values.real(last)
            result = values.arranged(result, plain(len(result.shape)))
            if result.index == given.index:
                result = values.reshaped(values.reshaped(result, [-1]), result.shape)
            values.file.write(path, given.index, result.index)
        elif (tensor := _constant(graph, values, node)) is not None:
            values.constants[node] = tensor
        elif node.target is DEQUANTIZE:
            values.of[node] = values.of[source(node)]
        elif node.target is QUANTIZE:
            values.of[node] = _quantized(values, node, steps.get(node))
        elif node.target not in _NOTHING and node not in absorbed:
            if node.target not in OPS:
                raise Refused(f"LiteRT has no operator for `{node.target}`")
            values.of[node] = OPS[node.target](values, node)


def _static(model: QuantizedModel, batch_size: int) -> fx.GraphModule:
    """The graph for batches of `batch_size`, all sizes numbers, in ops that are known or of PyTorch's core."""
    example = torch.zeros(batch_size, *model.example.shape[1:])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = by_rows(copy.deepcopy(model.graph))
        spell_out_norms(graph, model.example)
        program = torch.export.export(graph, (example,))
        table = torch.export.default_decompositions()
        for op in OPS.keys() - {operator.getitem}:
            table.pop(op, None)  # type: ignore[no-untyped-call]
        used = ops_of(program)
        if used is None or any(op in table for op in used):  # it traces the graph once more
            program = program.run_decompositions(table)
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    graph.graph.eliminate_dead_code()
    return graph


def _constant(graph: fx.GraphModule, values: Values, node: fx.Node) -> Tensor | None:
    """What `node` gives, if no input goes into it; weights of layers stay integers."""
    if node.op == "get_attr":
        return constant(graph, node)
    read = () if node.target in _FILLED else node.all_input_nodes
    stored = {given for given in read if given.target is DEQUANTIZE_WEIGHT}
    if node.op != "call_function" or any(given not in values.constants and given not in stored for given in read):
        return None
    if node.target is DEQUANTIZE_WEIGHT and any(user.target in COMPUTE for user in node.users):
        return None

    def tensor(given: fx.Node) -> Tensor:
        if given in stored:
            return cast(Any, given.target)(*fx.map_arg(given.args, tensor))  # type: ignore[no-any-return]
        known = values.constants.get(given)
        return torch.empty(shape_of(given), dtype=dtype_of(given)) if known is None else known

    args, kwargs = fx.map_arg((node.args, node.kwargs), tensor)
    op: Any = node.target
    result = op(*args, **kwargs)
    return result.detach() if isinstance(result, Tensor) else None


def _step(node: fx.Node) -> Step | None:
    """How an operator of integers gives what the quantize op `node` gives; None where none does."""
    rectifiers, core = list[fx.Node](), source(node)
    while core.target in RECTIFIERS and len(core.users) == 1:
        rectifiers.append(core)
        core = source(core)
    return Step(core, rectifiers) if len(core.users) == 1 and _of_integers(core) else None


def _of_integers(core: fx.Node) -> bool:
    """Whether a kernel of integers computes it."""
    given = core.all_input_nodes
    if core.target in COMPUTE:
        return given[0].target is DEQUANTIZE and given[1].target is DEQUANTIZE_WEIGHT
    if core.target not in BINARY | POOLS or any(each.target is not DEQUANTIZE for each in given):
        return False
    if core.target in POOLS:
        return pool_count(core, *shape_of(given[0])[2:]) is not None
    both = all(isinstance(each, fx.Node) for each in core.args) and not core.kwargs
    return both and len({len(shape_of(each)) for each in given}) == 1


def _quantized(values: Values, node: fx.Node, step: Step | None) -> Value:
    """Integers on the grid of `node`."""
    grid, whole = grid_of(node), Grid(*grid_of(node)[:2], _LOW, _HIGH)
    if step is not None:
        activation = (
            NONE if step.core.target is aten.adaptive_avg_pool2d.default else _ACTIVATIONS.get(step.bounds, NONE)
        )
        made = _of_core(values, step.core, Result(shape_of(step.core), whole, activation))
        fused = UNBOUNDED if activation == NONE else step.bounds
        return _bounded(values, made, fused.on(whole), step.bounds.on(grid))
    given = values.value(source(node))
    if given.grid is not None and given.grid[:2] == grid[:2]:  # moved, no more
        return _bounded(values, given, given.grid[2:], grid[2:])
    made = values.make("QUANTIZE", [given], given.shape, given.order, grid=whole, kind="QuantizeOptions")
    return _bounded(values, made, whole[2:], grid[2:])


def _of_core(values: Values, core: fx.Node, result: Result) -> Value:
    given, op = values.value(source(core)), core.target
    if op in COMPUTE:
        function = linear if op in LINEARS else convolution
        return function(values, core, given, weight_of(values, core), result)
    if op is aten.avg_pool2d.default:
        return average(values, core, given, result)
    if op is aten.adaptive_avg_pool2d.default:
        return reduced(values, "MEAN", given, (2, 3), True, grid=result.grid)
    name, kind = ("MUL", "MulOptions") if op is aten.mul.Tensor else ("ADD", "AddOptions")
    return values.make(
        name,
        [given, values.value(source(core, 1), given.order)],
        result.shape,
        given.order,
        grid=result.grid,
        kind=kind,
        fusedActivationFunction=result.activation,
    )


def _bounded(values: Values, given: Value, has: Sequence[int], wanted: Sequence[int]) -> Value:
    """`given`, integers within the two numbers `has`, within the two `wanted`."""
    assert given.grid is not None
    scale, zero_point = given.grid[:2]
    for name, bound, needed in (("MAXIMUM", wanted[0], wanted[0] > has[0]), ("MINIMUM", wanted[1], wanted[1] < has[1])):
        if needed:
            number = values.file.constant(torch.tensor([bound], dtype=torch.int8), [scale], zero_point)
            given = values.moved(name, given, [number], given.shape, given.order, "MaximumMinimumOptions")
    return replace(given, grid=Grid(scale, zero_point, *wanted))
