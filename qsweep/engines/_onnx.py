"""The hub form as an artifact in ONNX.

On disk `model.onnx` holds the graph and the grids; the weights lie beside it in `weights.safetensors`, packed, and join
it when it is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qsweep.engines._onnx_graph import add_weights, without_weights
from qsweep.errors import BundleError, Refused
from qsweep.hub.fixed import with_computed_layers
from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, nodes_of
from qsweep.hub.save import DAMAGE, load_weights, save_weights

if TYPE_CHECKING:
    import onnx

    from qsweep.store import Store

MODEL, PACKED = "model.onnx", "packed.json"
DTYPE = "dtype"
"""Names the floating-point type, if it is not float32, in which weights are stored and a runtime is to compute."""


def lower(model: QuantizedModel, folder: Path, store: Store) -> None:
    """Write `model.onnx`, `weights.safetensors` and `packed.json` (which weights are packed, and how)."""
    import onnx

    if any(
        arguments(node)["divisor_override"] is not None for node in nodes_of(model.graph, {aten.avg_pool2d.default})
    ):
        raise Refused("ONNX has no average pools with `divisor_override`")
    model = with_computed_layers(model)
    content = without_weights(model, store)
    if model.dtype != torch.float32:
        content.metadata_props.add(key=DTYPE, value=str(model.dtype).removeprefix("torch."))
    onnx.save(content, folder / MODEL)
    read = {name for node in content.graph.node for name in node.input}
    (folder / PACKED).write_text(json.dumps(save_weights(model, folder, read)))


def complete(folder: Path) -> onnx.ModelProto:
    """The artifact as one ONNX model, weights unpacked and real ones in float32. Raises BundleError where its files are
    damaged."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        content = onnx.load(folder / MODEL)
        weights = load_weights(folder, json.loads((folder / PACKED).read_text()))
        add_weights(
            content, {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        )
    except (*DAMAGE, DecodeError) as error:
        raise BundleError(f"`{folder}`: the artifact cannot be read ({type(error).__name__}: {error})") from error
    return content
