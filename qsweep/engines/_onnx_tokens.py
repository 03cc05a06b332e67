"""Linears whose rows set their own grids (`activation_mode: token`) in ONNX: products of integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsweep.engines._onnx_nodes import add, producers_of, set_nodes, stored_factor
from qsweep.engines._onnx_structure import ROWS
from qsweep.hub.ops import LEAST_SCALE

if TYPE_CHECKING:
    import onnx

MIDDLE = "rows.middle"
"""Name of the zero point, 128: the runtime multiplies uint8 by int8 seven to sixty times as quickly as int8 by int8."""


def with_token_grids(content: onnx.ModelProto) -> None:
    """Spell out the marks of quantized rows, and make the products that read them ones of integers, in place.

    Takes weights as `DequantizeLinear` of integers (N, K) and scales (N,), with or without a Transpose behind it. The
    order is that of the contract: f32(sum) * row scale * weight scale + bias.
    """
    _Rows(content).spell_out()


class _Rows:
    def __init__(self, content: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.content = content
        scalars = {t.name: float(numpy_helper.to_array(t)) for t in content.graph.initializer if not t.dims}
        self.high = {
            node.output[0]: int(factor)
            for node in content.graph.node
            if node.op_type == "Mul" and (factor := scalars.get(node.input[1], 0.0)) % 1 == ROWS
        }
        self.producers = producers_of(content)
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def spell_out(self) -> None:
        if not self.high:
            return
        for node in self.content.graph.node:
            if node.output[0] in self.high:
                self._quantize(node)
            elif (weight := stored_factor(node, self.producers)) and node.input[0] in self.high:
                self._multiply(node, *weight)
            else:
                self.nodes.append(node)
        set_nodes(self.content, self.nodes)

    def _quantize(self, node: onnx.NodeProto) -> None:
        """`NAME.integers` and `NAME.scale` (..., 1), and the real values for whoever else reads them.

        Scales under `LEAST_SCALE` become that, not 1: such rows are nothing but zeros all the same, or next to it. The
        runtime's maximum of a row overlooks NaN.
        """
        given, name = node.input[0], node.output[0]
        last, high = self._constant("rows.last", np.array([-1])), self.high[name]
        top = self._constant(f"rows.high{high}", np.float32(high))
        least = self._constant("rows.least", np.float32(LEAST_SCALE))
        self._add("Abs", [given], f"{name}.magnitudes")
        self._add("ReduceMax", [f"{name}.magnitudes", last], f"{name}.largest", keepdims=1)
        self._add("Div", [f"{name}.largest", top], f"{name}.fitted")
        self._add("Max", [f"{name}.fitted", least], f"{name}.scale")
        self._add("Reciprocal", [f"{name}.scale"], f"{name}.inverse")
        self._add("Mul", [given, f"{name}.inverse"], f"{name}.steps")
        self._add("QuantizeLinear", [f"{name}.steps", *self._grid()], f"{name}.integers")
        self._add("DequantizeLinear", [f"{name}.integers", *self._grid()], f"{name}.levels")
        self._add("Mul", [f"{name}.levels", f"{name}.scale"], name)

    def _multiply(self, node: onnx.NodeProto, weight: str, scale: str) -> None:
        rows, result = node.input[0], node.output[0]
        columns = f"{weight}.columns"
        if columns not in self.made:
            self.made.add(columns)
            self._add("Transpose", [weight], columns, perm=[1, 0])
        self._add("MatMulInteger", [f"{rows}.integers", columns, self._grid()[1]], f"{result}.sums")
        self._add("Cast", [f"{result}.sums"], f"{result}.real", to=1)
        biased = len(node.input) > 2
        product = f"{result}.product" if biased else result
        self._add("Mul", [f"{result}.real", f"{rows}.scale"], f"{result}.scaled")
        self._add("Mul", [f"{result}.scaled", scale], product)
        if biased:
            self._add("Add", [product, node.input[2]], result)

    def _grid(self) -> list[str]:
        return [self._constant("rows.one", np.float32(1)), self._constant(MIDDLE, np.uint8(128))]

    def _constant(self, name: str, value: Any) -> str:
        if name not in self.made:
            self.made.add(add(self.content, name, value))
        return name

    def _add(self, kind: str, given: list[str], result: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, given, [result], name=result, **attributes))
