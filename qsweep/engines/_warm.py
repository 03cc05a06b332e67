"""Imported by the fork server: compiles one tiny integer network, so that no worker pays for the compiler's first time.

Inductor imports modules and builds its patterns when it first compiles: 3 s of the 5 s of a first ResNet-20, in every
fresh process. Here it happens once; the workers are forked after it. On one thread: threads do not survive a fork.
"""

from __future__ import annotations

import torch
import torch._inductor.config as inductor
from torch import fx, nn

from qsweep.engines import _isa
from qsweep.engines._forkable import forkable
from qsweep.engines._torch import compiled
from qsweep.engines._torch_graph import unsigned
from qsweep.hub.kinds import DEQUANTIZE, QUANTIZE, aten
from qsweep.hub.nodes import set_constant
from qsweep.hub.ops import DEQUANTIZE_WEIGHT


def _network() -> fx.GraphModule:
    """Quantize, a convolution of 4 channels, ReLU, quantize, dequantize."""
    root, graph = nn.Module(), fx.Graph()
    set_constant(root, "weight", torch.ones(4, 4, 3, 3, dtype=torch.int8))
    set_constant(root, "scale", torch.ones(4))
    set_constant(root, "zero_point", torch.zeros(4, dtype=torch.int64))
    set_constant(root, "bias", torch.zeros(4))

    def on_grid(value: fx.Node) -> fx.Node:
        grid = (1.0, 0, -128, 127, torch.int8)
        return graph.call_function(DEQUANTIZE, (graph.call_function(QUANTIZE, (value, *grid)), *grid))

    given = on_grid(graph.placeholder("x"))
    parts = [graph.get_attr(name) for name in ("weight", "scale", "zero_point")]
    weight = graph.call_function(DEQUANTIZE_WEIGHT, (*parts, 0, -127, 127, torch.int8))
    convolved = graph.call_function(aten.conv2d.default, (given, weight, graph.get_attr("bias"), [1, 1], [1, 1]))
    graph.output(on_grid(graph.call_function(aten.relu.default, (convolved,))))
    return unsigned(fx.GraphModule(root, graph))


def _warm_up() -> None:
    _isa.checks.join()
    # With a GPU the compiler asks for its properties, and no fork could use it afterwards. To ask CUDA itself whether
    # there is one would do the same: NVML is asked, which does not always know (-1).
    if torch.version.cuda is not None and torch.cuda._device_count_nvml() != 0:
        return
    with forkable(), inductor.patch(compile_threads=1):
        compiled(_network(), torch.zeros(2, 4, 8, 8))


_warm_up()
