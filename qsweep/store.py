"""Results of stages on disk, found by content: what two trials share is computed once.

A failure is never stored: the folder appears, complete, when its computation has succeeded.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qsweep.config import content_hash


class Store:
    """A folder of results, one folder a key. Safe to share between processes of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(*content: object) -> str:
        """SHA-256 over everything a result depends on: configs' uids, parents' keys, seeds, versions."""
        return content_hash(list(content))

    def folder(self, key: str, compute: Callable[[Path], None]) -> Path:
        """The folder of `key`; if there is none yet, `compute(folder)` fills it first.

        Other processes that ask for the same key wait for it rather than compute it again.
        """
        path = self.root / key[:2] / key
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                unfinished = path.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                compute(unfinished)
                os.replace(unfinished, path)
        return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it when the process dies, however it dies
        yield
