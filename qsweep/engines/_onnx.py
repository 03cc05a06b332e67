"""The hub form as ONNX QDQ, and ONNX Runtime on it.

The structure of a graph is exported once by `torch.onnx` (seconds) and kept; a model of the same structure only fills
in its grids (milliseconds). On disk `model.onnx` holds the graph and the grids; the weights lie beside it in
`weights.safetensors`, packed, and join it when it is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qsweep.errors import Refused
from qsweep.hub.form import DEQUANTIZE, QUANTIZE, QuantizedModel, attributes
from qsweep.hub.save import load_weights, save_weights, structure

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

    from qsweep.engines.base import EngineConfig, Runner
    from qsweep.store import Store

MODEL, PACKED = "model.onnx", "packed.json"


def lower(model: QuantizedModel, folder: Path, store: Store) -> None:
    """Write `model.onnx`, `weights.safetensors` and `packed.json` (which weights are packed, and how)."""
    import onnx

    content = _skeleton(model, store)
    grids = [node.args[1:5] for node in model.graph.graph.nodes if node.target is QUANTIZE]
    _fill(content, grids)
    names = {name for name, _ in attributes(model.graph)}
    inline = [tensor for tensor in content.graph.initializer if tensor.name not in names]
    del content.graph.initializer[:]
    content.graph.initializer.extend(inline)
    _drop_unused(content)
    _drop_notes(content)
    onnx.save(content, folder / MODEL)
    (folder / PACKED).write_text(json.dumps(save_weights(model, folder)))


def complete(folder: Path) -> onnx.ModelProto:
    """The model with its weights, unpacked: standard ONNX that needs nothing beside it."""
    import onnx

    content = onnx.load(folder / MODEL)
    weights = load_weights(folder, json.loads((folder / PACKED).read_text()))
    read = {name for node in content.graph.node for name in node.input}
    for name, value in weights.items():
        if name in read:
            content.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    _integer_biases(content, weights)
    return content


def _integer_biases(content: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Biases as int32 with the accumulator's step, which they are multiples of: without it a Gemm stays float."""
    from onnx import helper, numpy_helper

    producers = {node.output[0]: node for node in content.graph.node}
    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    nodes = []
    for node in content.graph.node:
        sources = [producers.get(name) for name in node.input[:2]]
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and all(_dequantizes(source) for source in sources):
            given, weight = (source.input[1] for source in sources if source is not None)
            step = torch.from_numpy(numpy_helper.to_array(constants[given]).copy()) * weights[weight]
            name = f"{node.input[2]}.integer"
            parts = (weights[node.input[2]] / step).round().to(torch.int32), step
            for suffix, value in zip(("", ".step"), parts, strict=True):
                content.graph.initializer.append(numpy_helper.from_array(value.numpy(), f"{name}{suffix}"))
            output = f"{name}.real"
            nodes.append(helper.make_node("DequantizeLinear", [name, f"{name}.step"], [output], name=output, axis=0))
            node.input[2] = output
        nodes.append(node)
    ordered = [copy.deepcopy(node) for node in nodes]
    del content.graph.node[:]
    content.graph.node.extend(ordered)
    _drop_unused(content)


def _dequantizes(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def runner(folder: Path, engine: EngineConfig) -> Runner:
    """The artifact in ONNX Runtime at the engine's threads."""
    session = _session(complete(folder), engine)
    (given,) = session.get_inputs()

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: inputs.numpy()})[0])

    return run


