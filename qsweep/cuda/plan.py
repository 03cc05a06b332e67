"""From a hub graph to steps: which of its nodes become one kernel, and which are left to PyTorch in floating point.

The rules are those of `qsweep.hub.integer`: what stands between a dequantize and the next quantize waits until the
quantize says onto which grid it goes. A layer, sum or pool that a float op reads is computed once more for it, real.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, fx

from qsweep.cuda.joins import with_residuals, with_tables, with_totals
from qsweep.cuda.products import VIEWS
from qsweep.cuda.shapes import sizes_of
from qsweep.cuda.steps import (
    OF_IMAGES,
    Add,
    Dequantize,
    Float,
    Layer,
    Map,
    Move,
    Multiply,
    Norm,
    Operand,
    Pair,
    Pool,
    Quantize,
    RowLayer,
    Rows,
    Step,
    writes,
)
from qsweep.errors import Refused
from qsweep.hub.fixed import fixed_nodes
from qsweep.hub.form import Grid, QuantizedModel, grid_of
from qsweep.hub.integer import UNBOUNDED
from qsweep.hub.kinds import (
    BINARY,
    COMPUTE,
    DEQUANTIZE,
    LINEARS,
    NEAREST,
    POINTWISE,
    POOLS,
    QUANTIZE,
    RECTIFIERS,
    SIZE,
    aten,
    keeps_grid,
    pool_count,
    rectified,
)
from qsweep.hub.nodes import arguments, constant, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, QUANTIZE_ROWS

WIDEST_NORM = 8192
"""Numbers of a row that the kernel for layer norms takes."""
_NO_GRID = Grid(1.0, 0, -128, 127)


@dataclass(frozen=True)
class Plan:
    """The steps of one model, in order."""

    graph: fx.GraphModule
    steps: list[Step]
    result: fx.Node
    """The float value that is the model's output."""
    shapes: dict[fx.Node, torch.Size]
    """Of every value, at the batch size the plan was made for."""
    same: dict[fx.Node, fx.Node]
    """Every quantize node whose integers exist, and the node they are named by."""
    fixed: dict[fx.Node, None]
    """Constants, and what depends on these alone, which no step computes."""
    work: dict[fx.Node, int]
    """Multiply-accumulates of every op."""

    @property
    def islands(self) -> list[str]:
        """Ops that PyTorch computes in floating point, each once."""
        return sorted({str(step.node.target) for step in self.steps if isinstance(step, Float)} - set(map(str, VIEWS)))

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates of one call on integers, and all."""
        layers = {step.node for step in self.steps if isinstance(step, Layer | RowLayer)}
        on_integers = sum(self.work[node] for node in layers)
        return on_integers, on_integers + sum(self.work[step.node] for step in self.steps if isinstance(step, Float))


@dataclass(frozen=True)
class _Waiting:
    """An op on integers whose result is neither rounded nor real yet."""

    step: Layer | Pair | Pool | Map | Norm
    """As its real value would be computed; a Map or a Norm with a grid that does not count."""


_State = Operand | _Waiting | Rows | None
"""What a node's value is: integers, waiting, rows on grids of their own, or (None) a constant or a float value."""


def plan(model: QuantizedModel, batch_size: int) -> Plan:
    """How `model` runs on batches of `batch_size`. Raises Refused for grids that int8 does not hold."""
    shapes, work = sizes_of(model, batch_size)
    planner = _Planner(model.graph, shapes, fixed_nodes(model.graph))
    for node in model.graph.graph.nodes:
        planner.visit(node)
    output = model.graph.graph.output_node()
    steps = with_totals(with_tables(with_residuals(planner.steps, planner.shapes)))
    return Plan(model.graph, steps, source(output), planner.shapes, _same(planner.same, steps), planner.fixed, work)


