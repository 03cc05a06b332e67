from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store


class Float(EngineConfig):
    """PyTorch in floating point, channels last, eager or compiled, on a CPU or a CUDA device: the baselines fp32, bf16
    and fp16, and models of which only the weights are quantized."""

    engine: Literal["float"] = "float"
    compile: bool = True
    """`torch.compile`, with freezing on a CPU and as `max-autotune` on a GPU; false runs eagerly."""

    capture: bool = True
    """On a GPU: the kernels of a call are captured once in a CUDA graph and replayed; false launches each anew."""

    simulate: bool = False
    """Take what needs integer kernels too and compute it in floating point: its accuracy and size, not its speed. Such
    records are marked as simulated wherever they are shown."""

    def available(self) -> str | None:
        from qsweep.machine import no_compiler, no_kernels

        reason = super().available()
        if reason is not None or not self.compile:
            return reason
        lacking = no_compiler() if self.device == "cpu" else no_kernels()
        return lacking and f"{lacking}; `compile: false` needs none"

    def refuses(self, config: Compression) -> str | None:
        if config.quantize is None or config.quantize.in_float or self.simulate:
            return None
        return (
            "the float engine has no integer kernels; use `inductor`, `onnxruntime` or `reference`, or `simulate: true`"
        )

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.hub.save import save

        save(model, folder)

    def load(self, folder: Path) -> Runner:
        if self.device == "cuda":
            from qsweep.engines._torch_cuda import gpu_runner

            return gpu_runner(folder, self, compile=self.compile, capture=self.capture)
        from qsweep.engines._torch import runner

        return runner(folder, self, compile=self.compile, integers=False)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        return 0
