"""The integer contract computed exactly: the hub form on tensors of integers.

Values between a dequantize and the next quantize are never float here: an accumulator with its step, or a sum or
product of two integer tensors, waits until the quantize op says onto which grid it goes. Accumulators are float64
tensors, in which every integer below 2^53 is exact. Average pools whose windows differ in size average in float, as
runtimes do, and are the only op that is not exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from qsweep.hub.form import Grid
from qsweep.hub.kinds import (
    BINARY,
    COMPUTE,
    DEQUANTIZE,
    EMBEDDING,
    LINEARS,
    POINTWISE,
    POOLS,
    QUANTIZE,
    RECTIFIERS,
    aten,
    keeps_grid,
    pool_count,
    rectified,
)
from qsweep.hub.nodes import arguments
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, QUANTIZE_ROWS, row_scale


@dataclass(frozen=True)
class Integers:
    """Integers (float64 tensor) on a grid: value = (q - zero_point) * scale."""

    q: Tensor
    scale: Tensor
    zero_point: int

    def real(self) -> Tensor:
        return (self.q - self.zero_point).float() * self.scale


@dataclass(frozen=True)
class Rows:
    """Integers (float64 tensor), each row on a symmetric grid of its own: value = q * scale, scale (..., 1)."""

    q: Tensor
    scale: Tensor

    def real(self) -> Tensor:
        return self.q.float() * self.scale


@dataclass(frozen=True)
class Weight:
    """Integer weights (float64) and their scales (C,)."""

    q: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Bounds:
    """What rectifiers set: values stay between `low` and `high`."""

    low: float = -math.inf
    high: float = math.inf

    def within(self, low: float, high: float) -> Bounds:
        return Bounds(max(self.low, low), min(self.high, high))

    def on(self, grid: Grid) -> tuple[int, int]:
        """The lowest and highest integer of `grid` that lie inside."""
        low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
        if self.low > -math.inf:
            low = max(low, round(self.low / grid.scale))
        if self.high < math.inf:
            high = min(high, round(self.high / grid.scale))
        return low + grid.zero_point, high + grid.zero_point


UNBOUNDED = Bounds()


@dataclass(frozen=True)
class Accumulator:
    """Exact sums (B, C, ...); value = sum * step, step () or (C,)."""

    sums: Tensor
    step: Tensor
    count: int = 1
    """Sums of a pool are over this many elements: their step is divided by it on the way out."""
    bounds: Bounds = UNBOUNDED

    def real(self) -> Tensor:
        values = self.sums.float() * _channels(self.step / self.count, self.sums)
        return values.clamp(self.bounds.low, self.bounds.high)

    def onto(self, scale: Tensor) -> Tensor:
        multiplier = self.step / (scale * self.count) if self.count > 1 else self.step / scale
        return self.sums.float() * _channels(multiplier, self.sums)


@dataclass(frozen=True)
class Pair(ABC):
    """Two integer tensors, each on its own grid, element by element."""

    left: Integers
    right: Integers
    bounds: Bounds = UNBOUNDED

    def real(self) -> Tensor:
        return self._unbounded().clamp(self.bounds.low, self.bounds.high)

    @abstractmethod
    def onto(self, scale: Tensor) -> Tensor:
        """In units of `scale`."""

    @abstractmethod
    def _unbounded(self) -> Tensor: ...


class Sum(Pair):
    """Their sum."""

    def _unbounded(self) -> Tensor:
        return self.left.real() + self.right.real()

    def onto(self, scale: Tensor) -> Tensor:
        left = (self.left.q - self.left.zero_point).float() * (self.left.scale / scale)
        return left + (self.right.q - self.right.zero_point).float() * (self.right.scale / scale)


class Product(Pair):
    """Their product."""

    def _unbounded(self) -> Tensor:
        return self._centred() * (self.left.scale * self.right.scale)

    def onto(self, scale: Tensor) -> Tensor:
        return self._centred() * (self.left.scale * self.right.scale / scale)

    def _centred(self) -> Tensor:
        """Below 2^24, so exact in float32."""
        return ((self.left.q - self.left.zero_point) * (self.right.q - self.right.zero_point)).float()


def _channels(step: Tensor, sums: Tensor) -> Tensor:
    """(C,) as it broadcasts over (B, C, ...)."""
    return step if step.dim() == 0 else step.reshape(-1, *[1] * (sums.dim() - 2))


class IntegerInterpreter(fx.Interpreter):
    """Runs a hub graph by the integer contract. Call with a float32 batch; gives float32."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.keep = False
        self.tensors: dict[str, Tensor] = {}
        """int8 results of the last call, by node name, when `keep` is set."""
        self.integer_macs = 0
        """Multiply-accumulates of the last call on integers."""

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        self.tensors, self.integer_macs = {}, 0
        return cast(Tensor, _real(self.run(inputs)))

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = self._call(n, args, kwargs)
        if self.keep and n.target is QUANTIZE:
            self.tensors[n.name] = value.q.to(torch.int8)
        return value

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        given = args[0]
        if target is QUANTIZE:
            return quantize(*args[:5])
        if target is DEQUANTIZE:
            return given
        if target is QUANTIZE_ROWS:
            return quantize_rows(_real(given), args[2])
        if target is DEQUANTIZE_WEIGHT:
            return Weight(given.double(), args[1])
        if target is EMBEDDING and isinstance(given, Weight):  # the rows that are read, not the whole table
            return target(given.q, args[1]).float() * target(given.scale.unsqueeze(1), args[1])
        if target in COMPUTE:
            return self._compute(target, args, kwargs)
        if target in BINARY and isinstance(given, Integers) and isinstance(args[1], Integers) and not kwargs:
            return Product(given, args[1]) if target is aten.mul.Tensor else Sum(given, args[1])
        if target in RECTIFIERS and isinstance(given, Accumulator | Pair):
            return replace(given, bounds=given.bounds.within(*rectified(node)))
        if target in POOLS and isinstance(given, Integers):
            return _pool(node, given, args, kwargs)
        if target in POINTWISE and isinstance(given, Integers):
            return target(given.real().double(), *args[1:], **kwargs).float()
        if keeps_grid(node) and _on_one_grid(_flat(given)):
            return _move(target, args, kwargs)
        return target(*(_real(argument) for argument in args), **kwargs)

    def _compute(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, weight = args[0], args[1]
        bias = args[2] if len(args) > 2 else None
        if isinstance(given, Rows) and isinstance(weight, Weight) and target in LINEARS:
            sums = target(given.q, weight.q)
            self._count(sums, weight.q)
            result = sums.float() * given.scale * weight.scale
            return result if bias is None else result + bias
        if not (isinstance(given, Integers) and isinstance(weight, Weight)):
            return target(*(_real(argument) for argument in args), **kwargs)
        step = given.scale * weight.scale
        sums = target(given.q - given.zero_point, weight.q, None, *args[3:], **kwargs)
        if bias is not None:
            sums = sums + _channels((bias / step).round().double(), sums)
        self._count(sums, weight.q)
        return Accumulator(sums, step)

    def _count(self, result: Tensor, weight: Tensor) -> None:
        self.integer_macs += result.numel() * weight[0].numel()


def quantize(values: Any, scale: float, zero_point: int, low: int, high: int) -> Integers:
    """Onto the grid: a float tensor by `x * (1/s)`, an accumulator or a sum by its multiplier; half to even."""
    s = torch.tensor(scale, dtype=torch.float32)
    if isinstance(values, Integers):  # moved by an op that keeps the grid
        values = values.real()
    if isinstance(values, Tensor):
        return Integers(((values * (1 / s)).round() + zero_point).clamp(low, high).double(), s, zero_point)
    low, high = values.bounds.on(Grid(scale, zero_point, low, high))
    centred = values.onto(s).clamp(low - zero_point, high - zero_point).round().double()
    return Integers(centred + zero_point, s, zero_point)


def quantize_rows(values: Tensor, high: int) -> Rows:
    """Onto the grids that `qsweep.hub.ops.row_fake_quantize` describes."""
    scale = row_scale(values, high)
    return Rows((values * (1 / scale)).round().clamp(-high, high).nan_to_num().double(), scale)


def _pool(node: fx.Node, given: Integers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    centred, target = given.q - given.zero_point, cast(Any, node.target)
    count = pool_count(node, *centred.shape[-2:])
    if count is None:
        return target(given.real(), *args[1:], **kwargs)
    if target is aten.adaptive_avg_pool2d.default:
        return Accumulator(centred.sum((-2, -1), keepdim=True), given.scale, count)
    options = arguments(node)
    sums = target(centred, *[options[name] for name in _WINDOW], divisor_override=1)
    return Accumulator(sums, given.scale, count)


_WINDOW = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")


def _move(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Integers:
    """An op that only moves values, on centred integers: the zeros it pads with are then the real 0."""
    first = _flat(args[0])[0]
    moved = target(_centred(args[0]), *args[1:], **kwargs)
    return Integers(moved + first.zero_point, first.scale, first.zero_point)


def _on_one_grid(items: list[Any]) -> bool:
    grids = {(item.scale.item(), item.zero_point) if isinstance(item, Integers) else None for item in items}
    return len(grids) == 1 and None not in grids


def _centred(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_centred(item) for item in value]
    return value.q - value.zero_point


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _real(value: Any) -> Any:
    if isinstance(value, Weight):
        return value.q.float() * value.scale.reshape(-1, *[1] * (value.q.dim() - 1))
    if isinstance(value, list | tuple):
        return [_real(item) for item in value]
    return value.real() if isinstance(value, Integers | Accumulator | Pair | Rows) else value
