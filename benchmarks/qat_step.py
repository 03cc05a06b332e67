"""How long a step of quantization-aware training takes beside a step in floating point: prints JSON.

    python benchmarks/qat_step.py --threads 1 --steps 5

ResNet-20, batch 128, of 32 x 32 images; same precision, layout and optimizer on both sides; the two take turns, and a
ratio is that of the medians. `eager` runs the training graph as it is, `compiled` through `torch.compile`, which is how
`float` runs beside it then, too. Processor time is given beside wall time: on a machine that does other work, it is the
one to look at.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_images import RandomImages
from torch import Tensor, nn

from qsweep.models import build
from qsweep.quantize._training import prepared, start
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.pact import PACT
from qsweep.quantize.qat import QAT
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.tasks.base import Precision, Training

METHODS = {"ste": QAT, "lsq": LSQ, "pact": PACT}


def stepper(model: nn.Module, task: RandomImages, precision: Precision, *, compiled: bool) -> Callable[[], None]:
    nn.Module.train(model, True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs, labels = task.samples("train")
    inputs = task.transform(inputs).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = run(inputs).float()
        loss = task.loss(outputs, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def quantized(method: str, task: RandomImages, folder: Path) -> nn.Module:
    context = Context(task, Store(folder), "model", 0, task.model, Training(), progress=lambda text: None)
    config = METHODS[method](weight_bits=4, activation_bits=4, edge_bits=8)
    live = prepared(config, task.model(), context)
    start(live.graph, 4, task.transform(task.samples("train").inputs))
    return live.graph


def compare(steps: dict[str, Callable[[], None]], count: int) -> dict[str, dict[str, float]]:
    """Ratios to `float` of the medians of wall and processor time."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            step()
            if turn >= 2:  # the first ones compile and touch memory
                wall[name].append(time.perf_counter() - begun)
                processor[name].append(time.process_time() - used)
    found = {}
    for name in steps:
        ratios = [statistics.median(times[name]) / statistics.median(times["float"]) for times in (wall, processor)]
        found[name] = {"wall": round(ratios[0], 3), "processor": round(ratios[1], 3)}
    found["float"]["ms"] = round(1e3 * statistics.median(wall["float"]), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = RandomImages(lambda: build("resnet20", 10, 3), options.batch, 32)
    for mode in options.modes:
        for precision in options.precisions:
            with tempfile.TemporaryDirectory() as folder:
                models = {"float": task.model()} | {name: quantized(name, task, Path(folder)) for name in METHODS}
                torch.compiler.reset()
                steps = {
                    name: stepper(model, task, precision, compiled=mode == "compiled") for name, model in models.items()
                }
                row = {"mode": mode, "precision": precision, "batch": options.batch, "threads": options.threads}
                print(json.dumps(row | compare(steps, options.steps)), flush=True)


if __name__ == "__main__":
    main()
