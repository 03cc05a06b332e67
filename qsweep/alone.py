"""A job that must be alone on this host asks for it; the driver of its sweep pauses all others and grants it.

Two files in the job's folder say how far that is, so a later driver knows what an earlier one has granted.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

_ASKED, _GRANTED = "alone.asked", "alone.granted"
_POLL_SECONDS = 0.005


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


def asked(folder: Path) -> bool:
    return (folder / _ASKED).exists()


def granted(folder: Path) -> bool:
    return (folder / _GRANTED).exists()


def grant(folder: Path) -> None:
    (folder / _GRANTED).touch()


def forget(folder: Path) -> None:
    """Before a job begins: nothing is asked, nothing granted."""
    for name in (_ASKED, _GRANTED):
        (folder / name).unlink(missing_ok=True)
