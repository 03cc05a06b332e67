"""Jobs of quick arithmetic in the place of `qsweep.jobs`: real processes, real files, no model.

What goes wrong, and when, is said by files in the folder of the spec, so that a test can change it between two runs.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from qsweep import alone


def prepare(folder: Path) -> None:
    job = _job(folder)
    _count(job, "prepare")
    if _told(job, "prepare") == "fail":
        _write(folder, "prepare", {"failure": {"kind": "TaskFailure", "message": "the task raised"}})
    else:
        doubts = ["as told"] if _told(job, "prepare") == "doubt" else []
        content = {"metrics": {}, "seconds": {"prepare": 0.0}, "doubts": doubts, "model": _told(job, "weights") or None}
        content["samples"] = {"test": [[3.0, float(_told(job, "samples") or 0)], [3.0, 1.0]]}
        _write(folder, "prepare", content | {"own_teacher": bool(_told(job, "teacher"))})


def build(folder: Path) -> None:
    job = _job(folder)
    _count(job, f"build {folder.name}")
    (folder / "progress.txt").write_text("building")
    told = _held(job, "build", folder.name)
    if told.startswith("tick"):
        with (folder / "ticks.txt").open("a") as ticks:
            for _ in range(int(told.removeprefix("tick") or 50)):
                print(time.time(), file=ticks, flush=True)
                time.sleep(0.01)
    if told == "hang":
        time.sleep(600)
    if told == "die" or (told == "die once" and job["attempt"] == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if told == "memory once" and job["attempt"] == 1:
        _write(folder, "build", {"failure": {"kind": "OutOfMemory", "message": "no memory left"}})
    elif told in ("NotFinite", "ExportFailure", "Refused", "DiskFull", "TaskChanged"):
        _write(folder, "build", {"failure": {"kind": told, "message": "as told"}})
    else:
        bits = {"stem.weight": 8, "head.weight": (job["config"]["compress"]["quantize"] or {}).get("weight_bits", 8)}
        content = {"metrics": {"size_bytes": _size(job)}, "seconds": {"quantize": 0.01}, "layer_bits": bits}
        if told.startswith("files "):
            content["files"] = {"model.onnx": told}
        _write(folder, "build", content | {"place": job["place"]})


def measure(folder: Path) -> None:
    job = _job(folder)
    other = _told(job, "measure", folder.name).removeprefix("after ")
    end = time.time() + 20
    while other.isdigit() and not (folder.parent / other / "build.json").exists() and time.time() < end:
        time.sleep(0.01)
    alone.ask(folder)
    _count(job, f"measure {folder.name}")
    began = time.time()
    told = _held(job, "measure", folder.name)
    if told in ("slow", "hang"):
        time.sleep(0.7 if told == "slow" else 600)
    scores = _scores(job)
    np.save(folder / "scores.npy", scores)
    latency = 10.0 - 4 * bool(job["config"]["compress"]["quantize"]) * (-1 if told == "heavy" else 1)
    accuracy: float = float(scores.mean())
    if _told(job, "measure", folder.name) == "nan":
        accuracy = float("nan")
    metrics = {"accuracy": accuracy, "latency_ms": latency, "latency_low_ms": latency, "latency_high_ms": latency}
    seconds = {"measure": time.time() - began, "began": began, "ended": time.time()}
    _write(folder, "measure", {"metrics": metrics, "seconds": seconds, "machine": "test"})


def test(folder: Path) -> None:
    job = _job(folder)
    _count(job, f"test {folder.name}")
    if _told(job, "test", folder.name) == "fail":
        _write(folder, "test", {"failure": {"kind": "TaskFailure", "message": "as told"}})
        return
    _write(folder, "test", {"metrics": {"accuracy_test": float(_scores(job).mean()) - 0.01}, "seconds": {}})


def _scores(job: dict[str, Any]) -> np.ndarray:
    """1000 samples; the fewer bits, the more of them are wrong, and always the same ones first."""
    quantize = job["config"]["compress"]["quantize"] or {}
    bits = quantize.get("weight_bits", 8) if quantize.get("method") != "cast" else 8
    wrong = 50 + 40 * (8 - bits) + 3 * (quantize.get("activation_scheme") == "symmetric")
    wrong += 4 * (job["draw"] // 1000 % 7)  # another draw, another accuracy; none of a sweep's first draws is above 0
    return (np.arange(1000) >= wrong).astype(np.uint8)


def _size(job: dict[str, Any]) -> float:
    quantize = job["config"]["compress"]["quantize"]
    if not quantize:
        return 4000.0
    return 2000.0 if quantize["method"] == "cast" else 125.0 * quantize["weight_bits"]


def _job(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return content


def _told(job: dict[str, Any], name: str, number: str = "") -> str:
    """What `root/tell.json` says of this job, such as {"build 0003": "die"}."""
    path = Path(job["root"]) / "tell.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    return str(told.get(f"{name} {number}".strip(), told.get(name, "")))


def _held(job: dict[str, Any], name: str, number: str) -> str:
    """What `_told` says once it is not `held`."""
    while (told := _told(job, name, number)) == "held":
        time.sleep(0.01)
    return told


def _count(job: dict[str, Any], what: str) -> None:
    with (Path(job["root"]) / "calls.txt").open("a") as file:
        file.write(f"{what}\n")


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    temporary = folder / f"{name}.json.tmp"
    temporary.write_text(json.dumps(content))
    os.replace(temporary, folder / f"{name}.json")
