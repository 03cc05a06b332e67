from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines._one_file import OneFile
from qsweep.engines.base import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.store import Store


class ExecuTorch(OneFile):
    """ExecuTorch with XNNPACK, PyTorch's runtime for phones: one `model.pte` for ARM and x86, of the batch size given.

    Activations are int8 where a layer's result is quantized again; any other linear (the last one, those of attention)
    quantizes each row that it reads anew. What is measured is this machine's speed.
    """

    preload: ClassVar[tuple[str, ...]] = ("qsweep.engines._executorch_warm",)
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    file: ClassVar[str] = "model.pte"
    engine: Literal["executorch"] = "executorch"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.engines._executorch import lower
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        lower(model, folder / self.file, self.batch_size)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._executorch import runner

        return runner(folder / self.file, self)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._executorch import integer_macs

        return integer_macs(folder / self.file)
