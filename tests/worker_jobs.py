"""Jobs that end in all the ways a process can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path


def good(folder: Path) -> None:
    print("said to stdout")
    (folder / "good.json").write_text("{}")


def environment(folder: Path) -> None:
    (folder / "environment.json").write_text(json.dumps(dict(os.environ)))


def raises(folder: Path) -> None:
    raise RuntimeError("as told")


def dies(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forgets(folder: Path) -> None:
    """Leave no result."""


def parent(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    _write(folder / "child.pid", str(child.pid))
    child.wait()


def holds(folder: Path) -> None:
    import multiprocessing

    semaphore = multiprocessing.Semaphore()
    _write(folder / "held", str(semaphore))
    time.sleep(600)


def counts(folder: Path) -> None:
    with (folder / "count").open("w") as file:
        for _ in range(100_000):
            file.write("x")
            file.flush()
            time.sleep(0.002)


def waits(folder: Path) -> None:
    runs = folder / "runs"
    runs.write_text(str(int(runs.read_text()) + 1 if runs.exists() else 1))
    while not (folder / "go").exists():
        time.sleep(0.01)
    (folder / "waits.json").write_text("{}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
