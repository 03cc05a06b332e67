"""Whole trainings by qsweep's own loop, quantization-aware ones beside floating point: needs qsweep's requirements.

Seconds of an epoch, from the end of one to the end of the next: batches drawn and augmented on the device, loss,
optimizer, schedule and the epoch's checkpoint are in it, calibration and conversion are not.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_asked as asked
from gpu_clock import Bench
from gpu_models import build
from gpu_rows import Rows, absent
from random_images import RandomImages
from torch import nn

_EPOCHS, _STEPS, _BATCH, _TURNS = 3, 60, 128, 2


class Epochs:
    """When each has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, text: str) -> None:
        if "epoch" in text:
            self.ends.append(time.perf_counter())

    @property
    def shortest(self) -> float:
        """Of those after the first, which compiles."""
        return min(end - begun for begun, end in zip(self.ends, self.ends[1:], strict=False))


def trainings(bench: Bench, rows: Rows) -> None:
    if missing := absent("pydantic", "safetensors", "scipy"):
        return rows.fill(asked.trainings(), f"not measured ({missing} not installed)", None)
    side, count = (8, 8) if bench.tiny else (224, _BATCH * _STEPS)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model = model if bench.tiny else build("ResNet-18", False)[0]
    task = RandomImages(lambda: model, count, side)
    for (precision, compiled), methods in asked.TRAININGS.items():
        names = [asked.training(method, precision, compiled) for method in methods]
        if rows.settled(*names):
            continue
        with rows.guard(names):
            bench.need(130 if compiled else 40)
            shortest: dict[str, list[float]] = {kind: [] for kind in ("float", *methods)}
            for _ in range(_TURNS if precision == "bf16" and not compiled and not bench.tiny else 1):
                for kind, found in shortest.items():
                    found.append(epoch(kind, task, bench, {"precision": precision, "compile": compiled}))
                    bench.clear()
            steps = 2 if bench.tiny else _STEPS
            plain, *others = (1e3 * min(found) / steps for found in shortest.values())
            for method, wanted in zip(methods, others, strict=True):
                text = f"{wanted / plain:.2f} ({wanted:.1f} ms a step, {plain:.1f} ms)"
                rows.add(
                    asked.training(method, precision, compiled), text, precision == "fp32" or wanted <= 1.3 * plain
                )


def epoch(kind: str, task: RandomImages, bench: Bench, fields: dict[str, Any]) -> float:
    """Seconds of one, of the training that `kind` names."""
    from copy import deepcopy

    from qsweep.quantize.lsq import LSQ
    from qsweep.quantize.qat import QAT
    from qsweep.stage import Context
    from qsweep.store import Store
    from qsweep.tasks.base import Training
    from qsweep.train import fit

    batch = 4 if bench.tiny else _BATCH
    training = Training(epochs=_EPOCHS, batch_size=batch, learning_rate=1e-4, device=bench.device.type, **fields)
    ends, model = Epochs(), deepcopy(task.model())
    with tempfile.TemporaryDirectory() as folder:
        if kind == "float":
            fit(model, task, training, seed=0, progress=ends, checkpoint=Path(folder) / "epoch.pt")
            return ends.shortest
        method = {"LSQ": LSQ, "straight-through": QAT}[kind]
        config = method(epochs=_EPOCHS, learning_rate=1e-4, calibration_samples=8, precision=fields["precision"])
        config.apply(model, Context(task, Store(Path(folder)), "model", 0, task.model, training, progress=ends))
        return ends.shortest
