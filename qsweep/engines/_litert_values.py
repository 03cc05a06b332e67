"""What operators of LiteRT give: tensors that lie in some order of dimensions, real or integers on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qsweep.engines._litert_file import TYPES, File
from qsweep.errors import Refused
from qsweep.hub.form import Grid

Order = tuple[int, ...]
"""For each dimension of a tensor as it lies, which of those of the graph it is."""


def plain(rank: int) -> Order:
    """As the graph has them."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """As kernels of images want them: (N, ..., C)."""
    return (0, *range(2, rank), 1)


@dataclass(frozen=True)
class Value:
    """A tensor of the file."""

    index: int
    shape: tuple[int, ...]
    """As the graph has it."""
    order: Order
    dtype: torch.dtype = torch.float32
    grid: Grid | None = None
    """Of integers that stand for real values."""

    @property
    def lies(self) -> list[int]:
        """The shape in which it lies."""
        return [self.shape[dim] for dim in self.order]


class Values:
    """The file as it grows, and the values of the nodes of a graph."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.of: dict[fx.Node, Value] = {}
        self.constants: dict[fx.Node, Tensor] = {}
        """Nodes that no input goes into."""
        self.stored: dict[tuple[str, tuple[int, ...], bool], int] = {}
        """Weights by name, as they are laid and whether integers are read, each once however many layers read it."""
        self._real: dict[int, int] = {}
        """By number: what the integers stand for. One tensor may be the value of several nodes, in other orders."""
        self._turned: dict[tuple[int, tuple[int, ...]], int] = {}
        self._laid: dict[tuple[fx.Node, int, Order], Value] = {}

    def make(
        self,
        name: str,
        inputs: Sequence[Value | int],
        shape: Sequence[int],
        order: Order | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        grid: Grid | None = None,
        kind: str = "",
        **options: Any,
    ) -> Value:
        """What the operator `name` gives of `inputs`."""
        lies = plain(len(shape)) if order is None else order
        dtype = dtype if grid is None else torch.int8
        scales, zero_point = ([], 0) if grid is None else ([grid.scale], grid.zero_point)
        index = self.file.tensor([shape[dim] for dim in lies], dtype, scales, zero_point)
        given = [each.index if isinstance(each, Value) else each for each in inputs]
        self.file.operator(name, given, index, kind, **options)
        return Value(index, tuple(shape), lies, dtype, grid)

    def moved(
        self,
        name: str,
        value: Value,
        others: Sequence[Value | int],
        shape: Sequence[int],
        order: Order | None = None,
        kind: str = "",
        **options: Any,
    ) -> Value:
        """What an operator gives that moves or selects what is in `value`, of the same type and grid."""
        inputs = [value, *others]
        return self.make(name, inputs, shape, order, dtype=value.dtype, grid=value.grid, kind=kind, **options)

    def constant(self, tensor: Tensor, order: Order | None = None) -> Value:
        """A constant, laid in `order`."""
        held = tensor.float() if tensor.dtype in (torch.float16, torch.float64) else tensor
        lies = plain(held.dim()) if order is None else order
        return Value(self.file.constant(held.permute(lies)), tuple(held.shape), lies, held.dtype)

    def numbers(self, *values: int) -> int:
        """The index of a vector that tells an operator something."""
        return self.file.constant(torch.tensor(values, dtype=torch.int32))

    def value(self, node: fx.Node, order: Order | None = None) -> Value:
        """Of a node, as it is: integers where it is on a grid."""
        if node in self.constants:
            rank = self.constants[node].dim()
            return self._constant(node, rank, plain(rank) if order is None else order)
        if node not in self.of:
            raise Refused(f"LiteRT has no operator for `{node.target}`")
        return self.of[node] if order is None else self.arranged(self.of[node], order)

    def real(self, node: fx.Node, order: Order | None = None) -> Value:
        """`value` where it is real, else what its integers stand for."""
        value = self.value(node, order)
        if value.grid is None:
            return value
        if value.index not in self._real:
            self._real[value.index] = self.make("DEQUANTIZE", [value], value.shape, value.order).index
        return replace(value, index=self._real[value.index], dtype=torch.float32, grid=None)

    def arranged(self, value: Value, order: Order) -> Value:
        """The same, laid in `order`."""
        if value.order == order:
            return value
        turned = tuple(value.order.index(dim) for dim in order)
        if (value.index, turned) not in self._turned:
            made = self.moved("TRANSPOSE", value, [self.numbers(*turned)], value.shape, order, "TransposeOptions")
            self._turned[value.index, turned] = made.index
        return replace(value, index=self._turned[value.index, turned], order=order)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """As `torch.reshape` gives it."""
        value = self.arranged(value, plain(len(value.shape)))
        if value.shape == tuple(shape):
            return value
        sizes = list(shape)
        return self.moved("RESHAPE", value, [self.numbers(*sizes)], sizes, None, "ReshapeOptions", newShape=sizes)

    def widened(self, value: Value, rank: int) -> Value:
        """One of at least `rank` dimensions, the first of them 1 where it has less."""
        missing = rank - len(value.shape)
        return self.reshaped(value, [1] * missing + list(value.shape)) if missing > 0 else value

    def together(self, givens: Sequence[Any], rank: int, dtypes: Sequence[torch.dtype]) -> list[Value]:
        """What an op takes element by element, nodes and numbers, real values where they stand for some, each of its
        type, all of `rank` dimensions and laid as the first that is computed and has so many."""
        computed = [self.of[given] for given in givens if given in self.of]
        order = next((value.order for value in computed if len(value.shape) == rank), plain(rank))
        return [
            self.typed(self._wide(given, rank, order), dtype)
            if isinstance(given, fx.Node)
            else self.constant(torch.tensor(given, dtype=dtype))
            for given, dtype in zip(givens, dtypes, strict=True)
        ]

    def typed(self, value: Value, dtype: torch.dtype) -> Value:
        """The same numbers as another type. Raises Refused for one that tensors here do not have."""
        if value.dtype == dtype:
            return value
        if dtype not in TYPES:
            raise Refused(f"LiteRT has no tensors of {dtype} here")
        options: dict[str, Any] = {"inDataType": TYPES[value.dtype], "outDataType": TYPES[dtype]}
        return self.make("CAST", [value], value.shape, value.order, dtype=dtype, kind="CastOptions", **options)

    def _wide(self, node: fx.Node, rank: int, order: Order) -> Value:
        if node in self.constants:
            return self._constant(node, rank, order)
        return self.arranged(self.widened(self.real(node), rank), order)

    def _constant(self, node: fx.Node, rank: int, order: Order) -> Value:
        """One of `rank` dimensions, the first of them 1 where it has less."""
        if (node, rank, order) not in self._laid:
            tensor = self.constants[node]
            wide = tensor.reshape([1] * (rank - tensor.dim()) + list(tensor.shape))
            self._laid[node, rank, order] = self.constant(wide, order)
        return self._laid[node, rank, order]
