"""Workers that their driver had paused when it was killed go on by themselves.

The fork server sees to it: it is their parent, nobody pauses it, and it lives as long as any of them. Once its driver
is gone it looks every second: who measures is left alone to its end, or to the time limit of a trial, then all others
go on. A driver that has taken over since rules them instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from qsweep import alone
from qsweep.executors import server
from qsweep.executors.local import LOCK, holder

DRIVER_LOCK = "driver.lock"
"""In the sweep's folder; its driver holds `flock` on it."""
SECONDS = 1.0
"""Between two looks."""


def driven(sweep: Path) -> bool:
    """Whether the sweep in this folder has a driver now."""
    return alone.held(sweep / DRIVER_LOCK)


def resume(sweep: Path, limit: float) -> None:
    """Let the workers in this folder go on, unless one of them is alone or they have a driver; and those children of
    this process that were paused before they could lock their folder, whom no driver knows. Who is alone without a
    driver for more than `limit` seconds is killed: it would keep this host from all sweeps."""
    workers, without = dict(_workers(sweep)), not driven(sweep)
    measuring = {folder: pid for folder, pid in workers.items() if alone.granted(folder)}
    for folder, pid in measuring.items():
        if without and alone.granted_for(folder) > limit:
            print(
                f"`{folder.relative_to(sweep)}` measured for more than {limit:g} s without a driver: it was ended",
                flush=True,
            )
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    if measuring:
        return
    known = workers.values()
    for pid in known if without else []:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGCONT)
    for pid in set(_children()) - set(known):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _children() -> list[int]:
    this = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{this}/task/{this}/children").read_text().split()]


def _workers(sweep: Path) -> Iterator[tuple[Path, int]]:
    """The folder and the process of each worker that lives."""
    for depth in ("", "*/", "*/*/"):
        for path in sweep.glob(depth + LOCK):
            if (found := holder(path.parent)) is not None:
                yield path.parent, found[0]


def watch(sweep: Path, limit: float) -> None:
    """From the first worker on, look after the workers in this folder. For the fork server, while its driver lives."""
    this, driver = os.getpid(), os.getppid()

    def look(number: int, frame: FrameType | None) -> None:
        if os.getpid() == this and os.getppid() != driver:  # a worker has the handler too, if not the timer
            with suppress(OSError):
                resume(sweep, limit)

    def begin() -> None:
        if os.getpid() == this:
            signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)

    signal.signal(signal.SIGALRM, look)
    os.register_at_fork(after_in_parent=begin)  # not before: a timer must not interrupt the heavy imports


if server.log is not None:
    watch(server.log.parent, server.limit)
