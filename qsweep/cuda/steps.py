"""What a chain of kernels does, step by step: the nodes of a hub graph, several of them joined in each step.

An integer value is named by the node that gives it: a quantize op, or an op that keeps the grid. A value in floating
point is named by its node too; both may exist for one node.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qsweep.hub.form import Grid
from qsweep.hub.integer import Bounds
from qsweep.hub.kinds import NEAREST, aten
from qsweep.hub.nodes import source


@dataclass(frozen=True)
class Operand:
    """An integer value and the grid it lies on."""

    node: fx.Node
    grid: Grid


@dataclass(frozen=True)
class Inner:
    """The grid and bounds of a layer's own result, where a sum is joined to it."""

    grid: Grid
    bounds: Bounds


@dataclass(frozen=True)
class Quantize:
    """A float value onto a grid."""

    out: Operand
    given: fx.Node


@dataclass(frozen=True)
class Layer:
    """A convolution or linear on integers, its rectifier, and where `residual` is set the sum with that and its
    rectifier; `grid` None leaves the result real. `then`: a function of the integers, which nothing else reads."""

    out: fx.Node
    grid: Grid | None
    bounds: Bounds
    node: fx.Node
    given: Operand
    inner: Inner | None = None
    residual: Operand | None = None
    then: Map | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of `given`, a float value, as integers, each on a symmetric grid of its own up to `high`."""

    out: fx.Node
    given: fx.Node
    high: int


@dataclass(frozen=True)
class RowLayer:
    """A linear, op `node`, on what the step `Rows` of the node `rows` gives; its result is real."""

    node: fx.Node
    rows: fx.Node


@dataclass(frozen=True)
class Pair:
    """Two integer values, element by element, and a rectifier; `grid` as above."""

    out: fx.Node
    grid: Grid | None
    bounds: Bounds
    left: Operand
    right: Operand


@dataclass(frozen=True)
class Add(Pair):
    """Their sum."""


@dataclass(frozen=True)
class Multiply(Pair):
    """Their product."""


@dataclass(frozen=True)
class Pool:
    """An average pool whose windows all have `count` elements, and its rectifier; `grid` as above."""

    out: fx.Node
    grid: Grid | None
    bounds: Bounds
    node: fx.Node
    given: Operand
    count: int


OF_IMAGES = {aten.max_pool2d.default, NEAREST}
"""Ops of `Move` that have kernels, for images; what the others give may be a view of what they are given."""


@dataclass(frozen=True)
class Move:
    """An op that selects or moves integers, `given` one or, for a concatenation, several."""

    out: Operand
    node: fx.Node
    given: tuple[Operand, ...]


@dataclass(frozen=True)
class Map:
    """A function of one integer, op `node` (None: none) and then the grid of `out`, as a table of 256 results."""

    out: Operand
    node: fx.Node | None
    given: Operand


@dataclass(frozen=True)
class Norm:
    """A layer norm, op `node`, onto a grid: of `sides`, one integer value or the sum of two, or of what the op reads
    where there are none. `total`: the same sum onto a grid of its own, which others read."""

    out: Operand
    node: fx.Node
    sides: tuple[Operand, ...]
    total: Add | None = None


@dataclass(frozen=True)
class Dequantize:
    """Real values from integers."""

    out: fx.Node
    given: Operand


@dataclass(frozen=True)
class Float:
    """An op that PyTorch computes in floating point."""

    node: fx.Node


Step = Quantize | Layer | Rows | RowLayer | Pair | Pool | Move | Map | Norm | Dequantize | Float


def reads(step: Step) -> tuple[fx.Node, ...]:
    """The integer values that `step` reads, rows too."""
    if isinstance(step, RowLayer):
        return (step.rows,)
    if isinstance(step, Layer):
        return (step.given.node,) if step.residual is None else (step.given.node, step.residual.node)
    if isinstance(step, Pair):
        return step.left.node, step.right.node
    if isinstance(step, Move | Norm):
        return tuple(given.node for given in (step.given if isinstance(step, Move) else step.sides))
    return (step.given.node,) if isinstance(step, Pool | Map | Dequantize) else ()


def writes(step: Step) -> tuple[Operand, ...]:
    """The integer values, each on one grid, that `step` gives: none, one, or of a norm two."""
    if isinstance(step, Layer) and step.then is not None:
        return (step.then.out,)
    if isinstance(step, Layer | Pair | Pool):
        return () if step.grid is None else (Operand(step.out, step.grid),)
    if isinstance(step, Norm) and step.total is not None:
        return step.out, *writes(step.total)
    return () if isinstance(step, Rows | RowLayer | Dequantize | Float) else (step.out,)


def real_reads(step: Step) -> tuple[fx.Node, ...]:
    """The real values that `step` reads, constants too."""
    if isinstance(step, Quantize | Rows):
        return (step.given,)
    if isinstance(step, Norm):
        return () if step.sides else (source(step.node),)
    return tuple(step.node.all_input_nodes) if isinstance(step, Float) else ()


def writes_real(step: Step) -> fx.Node | None:
    """The real value that `step` gives, if it gives one."""
    if isinstance(step, RowLayer | Float):
        return step.node
    if isinstance(step, Layer | Pair | Pool):
        return step.out if step.grid is None else None
    return step.out if isinstance(step, Dequantize) else None
