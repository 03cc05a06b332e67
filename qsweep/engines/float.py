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
    """PyTorch in floating point, channels last: the baselines, fp32 and bf16, eager or compiled."""

    engine: Literal["float"] = "float"
    compile: bool = True
    """`torch.compile` with freezing; false runs eagerly."""

    def refuses(self, config: Compression) -> str | None:
        if config.quantize is None or config.quantize.method == "cast":
            return None
        return "the float engine has no integer kernels; use `inductor`, `onnxruntime` or `reference`"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.hub.save import save

        save(model, folder)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._torch import runner

        return runner(folder, self, compile=self.compile)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> float:
        return 0.0
