"""OpenVINO on artifacts in ONNX."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import openvino
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.opset13 import constant
from torch import Tensor

from qsweep.engines._onnx import DTYPE, complete
from qsweep.engines._onnx_nodes import attribute
from qsweep.engines._onnx_parts import with_parts
from qsweep.engines._onnx_weights import PACKED_PRODUCT, rounding
from qsweep.engines._openvino_graph import (
    computed_constants,
    core,
    takes_integers,
    with_compared_masks,
    with_kept_axes,
    without_reduced_maxima,
)
from qsweep.engines._openvino_onnx import with_biases, with_named_axes, with_real_products, without_wrong_kernels
from qsweep.errors import Refused

if TYPE_CHECKING:
    import onnx

    from qsweep.engines.base import EngineConfig
    from qsweep.tasks._parts import Parts


class OpenVINORunner:
    """The artifact compiled for the engine's batch size and threads."""

    def __init__(self, folder: Path, engine: EngineConfig) -> None:
        content = complete(folder)
        model = _model(content)
        shape = model.input().partial_shape
        shape[0] = engine.batch_size
        model.reshape(shape)
        computed_constants(model)
        settings = _arithmetic(content) | {
            "INFERENCE_NUM_THREADS": engine.threads,
            "NUM_STREAMS": 1,
            # It would bind the thread that calls, too, and with it whatever is measured beside it.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            self._compiled = core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise Refused(f"OpenVINO cannot compile the model: {_reason(error)}") from error
        self.shape = tuple(model.input().shape)
        self.dtype = torch.int64 if model.input().get_element_type().is_integral() else torch.float32
        self._request = self._compiled.create_infer_request()

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.shape != self.shape:
            raise Refused(f"the model takes inputs {list(self.shape)} (got {list(inputs.shape)})")
        given = inputs.to(self.dtype).contiguous().numpy()
        return torch.from_numpy(self._request.infer(given, share_inputs=True, share_outputs=True)[0])

    def integer_macs(self, folder: Path) -> int:
        """Those of integer kernels in one call, from the graph that OpenVINO has made of the model in `folder`."""
        content = complete(folder)
        settings = _arithmetic(content)

        def run(product: onnx.ModelProto, inputs: Tensor) -> Tensor:
            compiled = core().compile_model(core().read_model(product.SerializeToString()), "CPU", settings)
            return torch.from_numpy(compiled(inputs.numpy())[0])

        packed = set(rounding(content, run).values())
        nodes = self._compiled.get_runtime_model().get_ops()
        return sum(_macs(cast(openvino.Node, node), packed) for node in nodes)


def write_ir(artifact: Path, out: Path, parts: Mapping[str, Parts], engine: EngineConfig) -> None:
    """Write `model.xml` and `model.bin`, which take batches of any size, or of the one that was measured where OpenVINO
    gets any other wrong, and `settings.json`, with which OpenVINO computes what was measured: left to itself it takes
    bf16 where that is quicker, for numbers of words, too. In bf16 these are integers."""
    content = complete(artifact)
    with_parts(content, parts)
    model = _model(content)
    for ports, named in ((model.inputs, content.graph.input), (model.outputs, content.graph.output)):
        for port, value in zip(ports, named, strict=True):
            port.get_tensor().set_names({value.name})
    if not _same_for_any_size(artifact, engine):
        model.reshape({port: [engine.batch_size, *list(port.partial_shape)[1:]] for port in model.inputs})
    _compute_recurrent_weights(model)
    apply_moc_transformations(model, cf=False)  # else shapes and constants are written as they are computed
    openvino.save_model(model, out / "model.xml", compress_to_fp16=False)
    (out / "settings.json").write_text(json.dumps({"CPU": _arithmetic(content)}, indent=2))


_RECURRENT = {"GRUSequence": (3, 4), "LSTMSequence": (4, 5), "RNNSequence": (3, 4)}
"""Where the weights of layers stand among what they read."""


def _compute_recurrent_weights(model: openvino.Model) -> None:
    """As constants: of a file OpenVINO compiles no layers whose weights are yet to be computed from integers."""
    for node in model.get_ordered_ops():
        for port in _RECURRENT.get(node.get_type_name(), ()):
            weight = core().compile_model(openvino.Model([node.input_value(port)], []), "CPU")([])[0]
            node.input(port).replace_source_output(constant(weight).output(0))


def _same_for_any_size(artifact: Path, engine: EngineConfig) -> bool:
    """Whether the model gives the same compiled for batches of any size as for those of one, as it was measured; what
    OpenVINO cannot compile or run so does not."""
    content, measured = complete(artifact), OpenVINORunner(artifact, engine)
    given = 1 + torch.rand(measured.shape, generator=torch.Generator().manual_seed(0)) / 2  # as words all the first one
    wanted = measured(given)
    try:
        compiled = core().compile_model(_model(content), "CPU", _arithmetic(content))
        found = torch.from_numpy(compiled(given.to(measured.dtype).numpy())[0])
    except RuntimeError:
        return False
    near = _ALIKE * float(wanted.nan_to_num().abs().max())
    return torch.allclose(found, wanted, rtol=0, atol=near, equal_nan=True)


_ALIKE = 0.02
"""Of the largest output: sums in another order move an integer here and there."""


def _arithmetic(content: onnx.ModelProto) -> dict[str, Any]:
    """Settings by which floats stay what they are and become integers only where they meet packed weights."""
    blocks = [attribute(node, "block_size") for node in content.graph.node if node.op_type == PACKED_PRODUCT]
    return {
        "INFERENCE_PRECISION_HINT": _precision(content),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(blocks, default=0),
    }


def _precision(content: onnx.ModelProto) -> str:
    types = {each.value for each in content.metadata_props if each.key == DTYPE}
    return "bf16" if types == {"bfloat16"} else "f32"


def _model(content: onnx.ModelProto) -> openvino.Model:
    with_named_axes(content)
    with_biases(content)
    with_real_products(content)
    without_wrong_kernels(content)
    try:
        model = core().read_model(content.SerializeToString())
    except RuntimeError as error:
        raise Refused(f"OpenVINO cannot read the model: {_reason(error)}") from error
    without_reduced_maxima(model)
    with_kept_axes(model)
    with_compared_masks(model)
    if _precision(content) == "bf16":
        takes_integers(model)
    return model


def _reason(error: RuntimeError) -> str:
    """What it says, but for places in OpenVINO's own sources."""
    said = " ".join(re.sub(r"Exception from \S+|Check '.*' failed at \S+", "", str(error)).split())
    if len(said) > 2 * _ENOUGH:  # it begins with where it was, and ends with why
        said = f"{said[:_ENOUGH]} ... {said[-_ENOUGH:]}"
    return said or "it does not say why"


_ENOUGH = 200
"""Characters of the beginning and of the end of a long message."""
_INTEGER = "_i8"
"""How the names of integer kernels end, of uint8 in capitals."""


def _macs(node: openvino.Node, packed: Collection[tuple[int, int]]) -> int:
    """Of a node of the compiled graph, whose inputs show the shapes of weights as the kernel takes them.

    `packed`: of linears with packed weights that run on integers, which the names of their kernels do not tell.
    """
    told = {name: value.astype(str) for name, value in node.get_rt_info().items()}
    given: list[list[int]] = [list(each.get_shape()) for each in node.inputs()[:2]]
    few_bits = len(given) > 1 and not node.input(1).get_element_type().is_real()
    if not told["primitiveType"].lower().endswith(_INTEGER) and not (few_bits and tuple(given[1]) in packed):
        return 0
    result: list[int] = list(node.output(0).get_shape())
    match told["layerType"]:
        case "Convolution":
            return math.prod(result) * math.prod(given[1]) // result[1]
        case "Deconvolution":
            return math.prod(given[0]) * math.prod(given[1]) // given[0][1]
        case "FullyConnected" | "MatMul":
            return math.prod(result) * given[0][-1]
    return 0
