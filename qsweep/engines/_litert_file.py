"""A file of LiteRT (`.tflite`): a graph of tensors and operators, as its schema has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor

TYPES: dict[torch.dtype, int] = {
    torch.float32: schema.TensorType.FLOAT32,
    torch.int8: schema.TensorType.INT8,
    torch.int32: schema.TensorType.INT32,
    torch.int64: schema.TensorType.INT64,
    torch.bool: schema.TensorType.BOOL,
}
_VERSIONS = {
    "CONV_2D": (1, 3),
    "DEPTHWISE_CONV_2D": (1, 3),
    "FULLY_CONNECTED": (1, 5),
    "RESHAPE": (1, 1),
    "CAST": (1, 1),
    "BROADCAST_TO": (2, 3),
}
"""From which on an operator takes floats, and int8, of layers with a scale for each channel; others: 1 and 2."""
_ALIGNMENT = 16
"""Bytes, of constants (`force_align` in the schema)."""


class _Buffer(schema.BufferT):  # type: ignore[misc]
    """Bytes of a constant, copied at once to an aligned place; the generated class does neither."""

    def Pack(self, builder: Any) -> Any:
        if self.data is None:
            return super().Pack(builder)
        builder.StartVector(1, len(self.data), _ALIGNMENT)
        builder.head -= len(self.data)
        builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class File:
    """Tensors and operators in the order in which they are added, which is that of execution."""

    def __init__(self) -> None:
        self._buffers = [_Buffer()]  # the first is empty, that of all that is computed
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[str, int], int] = {}

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        scales: Sequence[float] = (),
        zero_point: int = 0,
        axis: int = 0,
        name: str = "",
    ) -> int:
        """Its number. `scales`: of integers, one for all or one for each index along `axis`."""
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.hasRank = np.array(shape, np.int32), TYPES[dtype], True
        tensor.name = name or f"tensor{len(self._tensors)}"
        if len(scales):
            grid = tensor.quantization = schema.QuantizationParametersT()
            grid.scale, grid.zeroPoint = np.array(scales, np.float32), np.full(len(scales), zero_point, np.int64)
            grid.quantizedDimension = axis
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def constant(
        self, values: Tensor, scales: Sequence[float] = (), zero_point: int = 0, axis: int = 0, name: str = ""
    ) -> int:
        """Its number, see `tensor`."""
        made = self.tensor(values.shape, values.dtype, scales, zero_point, axis, name)
        buffer = _Buffer()
        buffer.data = values.detach().contiguous().numpy().tobytes()
        self._tensors[made].buffer = len(self._buffers)
        self._buffers.append(buffer)
        return made

    def operator(self, name: str, inputs: Sequence[int], output: int, kind: str = "", **options: Any) -> None:
        """`options`: fields of `kind`, the class of the operator's options in the schema."""
        operator = schema.OperatorT()
        integers = any(self._tensors[given].type == TYPES[torch.int8] for given in inputs)
        version = _VERSIONS.get(name, (1, 2))[integers]
        operator.opcodeIndex = self._codes.setdefault((name, version), len(self._codes))
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if kind:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            for field, value in options.items():
                assert hasattr(operator.builtinOptions, field), field
                setattr(operator.builtinOptions, field, value)
        self._operators.append(operator)

    def write(self, path: Path, given: int, result: int) -> None:
        """`given`, `result`: the numbers of what it takes and gives, `input` and `output` to who calls it by its
        signature."""
        self._tensors[given].name, self._tensors[result].name = "input", "output"
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs, graph.outputs = np.array([given], np.int32), np.array([result], np.int32)
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], self._buffers, []
        for name, version in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.version = getattr(schema.BuiltinOperator, name), version
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            model.operatorCodes.append(code)
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.inputs, signature.outputs = "serving_default", [], []
        for named, place in ((signature.inputs, given), (signature.outputs, result)):
            tensor = schema.TensorMapT()
            tensor.name, tensor.tensorIndex = self._tensors[place].name, place
            named.append(tensor)
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        path.write_bytes(builder.Output())
