"""The structure of a hub graph in ONNX, without the numbers of any model."""

from __future__ import annotations

import copy
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from qsweep.engines._onnx_nodes import RUNTIME, add, attribute, import_runtime, producers_of, set_nodes
from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, QUANTIZE, aten
from qsweep.hub.nodes import attributes, constant, nodes_of, set_constant, source
from qsweep.hub.ops import QUANTIZE_ROWS, STORED
from qsweep.hub.save import structure

if TYPE_CHECKING:
    import onnx

    from qsweep.store import Store

_FILE = "model.onnx"


def skeleton(model: QuantizedModel, store: Store) -> onnx.ModelProto:
    """The ONNX graph of the model's structure, in which the i-th grid has the scale i as a mark, counted from 1."""
    import onnx

    def compute(folder: Path) -> None:
        from qsweep.engines._onnx_export import exported  # takes seconds

        marked, weights = _marked(model)
        content = exported(marked, model.example)
        _with_rows(content, marked, weights)
        _keep_changed(content, marked, _of_layers(model))
        _with_global_pools(content)
        _spell_out(content, weights)
        _with_quick_gelus(content)
        onnx.save(content, folder / _FILE)

    key = store.key("onnx", 15, structure(model), _other_constants(model), torch.__version__, onnx.__version__)
    return onnx.load(store.folder(key, compute) / _FILE)


def _of_layers(model: QuantizedModel) -> set[str]:
    """Names of the weights and biases of layers, and of what stands beside them: every model has its own."""
    nodes = [*nodes_of(model.graph, COMPUTE), *nodes_of(model.graph, STORED)]
    return {str(given.target) for node in nodes for given in node.all_input_nodes if given.op == "get_attr"}


def _other_constants(model: QuantizedModel) -> dict[str, str]:
    """SHA-256 by name of all other constants: the exporter computes with them beforehand."""
    own = _of_layers(model)
    values = {name: value for name, value in attributes(model.graph) if name not in own}
    return {name: sha256(value.detach().contiguous().numpy().tobytes()).hexdigest() for name, value in values.items()}


_MARK = 9 / 64
"""Fraction of the factors that stand for grids; a number that float32 holds exactly and models do not multiply by."""

ROWS = 27 / 64
"""Fraction of those that stand for rows on grids of their own; before the point stands their highest integer."""


def _marked(model: QuantizedModel) -> tuple[torch.fx.GraphModule, set[str]]:
    """The graph with one multiplication for each quantize-dequantize pair and for quantized rows, and the names of its
    integer weights.

    The exporter takes half of its time for these pairs; it passes a multiplication on as it is. Weights and biases have
    random values: it drops a bias of zeros, and one of two constants that are equal.
    """
    graph = copy.deepcopy(model.graph)
    weights, generator, own = set(), torch.Generator().manual_seed(0), _of_layers(model)
    for name, value in [(name, value) for name, value in attributes(graph) if name in own]:
        if value.is_floating_point():
            set_constant(graph, name, torch.rand(value.shape, generator=generator))
    for i, node in enumerate(nodes_of(graph, {QUANTIZE}), 1):
        for pair in [user for user in node.users if user.target is DEQUANTIZE]:
            with graph.graph.inserting_before(pair):
                pair.replace_all_uses_with(graph.graph.call_function(aten.mul.Tensor, (node.args[0], i + _MARK)))
    for node in nodes_of(graph, {QUANTIZE_ROWS}):
        with graph.graph.inserting_before(node):
            high = cast(int, node.args[2])
            node.replace_all_uses_with(graph.graph.call_function(aten.mul.Tensor, (node.args[0], high + ROWS)))
    for node in nodes_of(graph, STORED):
        name = str(source(node).target)
        weights.add(name)
        integers = constant(graph, node)
        assert integers is not None
        set_constant(graph, name, torch.rand(integers.shape, generator=generator))
        node.replace_all_uses_with(source(node))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, weights


def _keep_changed(content: onnx.ModelProto, graph: torch.fx.GraphModule, own: set[str]) -> None:
    """Constants that the exporter has changed under their names, as it folds a norm into a transposed convolution, get
    names of their own, in place: those of the model are not put there. Raises Refused where it has computed with what
    every model has its own of, which is random here."""
    from onnx import numpy_helper

    constants = dict(attributes(graph))
    read = {name for node in content.graph.node for name in node.input}
    lost, changed = sorted(own.intersection(constants) - read), {}
    for tensor in content.graph.initializer:
        value = constants.get(tensor.name)
        if value is not None and not np.array_equal(numpy_helper.to_array(tensor), value.detach().numpy()):
            lost += own.intersection({tensor.name})
            changed[tensor.name] = tensor.name = f"{tensor.name}.folded"
    if lost:
        raise Refused(f"`torch.onnx` computes with `{lost[0]}` beforehand, which differs from model to model")
    for node in content.graph.node:
        node.input[:] = [changed.get(name, name) for name in node.input]


