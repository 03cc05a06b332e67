"""Everything that runs one network at one batch size on the same images: the chain of int8 kernels, and floating point
in every way that PyTorch has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import gpu_asked as asked
import torch
from gpu_clock import Bench, Call
from gpu_fused import fused
from gpu_kernels import example_of
from gpu_models import HALVES, build, folded, quantized
from torch import fx, nn

from qsweep.cuda.capture import captured
from qsweep.cuda.chain import Chain
from qsweep.hub.form import QuantizedModel

DTYPES = HALVES | {"fp32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """A baseline that PyTorch's compiler makes."""

    label: str
    dtype: torch.dtype
    tuned: bool
    """By `max-autotune`."""
    seconds: float
    """What is kept free for one that is not in the compiler's cache."""

    @property
    def torchao(self) -> bool:
        return self.label.startswith("torchao")


_PLAIN = Compiled("fp16 compiled", torch.float16, False, 25)
"""fp16 was the quicker half of 13 of 14 captured networks."""
_PLAIN_BF16 = Compiled("bf16 compiled", torch.bfloat16, False, 25)
_TUNED = Compiled("fp16 max-autotune", torch.float16, True, 110)
_TORCHAO = (
    Compiled("torchao int8", torch.bfloat16, True, 60),
    Compiled("torchao fp8", torch.bfloat16, True, 60),
)


def compiled(name: str, batch: int, *, tuned: bool) -> tuple[Compiled, ...]:
    """The compiled baselines of a network, `tuned` ones or the others; torchao quantizes linears alone."""
    if tuned:
        return (_TUNED, *_TORCHAO) if name == "ViT-S" and find_spec("torchao") else (_TUNED,)
    return (_PLAIN, _PLAIN_BF16) if (name, batch) == asked.MAIN else (_PLAIN,)


class Baselines:
    """The networks, each built and quantized once, and calls of them, warm."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._models: dict[str, tuple[nn.Module, QuantizedModel]] = {}

    def model(self, name: str) -> tuple[nn.Module, QuantizedModel]:
        """The float model that baselines run, batch norms folded, and the integer one."""
        if name not in self._models:
            module, side = build(name, self.bench.tiny)
            found = folded(module, 3, side, side)
            self._models[name] = (module if name == "ViT-S" else found.graph), quantized(found)
        return self._models[name]

    def images(self, name: str, batch: int) -> torch.Tensor:
        return example_of(self.model(name)[1].example, min(batch, 2) if self.bench.tiny else batch)

    def chain(self, name: str, batch: int) -> tuple[Chain, torch.Tensor]:
        given = self.images(name, batch).to(self.bench.device)
        chain = Chain(self.model(name)[1], len(given), self.bench.device)
        chain(given)
        return chain, given

    def plain(self, name: str, batch: int, label: str) -> dict[str, Call]:
        """Eager, and the same captured."""
        model, given = self._float(name, batch, DTYPES[label])
        model(given)
        return {f"{label} eager": without_gradient(model, given), f"{label} graph": self.captured(model, given)}

    def fused(self, name: str, batch: int, label: str) -> dict[str, Call]:
        """On cuDNN's fused kernels, where there are any."""
        model, given = self._float(name, batch, DTYPES[label])
        if not isinstance(model, fx.GraphModule) or not self.bench.gpu:
            return {}
        joined = fused(model)
        joined(given)
        return {f"{label} cudnn fused": self.captured(joined, given)}

    def compiled(self, name: str, batch: int, way: Compiled) -> dict[str, Call]:
        model, given = self._float(name, batch, way.dtype)
        if way.torchao:
            _torchao(model, way.label)
        if not self.bench.gpu:  # what it traces is checked, what it compiles is the GPU's
            call = without_gradient(torch.compile(model, backend="eager", dynamic=False), given)
            call()
            return {way.label: call}
        run = torch.compile(model, mode="max-autotune-no-cudagraphs" if way.tuned else None, dynamic=False)
        with _chosen_now() if way.tuned else nullcontext():
            without_gradient(run, given)()
        return {way.label: self.captured(run, given)}

    def captured(self, model: Callable[..., Any], given: torch.Tensor) -> Call:
        """As the integers are run: inputs copied to where the graph wants them, and a replay."""
        if not self.bench.gpu:
            return without_gradient(model, given)
        with torch.no_grad():
            run = captured(model, given)
        return lambda: run(given)

    def _float(self, name: str, batch: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
        model = copy.deepcopy(self.model(name)[0]).to(self.bench.device, dtype)
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        given = self.images(name, batch).to(self.bench.device, dtype)
        return model, given.contiguous(memory_format=torch.channels_last)


def _chosen_now() -> AbstractContextManager[Any]:
    """The compiler chooses kernels anew: what another process chose, it chose beside others. Those it has compiled are
    kept elsewhere."""
    import torch._inductor.config as settings

    return settings.patch(fx_graph_cache=False, autotune_local_cache=False)


def without_gradient(model: Callable[..., Any], given: torch.Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(given)

    return call


def _torchao(model: nn.Module, label: str) -> None:
    """Linears of `model` quantized by torchao, activations at each call, in place."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if label == "torchao int8":
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    else:
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
