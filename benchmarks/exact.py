"""How equal the engines are, on real models and images: int8 PTQ of the digits CNN and of a trained ResNet-20.

    QSWEEP_DATA=<folder of data> python benchmarks/exact.py [--images 1000]

Prints JSON: integers that differ between `reference` and ONNX Runtime over all int8 tensors, and of how many; the share
that differs between `reference` and Inductor layer by layer on identical inputs; top-1 agreement of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from hand_road import checkpoint, images
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from networks import Noise, context
from test_engines import Case, case, inductor_call, layer_by_layer, lowered, onnx_tensors, reference

from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.quantize.ptq import PTQ


def figures(name: str, found: Case, folder: Path) -> dict[str, float]:
    outputs, tensors = reference(found)
    others = onnx_tensors(lowered(OnnxRuntime(), found, folder / "onnx"), found.inputs).values()
    run = Inductor(batch_size=len(found.inputs), threads=2).load(lowered(Inductor(), found, folder / "inductor"))
    return {
        f"{name}_onnx": sum(int((a != b).sum()) for a, b in zip(tensors, others, strict=True)),
        f"{name}_total": sum(tensor.numel() for tensor in tensors),
        f"{name}_inductor": layer_by_layer(found, tensors, inductor_call),
        f"{name}_top1": (run(found.inputs).argmax(1) == outputs.argmax(1)).float().mean().item(),
    }


def resnet20(count: int, root: Path) -> Case:
    import os

    data = Path(os.environ["QSWEEP_DATA"]) / "cifar10"
    calibration, _ = images(data / "train.parquet", 0, 512)
    inputs: Tensor
    inputs, _ = images(data / "test_dev.parquet", 0, count)
    found = context(root, task=Noise(inputs=calibration))
    return Case(PTQ().apply(checkpoint(), found), found, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    count = parser.parse_args().images
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "digits").mkdir()
        (root / "resnet").mkdir()
        found = figures("digits", case("digits", root), root / "digits")
        found |= figures("resnet", resnet20(count, root), root / "resnet")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
