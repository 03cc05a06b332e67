from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.hub.form import QuantizedModel
    from qsweep.spec import Compression
    from qsweep.store import Store
    from qsweep.tasks._parts import Parts


class OneFile(EngineConfig):
    """A runtime for phones: the artifact is what is shipped, one file that takes batches of the size given."""

    file: ClassVar[str]
    """Its name."""
    device: Literal["cpu"] = "cpu"

    def refuses(self, config: Compression) -> str | None:
        reason = config.quantize and config.quantize.not_integer
        return f"XNNPACK's integer kernels cannot run it: {reason}; use `float`" if reason else None

    def lower(self, model: QuantizedModel, folder: Path, store: Store) -> None:
        from qsweep.hub.accumulators import check_accumulators

        check_accumulators(model)
        self._runtime.lower(model, folder / self.file, self.batch_size)

    def load(self, folder: Path) -> Runner:
        run: Runner = self._runtime.runner(folder / self.file, self)
        return run

    def integer_macs(self, folder: Path, runner: Runner, inputs: Tensor) -> int:
        return int(self._runtime.integer_macs(folder / self.file))

    @property
    @abstractmethod
    def _runtime(self) -> Any:
        """The module with its `lower`, `runner` and `integer_macs`, which imports the runtime."""

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        import json
        import shutil

        shutil.copyfile(artifact / self.file, out / self.file)
        if parts:
            columns = {role: each.rows() for role, each in parts.items()}
            (out / "interface.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
