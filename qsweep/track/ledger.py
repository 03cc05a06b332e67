"""`published.json`: which run of MLflow holds which record, and with what content."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from qsweep.config import content_hash
from qsweep.records import Record
from qsweep.study.folder import write_atomically
from qsweep.track.client import portable


class Ledger:
    """Lies in the sweep's folder. What a kill keeps from it is found again in MLflow by the tag `qsweep.sweep_id`."""

    def __init__(self, path: Path, uri: str) -> None:
        """What `path` holds about `uri`: nothing where there is none, it is damaged, or nothing was published there."""
        self.path, self.uri = path, portable(uri, path.parents[2])
        found = self.read(path)
        self.sweep_id = str(found.get("sweep_id") or uuid.uuid4().hex)
        """The sweep's, wherever it is published."""
        self.stores: dict[str, dict[str, Any]] = found.get("stores", {})
        self.content = self.stores.get(self.uri) or self._nothing()

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """What the file holds: `sweep_id`; `stores`, what is known of each URI; `uri`, the last one of them. Nothing
        where it is missing or damaged."""
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    @staticmethod
    def _nothing() -> dict[str, Any]:
        return {"parent": None, "steps": 0, "members": [], "runs": {}}

    def reset(self) -> None:
        """Forget all runs at this URI."""
        self.content = self._nothing()

    def save(self, *, durable: bool = False) -> None:
        """Replace the file in one step."""
        self.stores[self.uri] = self.content
        content = {"sweep_id": self.sweep_id, "uri": self.uri, "stores": self.stores}
        write_atomically(self.path, json.dumps(content), durable)

    @property
    def order(self) -> list[int]:
        """Numbers of the published records, in the order they were published."""
        return [int(number) for number in self.content["runs"]]

    @property
    def members(self) -> set[int]:
        """Numbers of the records that were on the front when the last one was summarized, or before."""
        return set(self.content["members"])

    def entry(self, number: int) -> dict[str, Any]:
        """What is known of a record's run: `run_id`, `content` (hash of the record and its name there), `bundle`; empty
        if nothing."""
        return dict(self.content["runs"].get(str(number), {}))

    def places(self, number: int) -> list[str]:
        """The URIs at which a record is published, wherever that is."""
        return [uri for uri, content in self.stores.items() if str(number) in content["runs"]]

    def note(self, record: Record, run_id: str, name: str) -> None:
        """Remember that `run_id`, called `name`, holds `record` as it is now."""
        entry = self.entry(record.number) | {"run_id": run_id, "content": _digest(record, name)}
        self.content["runs"][str(record.number)] = entry
        self.save()

    def note_bundle(self, number: int) -> None:
        """Remember that the run of `number` has its bundle."""
        self.content["runs"][str(number)]["bundle"] = True
        self.save()

    def has(self, record: Record, name: str) -> bool:
        """Whether the record was published as it is now, under this name."""
        return self.entry(record.number).get("content") == _digest(record, name)


def _digest(record: Record, name: str) -> str:
    """Hash of everything in a record, and of the name of its run."""
    return content_hash([record.model_dump(mode="json"), name])