def integer_macs(folder: Path, engine: EngineConfig, inputs: Tensor) -> float:
    """Share of integer multiply-accumulates among those that ONNX Runtime's own profile shows for one call."""
    content = complete(folder)
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(content, engine, profile=str(Path(scratch) / "profile"))
        (given,) = session.get_inputs()
        session.run(None, {given.name: inputs.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = _kernel_sizes(content)
    macs: Counter[bool] = Counter()
    for event in events:
        operator = event.get("args", {}).get("op_name")
        if event["name"].endswith("_kernel_time") and operator in _FLOAT | _INTEGER:
            (output,) = [math.prod(*entry.values()) for entry in event["args"]["output_type_shape"]][:1]
            name = event["name"].removesuffix("_kernel_time").split("_token_")[0]
            inner = kernels.get(name) or [*event["args"]["input_type_shape"][0].values()][0][-1]
            macs[operator in _INTEGER] += output * inner
    return macs[True] / max(1, macs.total())


_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_INTEGER = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}


def _kernel_sizes(content: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of one output element, by node: fused nodes keep the name, but show no packed weights."""
    shapes = {tensor.name: list(tensor.dims) for tensor in content.graph.initializer}
    shapes |= {node.output[0]: shapes[node.input[0]] for node in content.graph.node if node.input[0] in shapes}
    found = {}
    for node in content.graph.node:
        shape = shapes.get(node.input[1]) if len(node.input) > 1 else None
        if shape and node.op_type in _FLOAT:
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            by_rows = transposed or "Conv" in node.op_type
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
        raise Refused(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0][:300]}") from error


def _skeleton(model: QuantizedModel, store: Store) -> onnx.ModelProto:
    """The ONNX graph of the model's structure, in which the i-th grid has the scale i + 1 as a mark."""
    import onnx

    def compute(folder: Path) -> None:
        marked = copy.deepcopy(model.graph)
        marks: dict[Any, float] = {}
        for node in marked.graph.nodes:
            if node.target is QUANTIZE:
                marks[node] = float(len(marks) + 1)
                node.args = (node.args[0], marks[node], 0, -128, 127, torch.int8)
            elif node.target is DEQUANTIZE:
                node.args = (node.args[0], marks[node.args[0]], 0, -128, 127, torch.int8)
        marked.recompile()
        onnx.save(_export(marked, model.example), folder / MODEL)

    key = store.key("onnx", 1, structure(model), torch.__version__, onnx.__version__)
    return onnx.load(store.folder(key, compute) / MODEL)


def _export(graph: torch.fx.GraphModule, example: Tensor) -> onnx.ModelProto:
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, external_data=False
            )
    except Exception as error:  # the exporter raises many types; all mean that this engine cannot take the model
        raise Refused(f"`torch.onnx` cannot export the model: {str(error).splitlines()[0][:300]}") from error
    assert program is not None
    return program.model_proto


def _fill(content: onnx.ModelProto, grids: list[Any]) -> None:
    """Put the real grids where the marks are, as uint8 from 0; make rectifiers bounds of the integers.

    (The runtime has fast kernels for uint8 activations only; scale and levels stay, so the shift is exact.)
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    producers = {name: node for node in content.graph.node for name in node.output}
    readers = Counter(name for node in content.graph.node for name in node.input)
    nodes = []
    for node in content.graph.node:
        if node.op_type == "ReduceMean" and _over_the_image(node, constants):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:], node.input[1:]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in constants:
            mark = round(float(numpy_helper.to_array(constants[node.input[1]])))
            node.input[1], node.input[2] = f"grid{mark}.scale", f"grid{mark}.zero_point"
        elif node.op_type == "DequantizeLinear":
            node.input[:] = [node.input[0], f"{node.input[0]}_scale"]
            constants.pop(node.input[1], None)
        if node.op_type == "QuantizeLinear" and node.input[0] not in producers:
            nodes.append(_scaled_input(content, node, grids[mark - 1]))
        nodes.append(node)
        if node.op_type == "QuantizeLinear":
            nodes += _bounded(content, node, grids[mark - 1], producers, readers)
    for i, (scale, zero_point, low, _) in enumerate(grids, 1):
        _add(content, f"grid{i}.scale", np.float32(scale))
        _add(content, f"grid{i}.zero_point", np.uint8(zero_point - low))
    ordered = [copy.deepcopy(node) for node in nodes]
    del content.graph.node[:], content.graph.value_info[:]
    content.graph.node.extend(ordered)


def _scaled_input(content: onnx.ModelProto, node: onnx.NodeProto, grid: Any) -> onnx.NodeProto:
    """Times 1/scale, then quantized with scale 1: the contract's multiplication, where the runtime would divide."""
    from onnx import helper

    factor = _add(content, f"{node.input[0]}.inverse_scale", np.float32(1) / np.float32(grid[0]))
    scaled = f"{node.input[0]}.scaled"
    product = helper.make_node("Mul", [node.input[0], factor], [scaled], name=scaled)
    node.input[0], node.input[1] = scaled, _add(content, f"{scaled}.scale", np.float32(1))
    return product


def _bounded(
    content: onnx.ModelProto, node: onnx.NodeProto, grid: Any, producers: dict[str, Any], readers: Counter[str]
) -> list[onnx.NodeProto]:
    """A clip on the integers where the grid, or a rectifier that it then replaces, is narrower than uint8."""
    from onnx import helper, numpy_helper

    scale, zero_point, lowest, highest = grid
    low, high = lowest, highest
    source = producers.get(node.input[0])
    if source is not None and source.op_type in ("Relu", "Clip") and readers[node.input[0]] == 1:
        constants = {tensor.name: tensor for tensor in content.graph.initializer}
        bounds = [float(numpy_helper.to_array(constants[name])) for name in source.input[1:]] or [0.0]
        node.input[0] = source.input[0]
        low = max(low, zero_point + round(bounds[0] / scale))
        high = min(high, zero_point + round(bounds[1] / scale)) if len(bounds) > 1 else high
    low, high = low - lowest, high - lowest
    if (low, high) == (0, 255):
        return []
    result, node.output[0] = node.output[0], f"{node.output[0]}_unbounded"
    ends = [_add(content, f"{result}.{name}", np.uint8(end)) for name, end in (("low", low), ("high", high))]
    return [helper.make_node("Clip", [node.output[0], *ends], [result], name=f"{node.name}_bounds")]


def _over_the_image(node: onnx.NodeProto, constants: dict[str, Any]) -> bool:
    from onnx import helper, numpy_helper

    keep = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}.get("keepdims", 1)
    axes = numpy_helper.to_array(constants[node.input[1]]) if len(node.input) > 1 else np.array([])
    return bool(keep) and sorted(axis % 4 for axis in axes.tolist()) == [2, 3]


def _add(content: onnx.ModelProto, name: str, value: Any) -> str:
    from onnx import numpy_helper

    content.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _drop_unused(content: onnx.ModelProto) -> None:
    """Remove nodes and constants that nothing reads any more."""
    needed = {output.name for output in content.graph.output}
    kept = []
    for node in reversed(content.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    kept = [copy.deepcopy(node) for node in reversed(kept)]
    constants = [copy.deepcopy(tensor) for tensor in content.graph.initializer if tensor.name in needed]
    del content.graph.node[:], content.graph.initializer[:]
    content.graph.node.extend(kept)
    content.graph.initializer.extend(constants)


def _drop_notes(content: onnx.ModelProto) -> None:
    """Remove what the exporter wrote for debugging: stack traces are four fifths of a small model's file."""
    for item in [content, content.graph, *content.graph.node, *content.graph.input, *content.graph.output]:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
