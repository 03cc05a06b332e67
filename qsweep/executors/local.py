"""Workers as processes of this machine: start, poll, pause, kill, adopt.

A worker is forked from a server that has the heavy modules imported already (0.02 s instead of 5), so it is fresh and
starts at once. It is a session of its own: signals of the terminal do not reach it, and its children die with it.
While it lives it holds `flock` on `worker.lock` in its folder: that is how a later driver finds it again.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import math
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Literal

from qsweep.alone import held
from qsweep.errors import SweepError
from qsweep.executors import server

LOCK = "worker.lock"
End = Literal["done", "crashed"]


class Worker:
    """A process that runs one job in one folder, started by this driver or found alive."""

    def __init__(self, folder: Path, name: str, pid: int, process: ForkServerProcess | None = None) -> None:
        self.folder, self.name, self.pid, self.process = folder, name, pid, process

    def poll(self) -> End | None:
        """None while it lives; then `done` if it left its result, else `crashed`."""
        if self._alive():
            return None
        if (self.folder / f"{self.name}.json").exists():
            return "done"
        self._signal(signal.SIGKILL)  # what it had started
        return "crashed"

    def kill(self) -> None:
        """End it and its children now, paused or not, and wait until it is gone."""
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.002)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def last_words(self) -> str:
        """How it ended and the last line of its log, for the message of a crash."""
        code = self.process.exitcode if self.process else None
        if code is None:
            how = "ended"
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with suppress(OSError):
            lines = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            if lines:
                return f"{how}; its log ends with: {lines[-1]}"
        return how

    def _alive(self) -> bool:
        if self.process is not None:
            return self.process.is_alive()
        return holder(self.folder) is not None

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # gone, or so young that it leads no session yet
            if self.process is not None and self.process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(self.pid, number)


class Local:
    """Starts workers on this machine. `preload` names what the fork server imports, into `log` what it prints; `limit`:
    the seconds after which it ends a job that is alone and has no driver any more."""

    def __init__(self, preload: Sequence[str], log: Path, limit: float = math.inf) -> None:
        self.workers: list[Worker] = []
        self.log = log
        forkserver.set_forkserver_preload([server.__name__, __name__, f"{__package__}.orphans", *preload])
        with server.environment(log, limit):
            forkserver.ensure_running()  # it imports while the driver goes on

    def start(self, folder: Path, job: str, name: str) -> Worker:
        """Run `job` (`module:function`) on `folder`; it is to leave `folder/<name>.json`."""
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=work, args=(str(folder), job, name), name=f"{name} {folder.name}")
        try:
            with _nameless_main():
                process.start()
        except (EOFError, ConnectionError) as error:
            raise SweepError(
                f"`{self.log}`: the server that workers are forked from has ended ({type(error).__name__}); run the "
                "same command again"
            ) from error
        assert process.pid is not None
        return self._known(Worker(folder, name, process.pid, process))

    def adopt(self, folder: Path) -> Worker | None:
        """The worker that an earlier driver left alive in `folder`, if there is one."""
        found = holder(folder)
        return self._known(Worker(folder, found[1], found[0])) if found else None

    def wait(self, seconds: float) -> None:
        """Return when a worker has ended, or after `seconds`."""
        before, self.workers = self.workers, [worker for worker in self.workers if worker._alive()]
        if len(self.workers) < len(before):  # one has ended since the last call
            return
        sentinels = [worker.process.sentinel for worker in self.workers if worker.process is not None]
        if len(sentinels) < len(self.workers):  # adopted ones have none
            seconds = min(seconds, 0.05)
        if sentinels:
            connection.wait(sentinels, seconds)
        else:
            time.sleep(seconds)

    def shutdown(self) -> None:
        """Kill every worker and the fork server. Nothing is left behind."""
        for worker in self.workers:
            worker.kill()
        self.workers = []
        _stop_server()

    def _known(self, worker: Worker) -> Worker:
        self.workers.append(worker)
        return worker


def holder(folder: Path) -> tuple[int, str] | None:
    """Process id and job name of the worker that lives in `folder`, or None."""
    for _ in range(100):
        if not held(folder / LOCK):
            return None
        words = (folder / LOCK).read_text().split()
        if len(words) == 2:
            return int(words[0]), words[1]
        time.sleep(0.001)  # it has the lock and is about to write who it is
    return None


def work(folder: str, job: str, name: str) -> None:
    """The life of a worker."""
    path = Path(folder)
    os.setsid()
    server.forked()
    gc.freeze()  # the server's imports are never garbage: Inductor compiles a tenth faster without looking at them
    _log_to(path / "log.txt")
    with (path / LOCK).open("a") as lock:
        # Waits only where a driver was killed just after it had asked for a worker: that one may be about to start.
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{os.getpid()} {name}\n")
        lock.flush()
        if not (path / f"{name}.json").exists():
            module, function = job.split(":")
            getattr(importlib.import_module(module), function)(path)


def _log_to(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hide `__main__` from multiprocessing, which would import it again in every worker: a script without the
    `if __name__ == "__main__"` guard would then start its sweep once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _stop_server() -> None:
    running = forkserver._forkserver
    pid = getattr(running, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may be in the middle of its imports
        running._stop()  # type: ignore[attr-defined]  # what multiprocessing's own tests stop it with
