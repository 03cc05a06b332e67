from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store


class Inductor(EngineConfig):
    """`torch.compile` with freezing: oneDNN int8 kernels (VNNI, AMX) on x86 CPUs."""

    preload: ClassVar[tuple[str, ...]] = (
        "qsweep.engines._isa",
        "torch._inductor.compile_fx",
        "sympy.physics.units",
        "qsweep.engines._warm",
    )
    engine: Literal["inductor"] = "inductor"
    device: Literal["cpu"] = "cpu"

    def available(self) -> str | None:
        from qsweep.machine import no_compiler

        return no_compiler()

    def refuses(self, config: Compression) -> str | None:
        reason = "no stage quantizes" if config.quantize is None else config.quantize.not_integer
        return reason and f"integer kernels cannot run it: {reason}; `float` is the same compiler in floating point"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.hub.accumulators import check_accumulators
        from qsweep.hub.save import save

        check_accumulators(model)
        save(model, folder)

    def load(self, folder: Path) -> Runner:
        from qsweep.engines._torch import runner

        return runner(folder, self, compile=True, integers=True)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.engines._torch import integer_macs

        return integer_macs(folder, runner, inputs)
