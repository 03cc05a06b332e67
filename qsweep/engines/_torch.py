"""Hub graphs in PyTorch: eager, or compiled by Inductor with frozen weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from qsweep.engines._silent import silent
from qsweep.engines._torch_graph import for_patterns, multiplies_channels, with_grid_input
from qsweep.errors import Refused, why
from qsweep.hub.fixed import with_constants
from qsweep.hub.kinds import DEQUANTIZE, TRANSPOSED
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.ops import QUANTIZE_ROWS
from qsweep.hub.save import load
from qsweep.hub.simulate import simulation

if TYPE_CHECKING:
    from qsweep.engines.base import EngineConfig, Runner


def runner(folder: Path, engine: EngineConfig, *, compile: bool, integers: bool) -> Runner:
    """The artifact in PyTorch, on integer kernels or in floating point, called once: all that is lazy has happened."""
    torch.set_num_threads(engine.threads)
    model = load(folder)
    graph = with_constants(for_patterns(model) if integers else simulation(model))
    example = torch.zeros(engine.batch_size, *model.example.shape[1:])
    call: Any = None

    def run(inputs: Tensor) -> Tensor:
        if compile and inputs.shape != example.shape:  # it would be compiled again, for seconds, without a word
            raise Refused(f"the compiled model takes inputs {list(example.shape)} (got {list(inputs.shape)})")
        with torch.no_grad():
            return cast(Tensor, call(channels_last_input(inputs)))

    try:
        call = compiled(graph, channels_last_input(example)) if compile else channels_last_weights(graph)
        run(example)
    except MemoryError:
        raise
    except Exception as error:  # the compiler raises dozens of types; all mean that it cannot take the model
        raise Refused(f"Inductor cannot compile the model: {why(error)}") from error
    return run


_OWN_WARNINGS = (
    ("To copy construct from a tensor", r"torch\._inductor\.mkldnn_lowerings"),
    ("`torch.jit.script", r"torch\.jit\._script"),
)
"""What PyTorch's compiler says about its own code."""


def channels_last_input(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def channels_last_weights(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` with images' weights channels last, in place."""
    for _, value in [*graph.named_parameters(), *graph.named_buffers()]:
        if value.dim() == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)
    return graph


def compiled(graph: fx.GraphModule, *examples: Tensor) -> Any:
    """`graph` compiled by Inductor with frozen weights, for inputs like `examples`; in place.

    Straight to Inductor: `torch.compile` would first trace with Dynamo what is a graph already, for 0.7 s of 2.1 s.
    """
    import torch._inductor as inductor

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    with inductor.config.patch(freezing=True), torch.no_grad(), warnings.catch_warnings():
        # not inference_mode: weight prepacking fails in it
        for text, module in _OWN_WARNINGS:
            warnings.filterwarnings("ignore", text, module=module)
        grids = with_grid_input(graph)
        with _whole_products(), _sound_folding(graph):
            call = inductor.compile(graph, [grids, *examples])
    return partial(call, grids)


@contextmanager
def _whole_products() -> Iterator[None]:
    """Without Inductor's products of one row, or of few numbers, as sums of its own: these are no integer kernels."""
    from torch._inductor import decomposition

    ops: Any = torch.ops.aten
    kept = {op: decomposition.decompositions.pop(op) for op in (ops.mm.default, ops.addmm.default)}
    decomposition.fast_random_decomps.cache_clear()
    try:
        yield
    finally:
        decomposition.decompositions.update(kept)
        decomposition.fast_random_decomps.cache_clear()


@contextmanager
def _sound_folding(graph: fx.GraphModule) -> Iterator[None]:
    """Without Inductor's factors folded into the weights of layers, where some are of transposed convolutions: it takes
    their input channels for their outputs, and says nothing."""
    from torch._inductor.fx_passes import freezing_patterns
    from torch._inductor.pattern_matcher import PatternMatcherPass

    freezing_patterns.lazy_init()  # else a process's first compilation puts its patterns into what stands in here
    kept = freezing_patterns.binary_folding_pass
    if nodes_of(graph, TRANSPOSED):
        freezing_patterns.binary_folding_pass = PatternMatcherPass()
    try:
        yield
    finally:
        freezing_patterns.binary_folding_pass = kept


def integer_macs(folder: Path, run: Runner, inputs: Tensor) -> int:
    """Those of integer kernels, from the calls that PyTorch's profiler shows for one batch.

    Where not all quantized layers have become integer kernels: calls and the layers of the graph come in the same
    order, so that each call's multiply-accumulates are its layer's. Norms are multiplied in floating point.
    """
    model = load(folder)
    layers = [layer for layer in model.layers() if not multiplies_channels(model.graph, layer.node)]
    kernels = [name for name in _calls(run, inputs) if name in _INTEGER | _FLOAT]
    found = [layer for layer in layers if source(layer.node).target in (DEQUANTIZE, QUANTIZE_ROWS)]
    if sum(name in _INTEGER for name in kernels) != len(found):
        if len(kernels) != len(layers):
            raise Refused(f"the profile shows {len(kernels)} matrix kernels for {len(layers)} layers")
        found = [layer for layer, name in zip(layers, kernels, strict=True) if name in _INTEGER]
    return len(inputs) * sum(layer.macs for layer in found)


def _calls(run: Runner, inputs: Tensor) -> list[str]:
    """Names of the ops of one call, in order."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with silent():
        profile.start()
    try:
        run(inputs)
    finally:
        with silent():
            profile.stop()
    events: Any = profile.profiler and profile.profiler.function_events
    return [event.name for event in sorted(events or [], key=lambda event: event.time_range.start)]


_INTEGER = {"onednn::qconv_pointwise", "onednn::qconv2d_pointwise", "onednn::qlinear_pointwise", "aten::_int_mm"}
_FLOAT = {
    "aten::convolution",
    "aten::addmm",
    "aten::mm",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
}
