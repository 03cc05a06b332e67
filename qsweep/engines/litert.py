from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines._one_file import OneFile
from qsweep.engines.base import Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.store import Store


class LiteRT(OneFile):
    """LiteRT (TensorFlow Lite), the runtime of Android, with XNNPACK: one `model.tflite` of the batch size given.

    Activations are int8 where a layer's result is quantized again; any other linear (the last one, those of attention)
    quantizes each row that it reads anew. What is measured is this machine's speed.
    """

    packages: ClassVar[tuple[str, ...]] = ("ai-edge-litert",)
    file: ClassVar[str] = "model.tflite"
    engine: Literal["litert"] = "litert"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.engines._litert import lower
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        lower(model, folder / self.file, self.batch_size)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._litert import runner

        return runner(folder / self.file, self)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._litert import integer_macs

        return integer_macs(folder / self.file)
