"""The loop that a person writes instead of `experiments/ptq-grid.yaml`: 12 points, one process, no tool.

    QSWEEP_DATA=<folder of data> python benchmarks/hand_grid.py [--images 10000]

For each point: export, calibrate, convert, compile, evaluate, time 100 calls of batch 128 after a warm-up. It uses
torchao's pt2e flow with its own quantizer for x86 CPUs. (That quantizer knows neither 4 nor 6 bits nor symmetric
activations: such points do the same work here, and the loop has no simulation, no second process, no baseline, no
record.) Prints JSON: seconds in all and a point.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
import warnings
from pathlib import Path

import torch
import torch._inductor.config as inductor
from hand_road import checkpoint, images
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

BATCH = 128


def point(calibration: Tensor, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and median milliseconds of one W8A8 model."""
    graph = torch.export.export(checkpoint(), (inputs[:BATCH],)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for batch in calibration.split(BATCH):
            prepared(batch)
        compiled = torch.compile(convert_pt2e(prepared))
        correct = 0
        for batch, label in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
            correct += int((compiled(batch).argmax(1) == label).sum())
        times = []
        for call in range(110):
            start = time.perf_counter()
            compiled(inputs[:BATCH])
            times += [time.perf_counter() - start] if call >= 10 else []
    return correct / len(labels), 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    inductor.freezing = True
    start = time.perf_counter()
    data = Path(os.environ["QSWEEP_DATA"])
    inputs, labels = images(data / "cifar10" / "train.parquet", 50_000 - arguments.images, 50_000)
    usable = len(inputs) // BATCH * BATCH  # a last, smaller batch would be compiled again at every point
    inputs, labels = inputs[:usable], labels[:usable]
    calibration, _ = images(data / "cifar10" / "train.parquet", 0, 512)
    points = []
    for _bits, _scheme, samples in itertools.product((4, 6, 8), ("symmetric", "asymmetric"), (128, 512)):
        torch._dynamo.reset()
        began = time.perf_counter()
        accuracy, latency_ms = point(calibration[:samples], inputs, labels)
        points.append({"seconds": time.perf_counter() - began, "accuracy": accuracy, "latency_ms": latency_ms})
    print(json.dumps({"seconds": time.perf_counter() - start, "points": points}))


if __name__ == "__main__":
    main()
