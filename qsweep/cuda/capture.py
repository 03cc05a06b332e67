"""Calls as CUDA graphs: what launches many short kernels is bound by launching them, unless they are replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qsweep.errors import Refused, why
from qsweep.replay import own_stream, recording

_WARM_UP_CALLS = 3
"""Before a capture: what is lazy (workspaces, compilation, cuDNN's choice of algorithms) must have happened."""


def graph_of(call: Callable[[], object], repeat: int = 1) -> torch.cuda.CUDAGraph:
    """`repeat` calls as one graph, not replayed yet; the call must always use the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), own_stream(torch.device("cuda", torch.cuda.current_device())):
        for _ in range(_WARM_UP_CALLS):
            call()
        with recording(graph):
            for _ in range(repeat):
                call()
    return graph


def captured(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """`call` as one graph: takes inputs shaped as `example`, gives a buffer that the next call overwrites.

    Raises Refused for a call that looks at what it has computed, which a graph cannot.
    """
    try:
        return _Captured(call, example)
    except torch.AcceleratorError as error:
        if "captur" not in str(error):  # the device's fault, not the call's
            raise
        raise Refused(f"a call of the model cannot be captured in a CUDA graph: {why(error)}") from None


class _Captured:
    def __init__(self, call: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self._call = call
        """Kept with all that it owns: a graph knows nothing but addresses, and freed weights are overwritten."""
        self._given = example.clone()
        self._graph = graph_of(self._once)

    def _once(self) -> None:
        self._result = self._call(self._given)

    def __call__(self, inputs: Tensor) -> Tensor:
        self._given.copy_(inputs)
        self._graph.replay()
        return self._result
