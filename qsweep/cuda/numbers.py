"""The numbers that a step's kernel is given: biases, multipliers, tables. Computed on the CPU as the reference does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from qsweep.cuda.arithmetic import Operand as Side
from qsweep.cuda.arithmetic import Output, Requantize, Residual, Total
from qsweep.cuda.pointwise import inverse_of
from qsweep.cuda.steps import Add, Layer, Norm, Operand, Pair
from qsweep.errors import Refused
from qsweep.hub.activations import function_of
from qsweep.hub.form import Grid, grid_of
from qsweep.hub.integer import UNBOUNDED, Bounds
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, QUANTIZE, aten
from qsweep.hub.nodes import arguments, constant, nodes_of, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT


def f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def output_of(grid: Grid, bounds: Bounds = UNBOUNDED) -> Output:
    """The grid as kernels write on it, a rectifier included."""
    return Output(grid.zero_point, *bounds.on(grid))


def ratio(scale: float, other: float, count: int = 1) -> float:
    """f32(scale / (other * count)), the divisor rounded first."""
    return float(f32(scale) / (f32(other) * count))


def side(operand: Operand, values: Tensor, grid: Grid | None) -> Side:
    """One side of a sum that goes onto `grid`, or stays real."""
    scale = operand.grid.scale
    return Side(values, operand.grid.zero_point, ratio(scale, grid.scale) if grid else float(f32(scale)))


def product_ratio(pair: Pair) -> float:
    """What the product of an integer of each side counts: on the grid it goes onto, or as a real number."""
    scale = float(f32(pair.left.grid.scale) * f32(pair.right.grid.scale))
    return ratio(scale, pair.grid.scale) if pair.grid else scale


def normed(graph: fx.GraphModule, norm: Norm) -> list[Tensor]:
    """Weight and bias of a layer norm, in units of the scale of its grid."""
    sizes, inverse = arguments(norm.node), inverse_of(norm.out.grid.scale)
    parts = [constant(graph, sizes[name]) for name in ("weight", "bias")]
    return [part.detach().float() * inverse for part in parts if part is not None]


def total_of(add: Add, out: Tensor) -> Total:
    """A sum onto its grid, written into `out` by the layer norm of the same sum."""
    assert add.grid is not None
    left, right = (ratio(each.grid.scale, add.grid.scale) for each in (add.left, add.right))
    return Total(left, right, output_of(add.grid, add.bounds), out)


def requantize(graph: fx.GraphModule, layer: Layer, device: torch.device) -> Requantize:
    """From a layer's sums to its result; the multiplier is that of its own grid where a residual is joined to it."""
    stored, given = source(layer.node, 1), layer.given.grid
    integers, scale = constant(graph, stored), constant(graph, stored.args[1])
    assert integers is not None and scale is not None
    step = (f32(given.scale) * scale.float()).expand(len(integers))
    bias = -given.zero_point * integers.long().flatten(1).sum(1)
    real = constant(graph, layer.node.args[2]) if len(layer.node.args) > 2 else None
    if real is not None:
        bias += (real.detach() / step).round().long()
    own, then = layer.inner.grid if layer.inner else layer.grid, layer.then
    multiplier = step if own is None else step / f32(own.scale)
    return Requantize(
        bias.to(torch.int32).to(device),
        multiplier.contiguous().to(device),
        None if layer.grid is None else output_of(layer.grid, layer.bounds),
        (layer.bounds.low, layer.bounds.high),
        None if then is None else table(then.node, then.given.grid, then.out.grid).to(device),
    )


def residual(layer: Layer, values: Tensor) -> Residual | None:
    """What `layer` adds to its own result: `values`, the integers of its residual."""
    if layer.residual is None or layer.inner is None or layer.grid is None:
        return None
    other, own = layer.residual.grid, layer.inner.grid
    return Residual(
        values,
        other.zero_point,
        ratio(other.scale, layer.grid.scale),
        output_of(own, layer.inner.bounds),
        ratio(own.scale, layer.grid.scale),
    )


def table(node: fx.Node | None, given: Grid, onto: Grid) -> Tensor:
    """int8 (256,): where each integer from -128 on goes, by the function of `node` (None: none) and the grid `onto`."""
    every = torch.arange(-128, 128)
    real = (every - given.zero_point).float() * f32(given.scale) if node is None else function_of(node, given, every)
    integers = (real * (1 / f32(onto.scale))).round() + onto.zero_point
    return integers.clamp(onto.low, onto.high).to(torch.int8)


def check_scales(graph: fx.GraphModule) -> None:
    """Raises Refused where a scale, or the step of sums or products, is no normal positive float32.

    Kernels multiply by such numbers and by their inverses; GPUs and CPUs need not agree on denormal ones.
    """
    for node in nodes_of(graph, {QUANTIZE, DEQUANTIZE}):
        _check(f32(grid_of(node).scale), f"the scale of `{node.name}`")
    for node in nodes_of(graph, {DEQUANTIZE_WEIGHT}):
        scale = constant(graph, node.args[1])
        assert scale is not None
        _check(scale, f"the scales of `{source(node).target}`")
    for node in nodes_of(graph, {aten.mul.Tensor}):
        sides = [side for side in node.all_input_nodes if side.target is DEQUANTIZE]
        if len(sides) == 2:
            _check(f32(grid_of(sides[0]).scale) * f32(grid_of(sides[1]).scale), f"the step of `{node.name}`")
    for node in nodes_of(graph, COMPUTE):
        if source(node).target is DEQUANTIZE and source(node, 1).target is DEQUANTIZE_WEIGHT:
            scale = constant(graph, source(node, 1).args[1])
            assert scale is not None
            step = f32(grid_of(source(node)).scale) * scale
            _check(step, f"the steps of the sums of `{source(source(node, 1)).target}`")


def _check(scale: Tensor, what: str) -> None:
    least = torch.finfo(torch.float32).tiny
    wrong = [value for value in scale.reshape(-1).tolist() if not least <= value < math.inf]
    if wrong:
        raise Refused(f"{what}: must be finite and at least {least:.3g} (got {wrong[0]:.3g})")
