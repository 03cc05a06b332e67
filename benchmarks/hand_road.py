"""From checkpoint to a W8A8 model with its accuracy, by hand with ONNX Runtime's own tool.

    QSWEEP_DATA=<folder of data> python benchmarks/hand_road.py [--images 10000]

Export, `quantize_static` on 512 images, evaluation. Prints JSON: seconds by step (imports and reading the images are
not counted), accuracy, and the latency of its fp32 and int8 models at batch 128.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor, nn

from qsweep.models import build, load_checkpoint

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128


def checkpoint() -> nn.Module:
    """The fine-tuned ResNet-20."""
    model = build("resnet20", classes=10, channels=3)
    load_checkpoint(model, Path(os.environ["QSWEEP_DATA"]) / "checkpoints" / "resnet20_cifar10_jpeg.safetensors")
    return model.eval()


def images(path: Path, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) and labels (N,) of some rows of a Parquet file."""
    table = parquet.read_table(path).slice(first, stop - first).to_pydict()
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in table["image"]])
    values = torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).reshape(1, 3, 1, 1), torch.tensor(STD).reshape(1, 3, 1, 1)
    return ((values - mean) / std).contiguous(), torch.tensor(table["label"])


def quantize(calibration: Tensor, folder: Path) -> dict[str, float]:
    """Write `fp32.onnx` and `int8.onnx` to `folder`; seconds by step."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(calibration.split(64))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    start = time.perf_counter()
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        checkpoint(), (calibration[:2],), str(folder / "fp32.onnx"), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    exported = time.perf_counter()
    quantize_static(
        folder / "fp32.onnx",
        folder / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return {"export": exported - start, "quantize": time.perf_counter() - exported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import onnxruntime

    path = Path(os.environ["QSWEEP_DATA"]) / "cifar10" / "train.parquet"
    inputs, labels = images(path, 50_000 - arguments.images, 50_000)
    calibration, _ = images(path, 0, 512)
    with tempfile.TemporaryDirectory() as place:
        seconds = quantize(calibration, Path(place))
        start = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        session = onnxruntime.InferenceSession(Path(place) / "int8.onnx", options)
        predicted = [session.run(None, {"x": batch.numpy()})[0].argmax(1) for batch in inputs.split(BATCH)]
        seconds["evaluate"] = time.perf_counter() - start
    accuracy = float((np.concatenate(predicted) == labels.numpy()).mean())
    print(json.dumps({"seconds": seconds, "total": sum(seconds.values()), "accuracy": accuracy}))


if __name__ == "__main__":
    main()
