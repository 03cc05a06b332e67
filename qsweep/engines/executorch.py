from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store
    from qsweep.tasks._parts import Parts


class ExecuTorch(EngineConfig):
    """ExecuTorch with XNNPACK, PyTorch's runtime for phones: one `model.pte` for ARM and x86, of the batch size given.

    Activations are int8 where a layer's result is quantized again; any other linear (the last one, those of attention)
    quantizes each row that it reads anew. What is measured is this machine's speed.
    """

    preload: ClassVar[tuple[str, ...]] = ("qsweep.engines._executorch_warm",)
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    engine: Literal["executorch"] = "executorch"
    device: Literal["cpu"] = "cpu"

    def refuses(self, config: Compression) -> str | None:
        reason = config.quantize and config.quantize.not_integer
        return f"XNNPACK's integer kernels cannot run it: {reason}; use `float`" if reason else None

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.engines._executorch import lower
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        lower(model, folder, self.batch_size)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._executorch import runner

        return runner(folder, self)

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        import json
        import shutil

        from qsweep.engines._executorch import PROGRAM

        shutil.copyfile(artifact / PROGRAM, out / PROGRAM)
        if parts:
            columns = {role: each.rows() for role, each in parts.items()}
            (out / "interface.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._executorch import integer_macs

        return integer_macs(folder)
