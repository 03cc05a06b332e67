"""ONNX Runtime on artifacts in ONNX."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsweep.engines._onnx import complete
from qsweep.engines._onnx_nodes import attribute
from qsweep.engines._onnx_weights import PACKED_PRODUCT, rounding
from qsweep.errors import Refused, why

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

    from qsweep.engines.base import EngineConfig, Runner


def runner(folder: Path, engine: EngineConfig) -> Runner:
    """The artifact in ONNX Runtime at the engine's threads."""
    session = _session(complete(folder), engine)
    (given,) = session.get_inputs()

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: inputs.numpy()})[0])

    return run


def integer_macs(folder: Path, engine: EngineConfig, inputs: Tensor) -> int:
    """Those of integer kernels, from ONNX Runtime's own profile of one call."""
    content = complete(folder)
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(content, engine, profile=str(Path(scratch) / "profile"))
        (given,) = session.get_inputs()
        session.run(None, {given.name: inputs.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = _kernel_sizes(content) | {name: depth for name, (_, depth) in _rounding(content, engine).items()}
    macs = 0
    for event in events:
        operator = event.get("args", {}).get("op_name")
        name = event["name"].removesuffix("_kernel_time").split("_token_")[0]
        integer = operator in _INTEGER or (operator == PACKED_PRODUCT and name in kernels)
        if event["name"].endswith("_kernel_time") and integer:
            output = math.prod(next(iter(event["args"]["output_type_shape"][0].values())))
            inner = kernels.get(name) or next(iter(event["args"]["input_type_shape"][0].values()))[-1]
            macs += output * inner
    return macs


_INTEGER = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}


def _rounding(content: onnx.ModelProto, engine: EngineConfig) -> dict[str, tuple[int, int]]:
    def run(product: onnx.ModelProto, inputs: Tensor) -> Tensor:
        (outputs,) = _session(product, engine).run(None, {product.graph.input[0].name: inputs.numpy()})
        return torch.from_numpy(outputs)

    return rounding(content, run)


def _kernel_sizes(content: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of one output element, by node: fused nodes keep the name, but show no packed weights."""
    shapes = {tensor.name: list(tensor.dims) for tensor in content.graph.initializer}
    shapes |= {node.output[0]: shapes[node.input[0]] for node in content.graph.node if node.input[0] in shapes}
    found = {}
    for node in content.graph.node:
        shape = shapes.get(node.input[1]) if len(node.input) > 1 else None
        if shape and node.op_type in ("Conv", "Gemm", "MatMul"):
            by_rows = attribute(node, "transB", 0) or "Conv" in node.op_type
            found[node.name] = math.prod(shape[1:]) if by_rows else shape[-2]
    return found


def _session(content: onnx.ModelProto, engine: EngineConfig, profile: str | None = None) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = engine.threads
    options.log_severity_level = 3
    # Its threads would spin for a while after a call, and slow down whatever else is measured in this process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        return onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exception types share no public base
        raise Refused(f"ONNX Runtime cannot load the model: {why(error)}") from error
