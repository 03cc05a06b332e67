"""The hub form computed in float: what a person who only simulates quantization would see."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, QUANTIZE, RECURRENT, aten, keeps_grid
from qsweep.hub.nodes import is_real, set_constant
from qsweep.hub.ops import QUANTIZE_DYNAMIC, QUANTIZE_ROWS, STORED, dynamic_fake_quantize, row_fake_quantize
from qsweep.hub.weights import real_weight

_TO = aten.to.dtype
_ONE_TYPE = (
    COMPUTE
    | RECURRENT
    | {
        aten.conv3d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
        aten.layer_norm.default,
        aten.group_norm.default,
        aten.batch_norm.default,
    }
)
"""Ops that want all they read in one type."""


class _Typed(fx.Interpreter):
    """Runs a graph and casts what ops of `_ONE_TYPE` read to `dtype` where it is another type, in the graph, too."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.dtype = dtype

    def run_node(self, n: fx.Node) -> Any:
        for given in dict.fromkeys(n.all_input_nodes) if n.target in _ONE_TYPE else ():
            value = self.env[given]
            if value.is_floating_point() and value.dtype != self.dtype:
                with n.graph.inserting_before(n):
                    cast = n.graph.call_function(_TO, (given, self.dtype))
                n.replace_input_with(given, cast)
                self.env[cast] = value.to(self.dtype)
        return super().run_node(n)


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
    return graph if model.dtype == torch.float32 else _in_dtype(graph, model.dtype, model.example)


def _stays_real(node: fx.Node) -> bool:
    """Whether it gives real numbers, of which not all that read it, moved or not, make indices or masks."""
    moves = keeps_grid(node) or node.target is aten.select.int
    return is_real(node) and not (moves and node.users and not any(map(_stays_real, node.users)))


def _in_dtype(graph: fx.GraphModule, dtype: torch.dtype, example: Tensor) -> fx.GraphModule:
    """`graph` with constants and arithmetic in `dtype`, in place; input and output stay float32.

    What a model itself computes in float32, such as a norm, stays so; layers, products and norms read `dtype`. So do
    what reads the input, but for what makes indices or masks of it: numbers of words are more than bf16 can count.
    """
    (given,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        ShapeProp(graph.float()).propagate(example)
    graph.to(dtype)
    with graph.graph.inserting_after(given):
        cast = graph.graph.call_function(_TO, (given, dtype))
    given.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast and _stays_real(user))
    with torch.no_grad():
        _Typed(graph, dtype).run(example)
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(_TO, (output.args[0], torch.float32)),)
    graph.recompile()
    return graph
