"""Training steps as one CUDA graph: issuing the kernels of a small step one by one takes longer than running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""`step(inputs, labels)`: the loss, detached; everything else that it does happens on the device."""

_ISSUED = 3
"""Steps before one is recorded: what is lazy (momentum, workspaces, compiled kernels) is made in them."""


class Recorded:
    """A step that is recorded once and then replayed, for batches of `size` samples; smaller ones are issued.

    The last of the first steps is watched: one that looks at values on the CPU, which no graph can, is never recorded,
    nor is one for which memory is short.
    What the step does on the CPU alone happens in those steps and while it is recorded, not again. `renew` is called
    before each replay. The loss that is returned is overwritten by the next step. All calls must be on one stream, and
    not the default one.
    """

    def __init__(self, step: Step, size: int, renew: Callable[[], None]) -> None:
        self._step, self._size, self._renew = step, size, renew
        self._issued = 0
        self._records = True
        self._replay: Step | None = None

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if not self._records or len(inputs) != self._size:
            return self._step(inputs, labels)
        if self._issued < _ISSUED:
            self._issued += 1
            return self._step(inputs, labels) if self._issued < _ISSUED else self._watched(inputs, labels)
        if self._replay is None:
            self._replay = self._recorded(inputs, labels)
        return self._replay(inputs, labels)

    def _watched(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with looks() as found:
            value = self._step(inputs, labels)
        self._records = not found
        return value

    def _recorded(self, inputs: Tensor, labels: Tensor) -> Step:
        """The step as a graph, or as it is where that cannot be had; nothing has run."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        given, graph = (inputs.clone(), labels.clone()), torch.cuda.CUDAGraph()
        try:
            with recording(graph):
                value = self._step(*given)
        except Exception:  # an op that cannot be recorded, or no memory: a step that fails all the same says so itself
            self._records = False
        else:  # what a graph has is its own: a smaller batch, issued, needs as much again at the most
            self._records = torch.cuda.mem_get_info()[0] >= torch.cuda.memory_reserved() - before
        if not self._records:
            del graph
            torch.cuda.empty_cache()
            return self._step

        renew = self._renew  # not `self`, which holds this: a circle would keep the graph's memory for a while

        def replay(inputs: Tensor, labels: Tensor) -> Tensor:
            given[0].copy_(inputs)
            given[1].copy_(labels)
            renew()
            graph.replay()
            return value

        return replay


@contextmanager
def looks() -> Iterator[list[str]]:
    """Fills with a line for each time that the CPU waits for the device to look at values, as far as PyTorch tells."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for one in caught:
        if "called a synchronizing" in str(one.message):
            found.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """What is issued within is recorded in `graph`, on the current stream, which must not be the default one.

    What cuBLAS works in belongs to this graph alone. PyTorch keeps one such workspace for each stream: without this a
    graph would write where another one, which may be gone by then, or tensors of today have their place.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream beside the default one, which cannot be recorded; on a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(stream)
