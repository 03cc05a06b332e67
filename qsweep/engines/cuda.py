from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store


class Cuda(EngineConfig):
    """int8 kernels in Triton on an NVIDIA GPU (Ampere or newer), a call captured in one CUDA graph. Whatever is integer
    equals the reference bit for bit; softmax, layer norms and products of two activations run in floating point."""

    preload: ClassVar[tuple[str, ...]] = ("qsweep.cuda.chain",)
    packages: ClassVar[tuple[str, ...]] = ("triton",)
    engine: Literal["cuda"] = "cuda"
    device: Literal["cuda"] = "cuda"
    products: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Type of what products of two activations read (attention); their sums and softmax are float32 all the same. fp16
    is the most exact of 16 bits, bf16 holds more than 65504."""
    float_islands: bool = True
    """What has no integer kernel runs in floating point between those that have; false refuses such a model and names
    the ops."""

    compile_baselines: bool = True
    """fp32, bf16 and fp16 beside it run by `torch.compile` (`max-autotune`), which takes minutes and is what a speedup
    is to be held against; false runs them eagerly, captured as well."""

    def available(self) -> str | None:
        from qsweep.cuda.device import refusal

        return refusal(self.device)

    def refuses(self, config: Compression) -> str | None:
        reason = "no stage quantizes" if config.quantize is None else config.quantize.not_integer
        return reason and f"int8 kernels cannot run it: {reason}; `float` runs it on the GPU in floating point"

    def stand_in(self) -> dict[str, Any]:
        return super().stand_in() | {"compile": self.compile_baselines}

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.cuda.numbers import check_scales
        from qsweep.cuda.plan import plan
        from qsweep.errors import Refused
        from qsweep.hub.accumulators import check_accumulators
        from qsweep.hub.save import save

        check_accumulators(model)
        check_scales(model.graph)
        islands = plan(model, self.batch_size).islands  # what it cannot take it refuses here, not on the GPU
        if islands and not self.float_islands:
            raise Refused(f"`float_islands: false`: no integer kernel computes {', '.join(islands)}")
        save(model, folder)

    def load(self, folder: Path) -> Runner:
        from qsweep.errors import Refused

        if (reason := self.available()) is not None:
            raise Refused(f"the `cuda` engine does not work on this machine: {reason}")
        import torch

        from qsweep.cuda.chain import Chain
        from qsweep.hub.save import load

        products = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.products]
        return Chain(load(folder), self.batch_size, self.device, products=products)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.cuda.chain import Chain

        assert isinstance(runner, Chain)
        return runner.plan.macs[0]
