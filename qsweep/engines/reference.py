from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store


class Reference(EngineConfig):
    """The integer contract, computed exactly and slowly: the oracle every other engine is held against."""

    engine: Literal["reference"] = "reference"
    device: Literal["cpu"] = "cpu"

    def refuses(self, config: Compression) -> str | None:
        reason = "no stage quantizes" if config.quantize is None else config.quantize.not_integer
        if reason is None:
            return None
        return f"the reference computes in integers: {reason}; give `quantize` integer grids, or use `float`"

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.hub.accumulators import check_accumulators
        from qsweep.hub.save import save

        check_accumulators(model)
        save(model, folder)

    def load(self, folder: Path) -> Runner:
        from qsweep.hub.integer import IntegerInterpreter
        from qsweep.hub.save import load

        return IntegerInterpreter(load(folder).graph)

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        from qsweep.hub.integer import IntegerInterpreter

        assert isinstance(runner, IntegerInterpreter)
        runner(inputs)
        return runner.integer_macs
