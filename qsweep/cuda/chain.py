"""A quantized model as a chain of kernels for one batch size, on a GPU replayed from one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qsweep.cuda.arithmetic import Tile
from qsweep.cuda.bind import Binding
from qsweep.cuda.capture import captured
from qsweep.cuda.plan import plan
from qsweep.cuda.rooms import Forget
from qsweep.cuda.tune import tune
from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel

_REDUCED = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_PRODUCTS = {"cuda": torch.float16, "cpu": torch.float32}


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Products of 16-bit numbers whose sums are float32 to their end: cuBLAS may add parts of them in 16 bits."""
    matmul = torch.backends.cuda.matmul
    kept = {name: getattr(matmul, name) for name in _REDUCED}
    try:
        for name in _REDUCED:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in kept.items():
            setattr(matmul, name, value)


class Chain:
    """`model` for batches of `batch_size` on `device`: a CUDA device, or in Triton's interpreter the CPU.

    `tiles`: block shapes by the name of a layer's weight; None: those that are fastest on this GPU, measured once and
    kept on disk, and on the CPU the kernels' own choice. `products`: the type of what products of two activations read,
    as attention has them; None: float16 on a GPU, float32 on the CPU. `keep`: no two values share memory, so that
    `integers` can show them. Raises Refused for what int8 does not hold, and for ops that a CUDA graph does not.
    """

    def __init__(
        self,
        model: QuantizedModel,
        batch_size: int,
        device: torch.device | str,
        tiles: Mapping[str, Tile] | None = None,
        products: torch.dtype | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.plan = plan(model, batch_size)
        self._binding = Binding(self.plan, self.device, products or _PRODUCTS[self.device.type], keep)
        (self._input,) = [node for node in model.graph.graph.nodes if node.op == "placeholder"]
        self._shape = torch.Size([batch_size, *model.example.shape[1:]])
        for product in self._binding.products:
            product.tile = (tiles or {}).get(product.name)
        self._call: Callable[[Tensor], Tensor] = self._run
        if self.device.type == "cuda":
            gc.collect()  # a chain is a circle: one that nothing needs any more would keep its memory
            with torch.cuda.device(self.device), torch.no_grad():
                if tiles is None:
                    tune(self._binding.products, self.device)
                with _sums_in_float32():
                    self._call = captured(self._run, torch.zeros(self._shape, device=self.device))

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's output (float32) for `inputs` (batch_size, ...), in a buffer that the next call may write to.

        Where a NaN came to be quantized, all of it is NaN: integers cannot tell which samples it touched. Raises
        Refused for inputs of any other shape.
        """
        if inputs.shape != self._shape:
            raise Refused(f"the chain of kernels takes inputs {list(self._shape)} (got {list(inputs.shape)})")
        return self._call(inputs)

    @property
    def integer_share(self) -> float:
        """Of the multiply-accumulates of a call, those on integers; products of two activations count too."""
        integer, total = self.plan.macs
        return integer / max(1, total)

    @property
    def kernels(self) -> int:
        """Launches of a call."""
        return sum(not isinstance(launch, Forget) for launch in self._binding.launches)

    @property
    def bytes(self) -> int:
        """Of the values between its kernels; those that PyTorch computes come on top."""
        return self._binding.rooms.bytes

    def integers(self) -> dict[str, Tensor]:
        """int8 tensors of the last call of a chain that keeps them, by the name of their quantize op; those inside a
        joined sum do not exist."""
        assert self._binding.keep
        found = {}
        for node, name in self.plan.same.items():
            value = self._binding.places[name]
            columns = torch.argsort(value.order) if value.order is not None else slice(None)
            found[node.name] = value.logical[:, columns].clone()
        return found

    def _run(self, inputs: Tensor) -> Tensor:
        binding = self._binding
        binding.floats[self._input] = inputs
        binding.invalid.zero_()
        for launch in binding.launches:
            launch()
        return torch.where(binding.invalid != 0, torch.nan, binding.floats[self.plan.result])
