from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field

from qsweep.quantize.base import LowBit


class Table(LowBit):
    """Weights as indices into a table of values; activations and arithmetic stay in floating point."""

    version: ClassVar[int] = 4
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Of an index: the table has 2^bits values."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["edge_bits"] * (self.weight_bits == 8))

    @property
    def not_integer(self) -> str | None:
        return "only weights are quantized, to levels of unequal steps"

    @property
    def in_float(self) -> bool:
        return True

    def bits_of(self, *, edge: bool) -> int:
        """Bits of a layer's weights; `edge`: the first or the last layer."""
        return self.edge_bits if edge and self.edge_bits else self.weight_bits

    def label(self) -> str:
        """Such as `apot-w4`, with `-edge8` where the first and last layer have 8 bits."""
        edge = [f"edge{self.edge_bits}"] if self.edge_bits else []
        return "-".join([self.method, f"w{self.weight_bits}", *edge, *self._label_of_layers()])
