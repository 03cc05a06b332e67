"""A job that must be alone on this host asks for it; the driver of its sweep pauses all others and grants it.

Two files in the job's folder say how far that is, so a later driver knows what an earlier one has granted. While it is
alone a job has a lock, of which there is one for all sweeps of a user on this host: their drivers pause for it, too.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from qsweep.machine import cache_folder

_ASKED, _GRANTED = "alone.asked", "alone.granted"
_POLL_SECONDS = 0.005
_kept: list[IO[str]] = []
"""The host's lock, while this process has it: to its end."""


def ask(folder: Path) -> None:
    """Return when the job of `folder` is alone; until its process ends it stays so. Without a driver it is at once.

    Ends the process where the driver is gone: the next one starts the job again.
    """
    driver = multiprocessing.parent_process()
    if driver is None:
        return
    (folder / _ASKED).touch()
    while not granted(folder):
        if not driver.is_alive():
            raise SystemExit(f"the driver ended before `{folder.name}` could have the machine for itself")
        time.sleep(_POLL_SECONDS)
    if not _kept:
        with suppress(OSError):  # no place for a lock: alone among the jobs of its sweep
            _lock().parent.mkdir(parents=True, exist_ok=True)
            lock = _lock().open("a", encoding="utf-8", errors="replace")
            fcntl.flock(lock, fcntl.LOCK_EX)
            _kept.append(lock)
            lock.truncate(0)
            print(f"`{folder.resolve()}` (process {os.getpid()})", end="", file=lock, flush=True)


def elsewhere() -> str | None:
    """The job of another sweep that is alone on this host, asked where none of this sweep is: its folder and process.
    None: there is none."""
    try:
        return (_lock().read_text(encoding="utf-8", errors="replace") or "another sweep") if held(_lock()) else None
    except OSError:
        return None


def held(path: Path) -> bool:
    """Whether a process holds `flock` on this file."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock() -> Path:
    """A home may be that of many hosts."""
    return cache_folder() / f"alone-{platform.node()}.lock"


def asked(folder: Path) -> bool:
    return (folder / _ASKED).exists()


def granted(folder: Path) -> bool:
    return (folder / _GRANTED).exists()


def granted_for(folder: Path) -> float:
    """Since how many seconds the job of `folder` is alone; 0 where it is not."""
    try:
        return time.time() - (folder / _GRANTED).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def grant(folder: Path) -> None:
    (folder / _GRANTED).touch()


def forget(folder: Path) -> None:
    """Before a job begins: nothing is asked, nothing granted."""
    for name in (_ASKED, _GRANTED):
        (folder / name).unlink(missing_ok=True)
