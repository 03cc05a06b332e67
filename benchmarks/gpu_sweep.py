"""Whole sweeps with `engine: cuda`, where qsweep's own requirements are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_asked as asked
from gpu_clock import Bench
from gpu_rows import Rows, absent

ROOT = Path(__file__).parents[1]
NEEDED = ("pydantic", "optuna", "mlflow", "safetensors", "yaml", "typer", "zstandard")

SPECS = {"digits": "gpu-digits.yaml", "cifar10-resnet20": "gpu-cifar10.yaml"}
TRIALS = 2
"""Of each spec."""

STOP_SECONDS = 8.0
"""What a driver may take to stop its workers."""


def sweeps(bench: Bench, rows: Rows) -> None:
    for name, file in SPECS.items():
        row = asked.SWEEPS[name]
        if rows.settled(row):
            continue
        if (missing := lacking(name)) is not None:
            rows.add(row, f"not measured ({missing})", None)
            continue
        with rows.guard(row):
            bench.need(60)
            rows.add(row, *run((ROOT / "experiments" / file).read_text(), bench))


def lacking(name: str) -> str | None:
    """What stands in the way of a sweep here."""
    if missing := absent(*NEEDED):
        return f"{missing} not installed"
    return "QSWEEP_DATA is not set" if name != "digits" and "QSWEEP_DATA" not in os.environ else None


def run(spec: str, bench: Bench) -> tuple[str, bool | None]:
    """What its records say, and whether it ended with all trials complete; None where time ran out before."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.yaml").write_text(spec)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        driver = subprocess.Popen(
            [sys.executable, "-m", "qsweep", "run", str(Path(folder) / "spec.yaml")],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = driver.communicate(timeout=max(5.0, bench.left - STOP_SECONDS))
            end = said.strip().splitlines()[-1:] if driver.returncode else []
            ended: bool | None = not driver.returncode
        except subprocess.TimeoutExpired:
            end, ended = ["out of time"], None
        finally:
            stop(driver)
        files = sorted(Path(folder).glob("sweeps/*/trials/*/record.json"))
        records: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    trials = [record for record in records if record["kind"] == "trial"]
    complete = [record for record in trials if record["state"] == "complete"]
    parts = [f"{len(complete)} of {len(trials)} trials complete", *map(described, records), *end]
    return "; ".join(parts).replace("|", "/"), ended and len(complete) == len(trials) >= TRIALS


def stop(driver: subprocess.Popen[str]) -> None:
    """End a driver with its workers, which survive one that is killed."""
    driver.terminate()
    try:
        driver.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        driver.kill()


def described(record: dict[str, Any]) -> str:
    metrics = record["metrics"]
    if record["state"] != "complete":
        failure = record.get("failure") or {}
        return f"{record['name']}: {record['state']} ({failure.get('kind')}: {failure.get('message')})"
    return f"{record['name']}: {100 * metrics['accuracy']:.2f} %, {metrics['latency_ratio']:.2f} of fp32's latency"