@dataclass
class _Planner:
    graph: fx.GraphModule
    shapes: dict[fx.Node, torch.Size]
    fixed: dict[fx.Node, None]
    steps: list[Step] = field(default_factory=list)
    states: dict[fx.Node, _State] = field(default_factory=dict)
    real: set[fx.Node] = field(default_factory=set)
    """Nodes whose float value has a step."""
    rows: set[fx.Node] = field(default_factory=set)
    """Nodes whose rows have one."""
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._make_real(source(node))
        elif node.op == "placeholder" or node in self.fixed or _is_size(node):
            self.states[node] = None
        else:
            self.states[node] = self._state(node)
            if self.states[node] is None:
                self._float(node)

    def _state(self, node: fx.Node) -> _State:
        given = self.states.get(source(node)) if node.args and isinstance(node.args[0], fx.Node) else None
        if node.target is QUANTIZE:
            return self._quantized(node, given)
        if node.target is DEQUANTIZE:
            return given
        if node.target is QUANTIZE_ROWS:
            self._make_real(source(node))
            return Rows(node, source(node), cast(int, node.args[2]))
        if node.target is aten.layer_norm.default:
            return self._norm(node, given)
        if isinstance(given, _Waiting):
            return self._rectified(node, given)
        if keeps_grid(node) and (node.target not in OF_IMAGES or self._has_kernel(node)):
            return self._moved(node)
        return self._begun(node, given) if isinstance(given, Operand) else None

    def _float(self, node: fx.Node) -> None:
        given = self.states.get(source(node)) if node.args and isinstance(node.args[0], fx.Node) else None
        stored = node.target in LINEARS and source(node, 1).target is DEQUANTIZE_WEIGHT
        if isinstance(given, Rows) and stored:
            if given.out not in self.rows:
                self.rows.add(given.out)
                self.steps.append(given)
            self.steps.append(RowLayer(node, given.out))
            return
        for value in node.all_input_nodes:
            self._make_real(value)
        self.steps.append(Float(node))

    def _begun(self, node: fx.Node, given: Operand) -> _State:
        """An op on integers, if there is a kernel for it."""
        if node.target in COMPUTE:
            stored = source(node, 1).target is DEQUANTIZE_WEIGHT
            return _Waiting(Layer(node, None, UNBOUNDED, node, given)) if stored else None
        if node.target in BINARY and len(node.args) == 2 and not node.kwargs:
            right = self.states.get(source(node, 1)) if isinstance(node.args[1], fx.Node) else None
            if isinstance(right, Operand):
                kind = Multiply if node.target is aten.mul.Tensor else Add
                return _Waiting(kind(node, None, UNBOUNDED, given, right))
            return None
        if node.target in POOLS and len(self.shapes[source(node)]) == 4:
            count = pool_count(node, *self.shapes[source(node)][-2:])
            return _Waiting(Pool(node, None, UNBOUNDED, node, given, count)) if count else None
        if node.target in POINTWISE | RECTIFIERS and node.all_input_nodes == [source(node)]:
            return _Waiting(Map(Operand(node, given.grid), node, given))
        return None

    def _rectified(self, node: fx.Node, given: _Waiting) -> _State:
        step = given.step
        if node.target not in RECTIFIERS or isinstance(step, Map | Norm):
            return None
        return _Waiting(replace(step, out=node, bounds=step.bounds.within(*rectified(node))))

    def _norm(self, node: fx.Node, given: _State) -> _State:
        """Of the last dimension, with finite weights."""
        sizes = arguments(node)
        parts = [constant(self.graph, sizes[name]) for name in ("weight", "bias")]
        if (
            len(sizes["normalized_shape"]) > 1
            or sizes["normalized_shape"][0] > WIDEST_NORM
            or not all(map(_finite, parts))
        ):
            return None
        sides: tuple[Operand, ...] = (given,) if isinstance(given, Operand) else ()
        if isinstance(given, _Waiting) and isinstance(given.step, Add) and given.step.bounds == UNBOUNDED:
            both = given.step.left, given.step.right
            sides = both if all(self.shapes[side.node] == self.shapes[node] for side in both) else ()
        return _Waiting(Norm(Operand(node, _NO_GRID), node, sides))

    def _has_kernel(self, node: fx.Node) -> bool:
        """Whether it takes a batch of images, and repeats pixels a whole number of times if it does."""
        given, size = self.shapes[source(node)], self.shapes[node]
        whole = all(after % before == 0 for before, after in zip(given[2:], size[2:], strict=True))
        return len(size) == 4 and (whole or node.target is not NEAREST)

    def _moved(self, node: fx.Node) -> _State:
        given = [self.states.get(value) for value in node.all_input_nodes]
        values = [value for value in given if isinstance(value, Operand)]
        if not values or len(values) < len(given) or any(value.grid != values[0].grid for value in values):
            return None
        parts = tuple(cast(Operand, self.states[part]) for part in _parts(node))
        self.steps.append(Move(Operand(node, values[0].grid), node, parts))
        return Operand(node, values[0].grid)

    def _quantized(self, node: fx.Node, given: _State) -> Operand:
        grid = grid_of(node)
        if not -128 <= grid.low <= grid.high <= 127:
            raise Refused(f"`{node.name}`: int8 kernels need integers from -128 to 127 (got {grid.low} to {grid.high})")
        if not (isinstance(given, Operand) and given.grid == grid):
            self.steps.append(self._onto(node, grid, given))
            given = Operand(node, grid)
        self.same[node] = given.node
        return given

    def _onto(self, node: fx.Node, grid: Grid, given: _State) -> Step:
        out = Operand(node, grid)
        if isinstance(given, Operand):
            return Map(out, None, given)
        if given is None or isinstance(given, Rows):
            self._make_real(source(node))
            return Quantize(out, source(node))
        if isinstance(given.step, Norm) and not given.step.sides:
            self._make_real(source(given.step.node))
        if isinstance(given.step, Map | Norm):
            return replace(given.step, out=out)
        return replace(given.step, out=node, grid=grid)

    def _make_real(self, node: fx.Node) -> None:
        """See that the float value of `node` has a step."""
        state = self.states.get(node)
        if node in self.real or state is None:
            return
        self.real.add(node)
        if isinstance(state, Operand):
            self.steps.append(Dequantize(node, state))
        elif isinstance(state, Rows) or isinstance(state.step, Map | Norm):
            self._float(node)
        else:
            self.steps.append(state.step)


def _finite(values: Tensor | None) -> bool:
    return values is not None and bool(values.isfinite().all())


def _is_size(node: fx.Node) -> bool:
    """Whether it is a size, or nothing else of it is read."""
    return node.target is SIZE or (bool(node.users) and all(user.target is SIZE for user in node.users))


def _parts(node: fx.Node) -> list[fx.Node]:
    """The values that an op of SAME_GRID moves, a part of a concatenation as often as it stands there."""
    given = next(iter(arguments(node).values()))
    return list(given) if isinstance(given, list | tuple) else [given]


def _same(same: dict[fx.Node, fx.Node], steps: list[Step]) -> dict[fx.Node, fx.Node]:
    there = {value.node for step in steps for value in writes(step)}
    return {node: name for node, name in same.items() if name in there}
