"""A quantized model as a chain of kernels for one batch size, on a GPU replayed from one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qsweep.cuda.arithmetic import Tile
from qsweep.cuda.bind import Binding
from qsweep.cuda.plan import plan
from qsweep.cuda.tune import tune
from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel

_WARM_UP_RUNS = 2
"""Before a capture: what is lazy (compiling, workspaces, cuDNN's choices) must have happened."""


class Chain:
    """`model` for batches of `batch_size` on `device`: a CUDA device, or in Triton's interpreter the CPU.

    `tiles`: block shapes by the name of a layer's weight; None: those that are fastest on this GPU, measured once and
    kept on disk, and on the CPU the kernels' own choice. Raises Refused for what int8 does not hold.
    """

    def __init__(
        self,
        model: QuantizedModel,
        batch_size: int,
        device: torch.device | str,
        tiles: Mapping[str, Tile] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.plan = plan(model, batch_size)
        self._binding = Binding(self.plan, self.device)
        (node,) = [node for node in model.graph.graph.nodes if node.op == "placeholder"]
        self._given = torch.zeros(batch_size, *model.example.shape[1:], device=self.device)
        if self._given.dim() == 4:
            self._given = self._given.contiguous(memory_format=torch.channels_last)
        self._binding.floats[node] = self._given
        self._graph: torch.cuda.CUDAGraph | None = None
        for product in self._binding.products:
            product.tile = tiles.get(product.name) if tiles is not None else None
        if self.device.type == "cuda":
            if tiles is None:
                tune(self._binding.products, self.device)
            self._graph = self._captured()

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's output (float32) for `inputs` (batch_size, ...), in a buffer that the next call writes to.

        Where a NaN came to be quantized, all of it is NaN: integers cannot tell which samples it touched. Raises
        Refused for inputs of any other shape.
        """
        if inputs.shape != self._given.shape:
            raise Refused(f"the chain of kernels takes inputs {list(self._given.shape)} (got {list(inputs.shape)})")
        self._given.copy_(inputs)
        self.replay()
        return self._result

    @torch.no_grad()
    def replay(self) -> None:
        """Compute once more what the last inputs give: the kernels alone, without copying inputs."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    @property
    def integer_share(self) -> float:
        """Of the multiply-accumulates of a call, those on integers; products of two activations count too."""
        integer, total = self.plan.macs
        return integer / max(1, total)

    @property
    def kernels(self) -> int:
        """Launches of a call."""
        return len(self._binding.launches)

    def integers(self) -> dict[str, Tensor]:
        """int8 tensors of the last call, by the name of their quantize op; those inside a joined sum do not exist."""
        found = {}
        for node, name in self.plan.same.items():
            value = self._binding.places[name]
            columns = torch.argsort(value.order) if value.order is not None else slice(None)
            found[node.name] = value.logical[:, columns].clone()
        return found

    def _run(self) -> None:
        binding = self._binding
        binding.invalid.zero_()
        for launch in binding.launches:
            launch()
        result = binding.floats[self.plan.result]
        self._result = torch.where(binding.invalid != 0, torch.nan, result)

    def _captured(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device), torch.no_grad():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_RUNS):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
        return graph
