"""What a sweep has evaluated, so that nothing is measured twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsweep.config import content_hash
from qsweep.records import Record
from qsweep.study.folder import read_result
from qsweep.study.pipeline import Evaluation


class Evaluated:
    """Numbers of records, by what was evaluated for them."""

    def __init__(self, sweep: Path) -> None:
        self._sweep = sweep
        self._configs: dict[str, int] = {}
        self._artifacts: dict[str, int] = {}

    def add(self, record: Record) -> None:
        self._configs.setdefault(record.uid, record.number)
        if record.state == "complete" and record.duplicate_of is None:
            built = read_result(self._sweep / record.folder / "build.json")
            if (artifact := _artifact(built, record.config)) is not None:
                self._artifacts.setdefault(artifact, record.number)

    def config(self, uid: str) -> int | None:
        """Of the config with this identity."""
        return self._configs.get(uid)

    def artifact(self, evaluation: Evaluation) -> int | None:
        """Of another config whose artifact is that of `evaluation`, byte for byte, and is run the same way."""
        artifact = _artifact(evaluation.results.get("build", {}), evaluation.content["config"])
        return None if artifact is None else self._artifacts.get(artifact)


def _artifact(built: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Identity of what runs, by what `build` has found; None where it has found nothing."""
    return content_hash([built["files"], config["target"]]) if built.get("files") else None
