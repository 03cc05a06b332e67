"""Hub graphs in PyTorch: eager, or compiled by Inductor with frozen weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qsweep.errors import Refused
from qsweep.hub.form import DEQUANTIZE, QUANTIZE, aten
from qsweep.hub.save import load
from qsweep.hub.simulate import in_dtype

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner


def runner(folder: Path, engine: EngineConfig, *, compile: bool) -> Runner:
    """The artifact in PyTorch, called once so that everything lazy has happened."""
    torch.set_num_threads(engine.threads)
    model = load(folder)
    graph = in_dtype(unsigned(model.graph), model.dtype)
    example = torch.zeros(engine.batch_size, *model.example.shape[1:])
    call: Any = _compiled(graph, example) if compile else _eager(graph)

    def run(inputs: Tensor) -> Tensor:
        with torch.no_grad():
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
    compiled = torch.compile(graph, dynamic=False)
    with inductor.patch(freezing=True), torch.no_grad():  # not inference_mode: weight prepacking fails in it
        compiled(_channels_last(example))
    return compiled


def unsigned(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with uint8 activations from 0, which oneDNN's kernels take; in place and exact.

    A grid narrower than 8 bits gets its upper end from a clamp of the integers: Inductor's patterns know the full range
    of uint8 only. (Not a two-sided clamp: one on the output of a convolution is mistaken for its activation function.)
    """
    for node in list(graph.graph.nodes):
        if node.target in (QUANTIZE, DEQUANTIZE):
            value, scale, zero_point, low, high, _ = node.args
            node.args = (value, scale, zero_point - low, 0, 255, torch.uint8)
            if node.target is QUANTIZE and high - low < 255:
                with graph.graph.inserting_after(node):
                    bounded = graph.graph.call_function(aten.clamp_max.default, (node, high - low))
                node.replace_all_uses_with(bounded, delete_user_cb=lambda user, keep=bounded: user is not keep)
    graph.recompile()
    return graph


def integer_macs(folder: Path, run: Runner, inputs: Tensor) -> float:
    """Share of integer kernels, from the calls that PyTorch's profiler shows for one batch.

    Calls and the layers of the graph come in the same order, so each call's multiply-accumulates are its layer's.
    """
    layers = load(folder).layers()
    with torch.profiler.profile() as profile:
        run(inputs)
    calls = [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]
    kernels = [name for name in calls if name in _INTEGER | _FLOAT]
    if len(kernels) != len(layers):
        raise Refused(f"the profile shows {len(kernels)} matrix kernels for {len(layers)} layers")
    integer = sum(layer.macs for layer, name in zip(layers, kernels, strict=True) if name in _INTEGER)
    return integer / max(1, sum(layer.macs for layer in layers))


_INTEGER = {"onednn::qconv_pointwise", "onednn::qconv2d_pointwise", "onednn::qlinear_pointwise"}
_FLOAT = {
    "aten::convolution",
    "aten::addmm",
    "aten::mm",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
}
