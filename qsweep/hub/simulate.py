"""The hub form computed in float: what a person who only simulates quantization would see."""

from __future__ import annotations

import copy

import torch
from torch import fx

from qsweep.hub.form import DEQUANTIZE, QUANTIZE, QuantizedModel, set_constant
from qsweep.hub.ops import QUANTIZE_DYNAMIC, QUANTIZE_ROWS, STORED, dynamic_fake_quantize, row_fake_quantize
from qsweep.hub.weights import real_weight


def simulation(model: QuantizedModel) -> fx.GraphModule:
    """A float graph with the same values as `model`: each quantize-dequantize pair as one fake-quantize op.

    (`quantized_decomposed` computes the pair in seven passes over the tensor.) Runs in the model's dtype and takes and
    gives float32.
    """
    graph = copy.deepcopy(model.graph)
    for node in list(graph.graph.nodes):
        if node.target is DEQUANTIZE and node.args[0].target is QUANTIZE:
            value, *grid, _ = node.args[0].args
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(
                    graph.graph.call_function(torch.fake_quantize_per_tensor_affine, (value, *grid))
                )
        elif node.target is QUANTIZE_DYNAMIC:
            node.target = dynamic_fake_quantize  # compilers see through it
        elif node.target is QUANTIZE_ROWS:
            node.target = row_fake_quantize
        elif node.target in STORED:
            name = f"{node.args[0].target}_simulated"
            set_constant(graph, name, real_weight(graph, node))
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return in_dtype(graph, model.dtype)


def in_dtype(graph: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """`graph` with constants and arithmetic in `dtype`, in place; input and output stay float32."""
    if dtype != torch.float32:
        graph.to(dtype)
        (given,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
        with graph.graph.inserting_after(given):
            cast = graph.graph.call_function(torch.ops.aten.to.dtype, (given, dtype))
        given.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
        output = graph.graph.output_node()
        with graph.graph.inserting_before(output):
            output.args = (graph.graph.call_function(torch.ops.aten.to.dtype, (output.args[0], torch.float32)),)
        graph.recompile()
    return graph
