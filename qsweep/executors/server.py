"""First import of the fork server: leave the terminal before the heavy imports begin.

`Local` names this module first in the server's preloads and says in `QSWEEP_SERVER` where its log is, how long a job
may take and what the environment was. The server then writes there what the imports say, and Ctrl-C in the terminal
does not reach it. Without the variable nothing happens.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "QSWEEP_SERVER"
_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_SILENT = "ignore::UserWarning:multiprocessing.resource_tracker"
_own: list[str] = []
"""In the server: variables that are not for its workers."""
log: Path | None = None
"""In the server: where it writes what it has to say."""
limit = math.inf
"""In the server: the seconds that a job may take."""


@contextmanager
def environment(log: Path, limit: float) -> Iterator[None]:
    """What the server is started in: it imports what this process would import, and from the same places. Python
    would put the working directory first, where a stray `onnx/` is enough to break it. With the server begins Python's
    tracker of semaphores, which removes those of workers that were killed: that it had to is no news for the terminal.
    """
    new = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in (*new, "PYTHONWARNINGS")}
    new["PYTHONWARNINGS"] = ",".join(filter(None, (before["PYTHONWARNINGS"], _SILENT)))
    os.environ.update(new, **{VARIABLE: json.dumps({"log": str(log), "limit": limit, "before": before})})
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        _restore(before)


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _leave_terminal(log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Importing Inductor would start a pool of compilers: children of the server, shared by nobody.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    # Asking CUDA whether there is a device would leave it unusable in all workers, which are forked after it.
    if _NVML not in os.environ:
        os.environ[_NVML] = "1"
        _own.append(_NVML)


def forked() -> None:
    """In a worker, where CUDA may be asked: NVML knows nothing of drivers that are too old for PyTorch."""
    for name in _own:
        del os.environ[name]


if VARIABLE in os.environ:
    _told = json.loads(os.environ.pop(VARIABLE))
    _restore(_told["before"])
    _leave_terminal(_told["log"])
    log, limit = Path(_told["log"]), _told["limit"]
