"""A sweep of arithmetic jobs for tests: 6 points, 3 baselines, a few seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from qsweep.records import Record
from qsweep.spec import Spec
from qsweep.study import run
from qsweep.study.folder import write_atomically

CONTENT = """
name: small
task: {method: image_classification, model: {arch: digits_cnn}, data: {method: digits}}
compress:
  quantize:
    method: ptq
    weight_bits: {choice: [2, 4, 6]}
    activation_scheme: {choice: [symmetric, asymmetric]}
target: {engine: onnxruntime}
search: {trials: 6}
"""
REAL = {"method": "ptq", "weight_bits": 4, "calibration_samples": {"range": [1, 100000]}}
"""A `quantize` with more points than any test runs: the sampler is asked."""

_OF = "SMALL_SWEEP"
"""In the environment of a driver and of all that it starts: its folder."""
_DRIVER = """
import sys
from pathlib import Path
from small_sweep import small_spec
from qsweep.study import run
for record in run(small_spec(run={"workers": 2}), Path(sys.argv[1]), jobs="arithmetic_jobs", preload=("numpy",)):
    print(record.number, flush=True)
"""


def small_spec(quantize: Any = None, **changes: Any) -> Spec:
    content = yaml.safe_load(CONTENT) | changes
    if quantize is not None:
        content["compress"] = {"quantize": quantize}
    return Spec.model_validate(content)


def sweep(root: Path, spec: Spec, **tell: str) -> dict[int, Record]:
    """Run `spec` to its end; the records by number as they were at the end. `tell`: what jobs are told, with `_` for a
    space (`build_0003="die"`)."""
    told(root, **tell)
    return {record.number: record for record in run(spec, root, jobs="arithmetic_jobs", preload=("numpy",))}


def start(root: Path, driver: str = _DRIVER) -> subprocess.Popen[bytes]:
    """A driver of the sweep in a process of its own; it runs the code `driver`."""
    path = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    environment = {**os.environ, "PYTHONPATH": path, _OF: str(root)}
    return subprocess.Popen([sys.executable, "-c", driver, str(root)], env=environment, start_new_session=True)


def stop(root: Path) -> None:
    """Kill the drivers that were started in `root`, their fork servers and all workers, paused ones, too."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # of another user, or it has just ended
            if f"{_OF}={root}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def told(root: Path, **tell: str) -> None:
    write_atomically(root / "tell.json", json.dumps({key.replace("_", " "): what for key, what in tell.items()}))


def calls(root: Path) -> Counter[str]:
    """How often each job has run in each folder."""
    path = root / "calls.txt"
    return Counter(path.read_text().splitlines() if path.exists() else [])


def states(root: Path, name: str = "small") -> Counter[str]:
    """How many Optuna trials are in each state."""
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{root}/sweeps/{name}/optuna.db")
    study = optuna.load_study(study_name=name, storage=storage)
    found = Counter(trial.state.name for trial in study.get_trials())
    storage.engine.dispose()
    return found
