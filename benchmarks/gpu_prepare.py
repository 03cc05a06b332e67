"""Compiles what will be timed, in processes beside the one that checks equality and times nothing meanwhile.

Compiling is most of the benchmark's time and runs on the CPU: the caches on disk, of Triton and of PyTorch's compiler,
take it from one process to the next. What is chosen by timing, block shapes and the compiler's own, is not taken over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
_MOST = 6
"""Processes: each compiles on some threads of its own."""
_THREADS = 4
_LOG = "log"

Wanted = tuple[str, int, bool]
"""A network, its batch size, and whether it is for `max-autotune`."""


class Preparation:
    """Begun at once, the first cases first."""

    def __init__(self, cases: Sequence[Wanted], device: str, *, tiny: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qsweep-prepared-"))
        count = max(1, min(_MOST, len(cases), (os.cpu_count() or 1) // 2))
        options = ["--tiny"] * tiny + ["--device", device]
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(self.folder),  # of block shapes
            "TORCHINDUCTOR_COMPILE_THREADS": str(_THREADS),
        }
        self.done: set[str] = set()
        with (self.folder / _LOG).open("w") as log:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, __file__, str(self.folder), *options, *map(_told, cases[number::count])],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # what they start ends with them
                )
                for number in range(count)
            ]

    def wait(self, seconds: float) -> None:
        """Until they are done, no longer than `seconds`; then none of them lives, and what they have done is told."""
        if not self.folder.exists():
            return
        end = time.monotonic() + seconds
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self.done = {path.name for path in self.folder.iterdir()}
        print((self.folder / _LOG).read_text(), end="", flush=True)
        self.stop()

    def stop(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, name: str, batch: int, label: str) -> bool:
        """Whether the baseline `label` is in the caches."""
        return _mark(name, batch, label) in self.done


def _told(case: Wanted) -> str:
    return "/".join(map(str, case))


def _read(text: str) -> Wanted:
    name, batch, tuned = text.split("/")
    return name, int(batch), tuned == "True"


def _mark(name: str, batch: int, label: str) -> str:
    return f"{name} {batch} {label}"


def _end_with(parent: int) -> None:
    """End this process, and what it has started, once it is no longer the child of `parent`."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("cases", nargs="+", type=_read)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch
    import torch._inductor.config as settings
    from gpu_baselines import Baselines, compiled
    from gpu_clock import Bench, reason

    settings.autotune_local_cache = False  # blocks of kernels that were timed beside other processes are not kept
    bench = Bench(torch.device(options.device), options.tiny, float("inf"))
    baselines = Baselines(bench)
    for name, batch, tuned in options.cases:
        steps = {} if tuned else {"int8": partial(baselines.chain, name, batch)}
        for way in compiled(name, batch, tuned=tuned):
            steps[way.label] = partial(baselines.compiled, name, batch, way)
        for label, step in steps.items():
            begun = time.monotonic()
            try:
                with torch.no_grad():
                    step()
            except Exception as error:  # it fails again, and is told, where it is measured
                print(f"     prepared: {name}, batch {batch}, {label}: {reason(error)}", flush=True)
            else:
                (options.folder / _mark(name, batch, label)).touch()
                print(f"     prepared: {name}, batch {batch}, {label}: {time.monotonic() - begun:.0f} s", flush=True)
            bench.clear()


if __name__ == "__main__":
    main()
