"""Which ops of ATen are written as operators of LiteRT, and arithmetic in these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ai_edge_litert import schema_py_generated as schema
from torch import fx

from qsweep.engines._litert_values import Value, Values
from qsweep.hub.form import Grid

NONE = schema.ActivationFunctionType.NONE
Write = Callable[[Values, fx.Node], Value]
"""Adds the operators that give what a node gives."""
OPS: dict[Any, Write] = {}
"""How an op is written, by the op."""


def write(*targets: Any) -> Callable[[Write], Write]:
    def known(function: Write) -> Write:
        OPS.update(dict.fromkeys(targets, function))
        return function

    return known


class Result(NamedTuple):
    """What a layer is to give: its shape, integers on `grid` unless that is None, after `activation`."""

    shape: Sequence[int]
    grid: Grid | None = None
    activation: int = NONE


def shape_of(node: fx.Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def step(
    values: Values, name: str, kind: str, dtype: torch.dtype, given: Value, *others: Value, **options: Any
) -> Value:
    """An operator element by element, of values that lie alike, into the shape of the first."""
    return values.make(name, [given, *others], given.shape, given.order, dtype=dtype, kind=kind, **options)


class Real:
    """Arithmetic on one real value, in operators."""

    def __init__(self, values: Values, value: Value) -> None:
        self.values, self.value = values, value

    def of(self, name: str, kind: str = "", **options: Any) -> Real:
        return Real(self.values, step(self.values, name, kind, torch.float32, self.value, **options))

    def with_other(self, name: str, kind: str, other: Real | float, **options: Any) -> Real:
        second = other.value if isinstance(other, Real) else self.values.constant(torch.tensor(float(other)))
        return Real(self.values, step(self.values, name, kind, torch.float32, self.value, second, **options))

    def __mul__(self, other: Real | float) -> Real:
        return self.with_other("MUL", "MulOptions", other, fusedActivationFunction=NONE)

    def __add__(self, other: Real | float) -> Real:
        return self.with_other("ADD", "AddOptions", other, fusedActivationFunction=NONE)

    def __sub__(self, other: Real | float) -> Real:
        return self.with_other("SUB", "SubOptions", other, fusedActivationFunction=NONE)

    def at_least(self, other: float) -> Real:
        return self.with_other("MAXIMUM", "MaximumMinimumOptions", other)

    def at_most(self, other: float) -> Real:
        return self.with_other("MINIMUM", "MaximumMinimumOptions", other)

    def between(self, low: float | None, high: float | None) -> Real:
        bounded = self if low is None or low == -math.inf else self.at_least(low)
        return bounded if high is None or high == math.inf else bounded.at_most(high)
