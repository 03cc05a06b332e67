"""The hub form on disk: `graph.json` and `weights.safetensors`, no pickle. Weights under 8 bits are packed."""

from __future__ import annotations

import json
import operator
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from qsweep.errors import BundleError
from qsweep.hub.form import QuantizedModel, idle_zero_points, stored_bits
from qsweep.hub.kinds import NAMESPACES
from qsweep.hub.nodes import attributes, set_constant
from qsweep.hub.ops import DEQUANTIZE_GROUPS, DEQUANTIZE_WEIGHT
from qsweep.hub.packing import pack, unpack

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
DAMAGE = (OSError, ValueError, LookupError, AttributeError, TypeError, SafetensorError)
"""What reading a damaged file raises."""
_FORMAT = 1
_PART = "getitem"
"""Stands for the op that takes one of several tensors."""


def save(model: QuantizedModel, folder: Path) -> None:
    """Write `graph.json` and `weights.safetensors` to `folder`."""
    names = {node: f"n{i}" for i, node in enumerate(model.graph.graph.nodes)}
    content = {
        "format": _FORMAT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "example": list(model.example.shape),
        "packed": {},
        "nodes": [_node(node, names) for node in model.graph.graph.nodes],
    }
    content["packed"] = save_weights(model, folder)
    (folder / GRAPH).write_text(json.dumps(content, separators=(",", ":")))


def structure(model: QuantizedModel, *, widths: bool = False) -> str:
    """The graph without its grids: equal for models that differ in scales, zero points and bits alone; with `widths`
    only where each grid of an activation, of weights where these are quantized alone, has as many levels, and the
    arithmetic beside them one type."""
    names = {node: f"n{i}" for i, node in enumerate(model.graph.graph.nodes)}
    rows = [_node(node, names) for node in model.graph.graph.nodes]
    counted = "per_channel" if model.weights_alone else "per_tensor"
    for row in rows:
        if row[1].startswith("quantized_decomposed."):
            levels = row[2][-2] - row[2][-3] if widths and counted in row[1] else 0
            row[2] = [*(argument for argument in row[2] if isinstance(argument, dict)), levels]
    shapes = {name: [list(value.shape), str(value.dtype)] for name, value in attributes(model.graph)}
    return json.dumps([rows, shapes, list(model.example.shape), str(model.dtype) if widths else ""])


def save_weights(model: QuantizedModel, folder: Path, read: Collection[str] | None = None) -> dict[str, Any]:
    """Write `weights.safetensors`, those that are `read` if that is told; returns {name: [bits, shape]} of the tensors
    that were packed."""
    bits, idle = stored_bits(model.graph), idle_zero_points(model.graph)
    tensors, packed = {}, {}
    for name, value in attributes(model.graph):
        if read is not None and name not in read:
            continue
        if name in bits and bits[name] < 8:
            packed[name] = [bits[name], list(value.shape)]
            value = pack(value, bits[name])
        elif value.is_floating_point() and model.dtype != torch.float32:
            value = value.to(model.dtype)
        if name not in idle:
            tensors[name] = value.detach().clone().contiguous()
    save_file(tensors, folder / WEIGHTS)
    return packed


def load(folder: Path) -> QuantizedModel:
    """Read what `save` wrote; raises BundleError where the files are damaged or of another format."""
    try:
        content = json.loads((folder / GRAPH).read_text())
        if content["format"] != _FORMAT:
            raise BundleError(f"`{folder / GRAPH}`: format must be {_FORMAT} (got {content['format']})")
        graph = fx.GraphModule(_constants(folder, content["packed"], content["nodes"]), _graph(content["nodes"]))
        example = torch.rand(content["example"], generator=torch.Generator().manual_seed(0))
        return QuantizedModel(graph, example, getattr(torch, content["dtype"]))
    except DAMAGE as error:
        raise BundleError(f"`{folder}`: the saved graph cannot be read ({type(error).__name__}: {error})") from error


def load_weights(folder: Path, packed: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `weights.safetensors`, unpacked."""
    tensors = load_file(folder / WEIGHTS)
    for name, (bits, shape) in packed.items():
        tensors[name] = unpack(tensors[name], bits, tuple(shape))
    return tensors


def _constants(folder: Path, packed: dict[str, Any], rows: list[list[Any]]) -> torch.nn.Module:
    """The stored tensors, and the zero points that were left out."""
    root, tensors = torch.nn.Module(), load_weights(folder, packed)
    for _, target, arguments, *_ in rows:
        if target in (str(DEQUANTIZE_WEIGHT), str(DEQUANTIZE_GROUPS)):
            integers, scale, zero_point = (rows[argument["n"]][1] for argument in arguments[:3])
            kind = torch.int64 if target == str(DEQUANTIZE_WEIGHT) else tensors[integers].dtype
            tensors.setdefault(zero_point, torch.zeros(tensors[scale].shape, dtype=kind))
    for name, value in tensors.items():
        set_constant(root, name, value)
    return root


def _node(node: fx.Node, names: dict[fx.Node, str]) -> list[Any]:
    """[op, target, args, kwargs]; a reference to the i-th node is {"n": i}."""

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"n": int(names[value][1:])}
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
            return {"t": str(value)}
        if isinstance(value, list | tuple):
            return [encode(item) for item in value]
        return value

    arguments = [encode(argument) for argument in node.args]
    target = _PART if node.target is operator.getitem else str(node.target)
    content: list[Any] = [node.op, target, arguments]
    return [*content, {key: encode(value) for key, value in node.kwargs.items()}] if node.kwargs else content


def _graph(rows: list[list[Any]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            return nodes[value["n"]] if "n" in value else _torch_name(value["t"])
        return [decode(item) for item in value] if isinstance(value, list) else value

    for op, target, arguments, *rest in rows:
        kwargs = {key: decode(value) for key, value in (rest[0] if rest else {}).items()}
        if op == "call_function":
            nodes.append(graph.call_function(_op(target), tuple(decode(arguments)), kwargs))
        elif op == "output":
            nodes.append(graph.output(decode(arguments[0])))
        elif op in ("placeholder", "get_attr"):
            nodes.append(graph.create_node(op, target, name=target.replace(".", "_")))
        else:
            raise ValueError(f"node kind `{op}` is not known")
    return graph


def _op(target: str) -> Any:
    if target == _PART:
        return operator.getitem
    if target.split(".")[0] not in NAMESPACES:
        raise ValueError(f"op `{target}` is not one that a graph may call")
    value: Any = torch.ops
    for part in target.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch._ops.OpOverload):
        raise ValueError(f"`{target}` is not an op")
    return value


def _torch_name(text: str) -> Any:
    if text.startswith("torch."):
        return getattr(torch, text.removeprefix("torch."))
    return torch.device(text)
