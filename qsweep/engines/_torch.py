"""Hub graphs in PyTorch: eager, or compiled by Inductor with frozen weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qsweep.errors import Refused
from qsweep.hub.form import DEQUANTIZE, QUANTIZE, QuantizedModel, aten, quantized
from qsweep.hub.save import load
from qsweep.hub.simulate import in_dtype

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner

_SHIFT = 128
"""int8 to uint8: oneDNN's kernels take uint8 activations; exact, since scale and levels stay."""


def runner(folder: Path, engine: EngineConfig, *, compile: bool) -> Runner:
    """The artifact in PyTorch, called once so that everything lazy has happened."""
    torch.set_num_threads(engine.threads)
    model = load(folder)
    graph = in_dtype(unsigned(model.graph), model.dtype)
    example = torch.zeros(engine.batch_size, *model.example.shape[1:])
    call: Any = _compiled(graph, example) if compile else _eager(graph)

    def run(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return call(_channels_last(inputs))  # type: ignore[no-any-return]

    try:
        run(example)
    except Exception as error:  # the compiler raises dozens of types; all mean that it cannot take the model
        raise Refused(f"`torch.compile` cannot run the model: {str(error).splitlines()[0][:300]}") from error
    return run


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def _eager(graph: fx.GraphModule) -> fx.GraphModule:
    for _, value in [*graph.named_parameters(), *graph.named_buffers()]:
        if value.dim() == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return graph


def _compiled(graph: fx.GraphModule, example: Tensor) -> Any:
    import torch._inductor.config as inductor

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    with inductor.patch(freezing=True, fx_graph_cache=True), torch.inference_mode():
        compiled = torch.compile(graph, dynamic=False, options={"freezing": True})
        compiled(_channels_last(example))
    return compiled


def unsigned(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with uint8 activations, in place; a grid narrower than 8 bits becomes a clamp of the integers.

    Inductor's patterns take the full range of uint8 only, and some decompositions forget narrower bounds.
    """
    for node in list(graph.graph.nodes):
        if node.target in (QUANTIZE, DEQUANTIZE):
            value, scale, zero_point, low, high, _ = node.args
            node.args = (value, scale, zero_point + _SHIFT, 0, 255, torch.uint8)
            if node.target is QUANTIZE and (low, high) != (-_SHIFT, _SHIFT - 1):
                with graph.graph.inserting_after(node):
                    bounded = graph.graph.call_function(aten.clamp.default, (node, low + _SHIFT, high + _SHIFT))
                node.replace_all_uses_with(bounded, delete_user_cb=lambda user, keep=bounded: user is not keep)
    graph.recompile()
    return graph


def integer_macs(folder: Path, run: Runner, inputs: Tensor) -> float:
    """1 less the share of multiply-accumulates that PyTorch's profiler shows in floating-point kernels for one call.

    Integer kernels show no shapes of their packed weights; so the float ones are counted, and the number of integer
    calls must make up for the layers that are left.
    """
    layers = load(folder).layers()
    total = sum(layer.macs for layer in layers) * len(inputs)
    with torch.profiler.profile(record_shapes=True) as profile:
        run(inputs)
    integer, floating = 0, 0
    for event in profile.events():
        if event.name in _INTEGER:
            integer += 1
        elif event.name in _FLOAT:
            floating += _macs(event.name, event.input_shapes)
    return 1 - min(1.0, floating / total) if integer else 0.0


_INTEGER = {
    "onednn::qconv_pointwise",
    "onednn::qconv2d_pointwise",
    "onednn::qlinear_pointwise",
}
_FLOAT = {
    "aten::convolution",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
}