def _with_rows(content: onnx.ModelProto, graph: torch.fx.GraphModule, weights: set[str]) -> None:
    """Constants (directions, gates, inputs) of gated layers, which the exporter has made of integer weights by
    sorting the gates, as rows of these, in place."""
    from onnx import numpy_helper

    known = {name: value.detach().numpy() for name, value in attributes(graph) if name in weights and value.dim() == 2}
    places = {row.tobytes(): (name, place) for name, value in known.items() for place, row in enumerate(value)}
    nodes: list[onnx.NodeProto] = []
    constants = list(content.graph.initializer)
    del content.graph.initializer[:]
    for tensor in constants:
        rows = numpy_helper.to_array(tensor) if len(tensor.dims) == 3 else np.empty((0, 0, 0))
        found = [[places[row.tobytes()] for row in direction if row.tobytes() in places] for direction in rows]
        if found and list(map(len, found)) == [len(direction) for direction in rows]:
            nodes += _sorted_rows(content, found, tensor.name)
        else:
            content.graph.initializer.append(tensor)
    set_nodes(content, [*nodes, *content.graph.node])


def _sorted_rows(content: onnx.ModelProto, found: list[list[tuple[str, int]]], result: str) -> list[onnx.NodeProto]:
    """For each direction the rows of the weight that it names."""
    from onnx import helper

    first, nodes, parts = add(content, f"{result}.first", np.array([0])), [], []
    for number, rows in enumerate(found):
        order = add(content, f"{result}.order{number}", np.array([place for _, place in rows]))
        one, part = f"{result}.rows{number}", f"{result}.direction{number}"
        nodes.append(helper.make_node("Gather", [rows[0][0], order], [one], name=one))
        nodes.append(helper.make_node("Unsqueeze", [one, first], [part], name=part))
        parts.append(part)
    return [*nodes, helper.make_node("Concat", parts, [result], name=result, axis=0)]


def _with_global_pools(content: onnx.ModelProto) -> None:
    """Means over images as the pool that has an integer kernel, in place."""
    known = (*content.graph.input, *content.graph.value_info, *content.graph.output)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}
    constants = {tensor.name: tensor for tensor in content.graph.initializer}
    for node in content.graph.node:
        image = ranks.get(node.output[0]) == 4
        if node.op_type == "ReduceMean" and image and _over_the_image(node, constants):
            node.op_type = "GlobalAveragePool"
            del node.attribute[:], node.input[1:]


def _over_the_image(node: onnx.NodeProto, constants: dict[str, Any]) -> bool:
    from onnx import numpy_helper

    keep = attribute(node, "keepdims", 1)
    axes = numpy_helper.to_array(constants[node.input[1]]) if len(node.input) > 1 else np.array([])
    return bool(keep) and sorted(axes.tolist()) in ([2, 3], [-2, -1])


def _spell_out(content: onnx.ModelProto, weights: set[str]) -> None:
    """Quantize and dequantize nodes again for what `_marked` put, in place."""
    from onnx import helper, numpy_helper

    scalars = {t.name: float(numpy_helper.to_array(t)) for t in content.graph.initializer if not t.dims}
    zero, one = add(content, "mark.zero_point", np.int8(0)), add(content, "mark.scale", np.float32(1))
    nodes: list[onnx.NodeProto] = []
    seen = set()

    def once(kind: str, inputs: list[str], output: str) -> str:
        if output not in seen:
            seen.add(output)
            nodes.append(helper.make_node(kind, inputs, [output], name=output, axis=0))
        return output

    for node in content.graph.node:
        factor = scalars.get(node.input[1], 0.0) if node.op_type == "Mul" else 0.0
        if factor % 1 == _MARK:
            scale = f"mark{int(factor)}.scale"
            if scale not in seen:
                seen.add(add(content, scale, np.float32(int(factor))))
            integers = once("QuantizeLinear", [node.input[0], scale, zero], f"quantized{int(factor)}")
            nodes.append(helper.make_node("DequantizeLinear", [integers, scale, zero], node.output, name=node.name))
            continue
        if node.op_type in ("Gather", "Slice") and node.input[0] in weights:
            node.input[0] = once("DequantizeLinear", [node.input[0], one], f"{node.input[0]}.rows")
        for i, name in enumerate(node.input):
            if name in weights:
                node.input[i] = once("DequantizeLinear", [name, one], f"{name}.real")
        nodes.append(node)
    set_nodes(content, nodes)
    del content.graph.value_info[:]


def _with_quick_gelus(content: onnx.ModelProto) -> None:
    """x * sigmoid(a x) of dequantized values as the runtime's op for it, in place.

    (It finds this itself where it has not given each reader of such a value a dequantize op of its own.)
    """
    from onnx import helper, numpy_helper

    producers = producers_of(content)
    scalars = {t.name: float(numpy_helper.to_array(t)) for t in content.graph.initializer if not t.dims}

    def made_by(name: str, kind: str) -> bool:
        return name in producers and producers[name].op_type == kind

    def slope(value: str, gate: str) -> float | None:
        """a, where `gate` is sigmoid(a * `value`)."""
        if not (made_by(value, "DequantizeLinear") and made_by(gate, "Sigmoid")):
            return None
        given = producers[gate].input[0]
        if given == value:
            return 1.0
        factors = list(producers[given].input) if made_by(given, "Mul") else []
        return scalars.get(factors[1 - factors.index(value)]) if value in factors else None

    for node in [node for node in content.graph.node if node.op_type == "Mul"]:
        one, other = node.input
        found = {value: slope(value, gate) for value, gate in ((one, other), (other, one))}
        for value, alpha in found.items():
            if alpha is not None:
                node.op_type, node.domain, node.input[:] = "QuickGelu", RUNTIME, [value]
                node.attribute.append(helper.make_attribute("alpha", alpha))
    if any(node.domain == RUNTIME for node in content.graph.node):
        import_runtime(content)
