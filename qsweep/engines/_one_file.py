from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.engines.base import EngineConfig

if TYPE_CHECKING:
    from qsweep.spec import Compression
    from qsweep.tasks._parts import Parts


class OneFile(EngineConfig):
    """A runtime for phones: the artifact is what is shipped, one file that takes batches of the size given."""

    file: ClassVar[str]
    """Its name."""
    device: Literal["cpu"] = "cpu"

    def refuses(self, config: Compression) -> str | None:
        reason = config.quantize and config.quantize.not_integer
        return f"XNNPACK's integer kernels cannot run it: {reason}; use `float`" if reason else None

    def export(self, artifact: Path, out: Path, parts: Mapping[str, Parts] | None = None) -> None:
        import json
        import shutil

        shutil.copyfile(artifact / self.file, out / self.file)
        if parts:
            columns = {role: each.rows() for role, each in parts.items()}
            (out / "interface.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
