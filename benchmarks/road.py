"""From checkpoint to a W8A8 artifact with its accuracy, by qsweep: what `hand_road.py` does by hand.

    QSWEEP_DATA=<folder of data> python benchmarks/road.py [--images 10000]

Export, calibration on 512 images, lowering for ONNX Runtime, evaluation of the loaded artifact, into an empty store.
Prints JSON: seconds by step (imports and reading the images are not counted) and accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from qsweep.build import Clock, compress, context_of, lower
from qsweep.measure.deployed import outputs
from qsweep.spec import TrialConfig
from qsweep.store import Store
from qsweep.tasks.image_classification import ImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    torch.set_num_threads(2)
    data = os.environ["QSWEEP_DATA"]
    train, first = f"{data}/cifar10/train.parquet", 50_000 - images
    task_config = ImageClassification.model_validate(
        {
            "model": {"arch": "resnet20", "checkpoint": f"{data}/checkpoints/resnet20_cifar10_jpeg.safetensors"},
            "data": {
                "method": "parquet",
                "train": {"file": train, "rows": [0, first]},
                "validation": {"file": train, "rows": [first, 50_000]},
                "test": f"{data}/cifar10/test_dev.parquet",
                "classes": 10,
            },
        }
    )
    config = TrialConfig.model_validate(
        {
            "compress": {"quantize": {"method": "ptq"}},
            "target": {"engine": "onnxruntime", "batch_size": 128, "threads": 2},
        }
    )
    with tempfile.TemporaryDirectory() as place:
        root, clock = Path(place), Clock()
        task = task_config.open(root)
        labels = [task.samples(split).labels for split in ("train", "validation")][1]
        context = context_of(task_config, task, root, Store(root / "store"), 0, lambda text: None)
        model = context.original()
        start = time.perf_counter()
        with clock("compress"):
            quantized = compress(config.compress, model, context, clock)
        with clock("lower"):
            lower(quantized, config, root / "artifact", context.store)
        torch.set_num_threads(1)  # as the measuring job does
        with clock("evaluate"):
            run = config.target.load(root / "artifact")
            scores = task.score(outputs(run, task, "validation", 128), labels)
        total = time.perf_counter() - start
    print(json.dumps({"seconds": clock.seconds, "total": total, "accuracy": scores.float().mean().item()}))


if __name__ == "__main__":
    main()
