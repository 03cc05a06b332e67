"""The integer contract computed exactly: the hub form on tensors of integers.

Values between a dequantize and the next quantize are never float here: an accumulator with its step, or a sum of two
integer tensors, waits until the quantize op says onto which grid it goes. Accumulators are float64 tensors, in which
every integer below 2^53 is exact; a layer whose sums could leave int32 is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from qsweep.errors import Refused
from qsweep.hub.form import (
    BINARY,
    COMPUTE,
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    POOLS,
    QUANTIZE,
    RECTIFIERS,
    SAME_GRID,
    aten,
)


@dataclass(frozen=True)
class Integers:
    """Integers (float64 tensor) on a grid: value = (q - zero_point) * scale."""

    q: Tensor
    scale: Tensor
    zero_point: int

    def real(self) -> Tensor:
        return (self.q - self.zero_point).float() * self.scale


@dataclass(frozen=True)
class Weight:
    """Integer weights (float64) and their scales (C,)."""

    q: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Accumulator:
    """Exact sums; value = sum * step, step per channel. `low`, `high`: bounds that a rectifier set."""

    sums: Tensor
    step: Tensor
    count: int = 1
    """Sums of a pool are over this many elements: their step is divided by it on the way out."""
    low: float | None = None
    high: float | None = None

    def real(self) -> Tensor:
        return _rectified(self.sums.float() * _channels(self.step / self.count, self.sums), self)

    def onto(self, scale: Tensor) -> Tensor:
        multiplier = self.step / (scale * self.count) if self.count > 1 else self.step / scale
        return self.sums.float() * _channels(multiplier, self.sums)


@dataclass(frozen=True)
class Sum:
    """The sum of two integer tensors, each on its own grid."""

    left: Integers
    right: Integers
    low: float | None = None
    high: float | None = None

    def real(self) -> Tensor:
        return _rectified(self.left.real() + self.right.real(), self)

    def onto(self, scale: Tensor) -> Tensor:
        left = (self.left.q - self.left.zero_point).float() * (self.left.scale / scale)
        return left + (self.right.q - self.right.zero_point).float() * (self.right.scale / scale)


def _rectified(values: Tensor, bounds: Accumulator | Sum) -> Tensor:
    if bounds.low is None and bounds.high is None:
        return values
    return values.clamp(bounds.low, bounds.high)


def _channels(step: Tensor, sums: Tensor) -> Tensor:
    """(C,) as it broadcasts over (B, C, ...) or, for linears, (..., C)."""
    return step if step.dim() == 0 or sums.dim() == 2 else step.reshape(-1, *[1] * (sums.dim() - 2))


class IntegerInterpreter(fx.Interpreter):
    """Runs a hub graph by the integer contract. Call with a float32 batch; gives float32."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.tensors: dict[str, Tensor] = {}
        """int8 results of the last call, by node name, when `keep` is set."""
        self.keep = False
        self.integer_macs = 0
        self.macs = 0

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        self.tensors, self.integer_macs, self.macs = {}, 0, 0
        return cast(Tensor, _real(self.run(inputs)))

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = self._call(n.target, args, kwargs)
        if self.keep and n.target is QUANTIZE:
            self.tensors[n.name] = value.q.to(torch.int8)
        return value

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0]
        if target is QUANTIZE:
            return quantize(*args[:5])
        if target is DEQUANTIZE:
            return given
        if target is DEQUANTIZE_WEIGHT:
            return Weight(given.double(), args[1])
        if target in COMPUTE:
            return self._compute(target, args, kwargs)
        if target in BINARY and isinstance(given, Integers) and isinstance(args[1], Integers) and not kwargs:
            return Sum(given, args[1])
        if target in RECTIFIERS and isinstance(given, Accumulator | Sum):
            return replace(given, **_bounds(target, args))
        if target in POOLS and isinstance(given, Integers):
            return _pool(target, given, args, kwargs)
        if target in SAME_GRID and any(isinstance(item, Integers) for item in _flat(given)):
            return _move(target, args, kwargs)
        return target(*(_real(argument) for argument in args), **kwargs)

    def _compute(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, weight = args[0], args[1]
        bias = args[2] if len(args) > 2 else None
        if not (isinstance(given, Integers) and isinstance(weight, Weight)):
            result = target(*(_real(argument) for argument in args), **kwargs)
            self._count(result, _real(weight), integer=False)
            return result
        step = given.scale * weight.scale
        sums = target(given.q - given.zero_point, weight.q, None, *args[3:], **kwargs)
        if bias is not None:
            sums = sums + _channels((bias / step).round().double(), sums)
        if int(sums.abs().max()) >= 2**31:
            raise Refused("a sum leaves the int32 accumulator")
        self._count(sums, weight.q, integer=True)
        return Accumulator(sums, step)

    def _count(self, result: Tensor, weight: Tensor, *, integer: bool) -> None:
        macs = result.numel() * weight[0].numel()
        self.macs += macs
        self.integer_macs += macs if integer else 0


def quantize(values: Any, scale: float, zero_point: int, low: int, high: int) -> Integers:
    """Onto the grid: a float tensor by `x * (1/s)`, an accumulator or a sum by its multiplier; half to even."""
    s = torch.tensor(scale, dtype=torch.float32)
    bottom, top = low - zero_point, high - zero_point
    if isinstance(values, Integers):  # moved by an op that keeps the grid
        values = values.real()
    if isinstance(values, Tensor):
        return Integers(((values * (1 / s)).round() + zero_point).clamp(low, high).double(), s, zero_point)
    scaled = values.onto(s)
    if values.low is not None:
        bottom = max(bottom, round(values.low / scale))
    if values.high is not None:
        top = min(top, round(values.high / scale))
    return Integers(scaled.clamp(bottom, top).round().double() + zero_point, s, zero_point)


def _bounds(target: Any, args: tuple[Any, ...]) -> dict[str, float]:
    if target in (aten.relu.default, aten.relu_.default):
        return {"low": 0.0}
    if target is aten.relu6.default:
        return {"low": 0.0, "high": 6.0}
    low, high = (*args[1:], *(-1.0, 1.0)[len(args) - 1 :])[:2]
    return {"low": low, "high": high}


def _pool(target: Any, given: Integers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    centred = given.q - given.zero_point
    if target is aten.adaptive_avg_pool2d.default and list(args[1]) == [1, 1]:
        count = centred.shape[-1] * centred.shape[-2]
        return Accumulator(centred.sum((-2, -1), keepdim=True), given.scale, count)
    return target(given.real(), *args[1:], **kwargs)


def _move(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Integers:
    """An op that only moves values, on centred integers: the zeros it pads with are then the real 0."""
    first = next(item for item in _flat(args[0]) if isinstance(item, Integers))
    moved = target(_centred(args[0]), *args[1:], **kwargs)
    return Integers(moved + first.zero_point, first.scale, first.zero_point)


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
    return value.real() if isinstance(value, Integers | Accumulator | Sum) else value


def integer_macs(runner: IntegerInterpreter, inputs: Tensor) -> float:
    """Share of integer multiply-accumulates in one call."""
    runner(inputs)
    return runner.integer_macs / max(1, runner.macs)
