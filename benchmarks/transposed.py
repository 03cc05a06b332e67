"""What it gives that transposed convolutions compute in integers.

    python benchmarks/transposed.py [accuracy]

A U-Net (windows of two, three and four pixels) and a pose network (three layers of four pixels behind a small
backbone), weights drawn, 128 x 128 pixels, batch 1, one thread: latency of 8 bits over that of 8 bits whose transposed
convolutions stay in floating point, as `float_layers` leaves them, and over that of float32, and bytes of the artifact;
each engine's three in turn, medians of 30. Then the squared error of a network that makes clear digits, twice as large,
of noisy ones, trained here and quantized to few bits (trainings of 8 epochs), over that with its transposed
convolutions in floating point. Writes `transposed.json` and `transposed.md`; with `accuracy` the last part alone.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from random_images import RandomImages
from rows import record, table
from torch import Tensor, nn
from zoo import lowered, milliseconds

from qsweep.engines import Engine, EngineConfig
from qsweep.hub.export import float_graph
from qsweep.hub.simulate import simulation
from qsweep.measure.files import file_sizes
from qsweep.quantize.base import Uniform
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.tasks.base import Samples, SplitName, Training
from qsweep.train import fit

ENGINES = ["onnxruntime", "openvino", "inductor", "litert", "executorch"]
_SIDE = 128


class Block(nn.Sequential):
    def __init__(self, given: int, wide: int) -> None:
        layers = [
            layer for count in (given, wide) for layer in _layer(nn.Conv2d(count, wide, 3, padding=1, bias=False))
        ]
        super().__init__(*layers)


def _layer(conv: nn.Module) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]  # type: ignore[arg-type]


class UNet(nn.Module):
    """Ronneberger et al. 2015 with 32 to 256 channels and batch norms."""

    def __init__(self, window: int) -> None:
        super().__init__()
        widths = [32, 64, 128, 256]
        sizes = {"kernel_size": window, "stride": 2, "padding": (window - 1) // 2, "output_padding": window % 2}
        self.down = nn.ModuleList(Block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, **sizes) for a, b in pairwise(widths))
        self.join = nn.ModuleList(Block(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for level in (2, 1, 0):
            x = self.join[level](torch.cat([kept[level], self.up[level](x)], 1))
        return self.head(x)  # type: ignore[no-any-return]


class Pose(nn.Module):
    """The head of Xiao et al. 2018 ("Simple Baselines for Human Pose Estimation") over a small backbone."""

    def __init__(self) -> None:
        super().__init__()
        pools = nn.MaxPool2d(2), nn.MaxPool2d(2)
        stem = nn.Conv2d(3, 64, 7, 4, 3), nn.ReLU()
        self.body = nn.Sequential(*stem, Block(64, 128), pools[0], Block(128, 256), pools[1], Block(256, 256))
        ups = [_layer(nn.ConvTranspose2d(given, 128, 4, 2, 1, bias=False)) for given in (256, 128, 128)]
        self.up, self.head = nn.Sequential(*(layer for up in ups for layer in up)), nn.Conv2d(128, 17, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.body(x)))  # type: ignore[no-any-return]


NETWORKS = {f"U-Net, windows of {window}": lambda window=window: UNet(window) for window in (2, 3, 4)} | {"pose": Pose}


class Decoder(nn.Module):
    """Most of its weights are in two transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), *_layer(nn.Conv2d(32, 64, 3, 2, 1)))
        ups = (nn.ConvTranspose2d(given, wide, 4, 2, 1, bias=False) for given, wide in ((64, 32), (32, 16)))
        self.up, self.head = nn.Sequential(*(part for up in ups for part in _layer(up))), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.body(x)))  # type: ignore[no-any-return]


class Digits:
    """Noisy digits of 8 x 8 pixels, and clear ones of 16 x 16; the last 397 for testing."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        generator = torch.Generator().manual_seed(0)
        clear = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
        clear = clear[torch.randperm(len(clear), generator=generator)]
        noisy = clear + 0.15 * torch.randn(clear.shape, generator=generator)
        clear = F.interpolate(clear, (16, 16), mode="bilinear")
        self.found, self.test = Samples(noisy[:1400], clear[:1400]), Samples(noisy[1400:], clear[1400:])

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Decoder()

    def samples(self, split: SplitName) -> Samples:
        return self.found

    def transform(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return inputs

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return -(outputs - labels).square().mean((1, 2, 3))

    def error(self, model: nn.Module) -> float:
        with torch.no_grad():
            return F.mse_loss(model(self.test.inputs), self.test.labels).item()


def accuracies(folder: Path) -> None:
    """A row for each method."""
    task, training = Digits(), Training(epochs=15, optimizer="adamw", learning_rate=2e-3)
    model = task.model()
    fit(model, task, training, seed=0)
    found = Context(task, Store(folder / "store"), "digits", 0, task.model, training)
    methods: list[tuple[type[Uniform], int]] = [(PTQ, 8), (PTQ, 4), (QAT, 4), (QAT, 3), (LSQ, 4), (LSQ, 3)]
    real = task.error(model)
    for method, bits in methods:
        fields = {"weight_bits": bits, "activation_bits": max(bits, 4)}
        fields |= {} if method is PTQ else {"epochs": 8}
        error, left = (
            task.error(simulation(method.model_validate(fields | more).apply(model, found)))
            for more in ({}, {"float_layers": ["up.*"]})
        )
        name = f"digits, {method.__name__}, weights of {bits} bits, activations of {fields['activation_bits']}"
        said = f"{error / left:.2f} ({error:.5f}; float32 {real:.5f})"
        record("transposed", [(name, "1.1 of the error with those in floating point", said, error <= 1.1 * left)])


def compare(name: str, engine_name: str, folder: Path) -> None:
    """One row: a network on an engine."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    task = RandomImages(lambda: model, 8, _SIDE)
    found = Context(task, Store(folder / "store"), name, 0, task.model, Training())
    engine = TypeAdapter[EngineConfig](Engine).validate_python({"engine": engine_name, "batch_size": 1, "threads": 1})
    ptq = {"calibration_samples": 8}
    graphs = {
        "integers": PTQ.model_validate(ptq).apply(model, found),
        "left": PTQ.model_validate(ptq | {"float_layers": ["up.*"]}).apply(model, found),
        "float32": float_graph(model, found),
    }
    made = {kind: lowered(engine, graph, found, kind) for kind, graph in graphs.items()}
    taken = milliseconds({kind: run for kind, (_, run) in made.items()}, task.transform(task.found.inputs[:1]))
    sizes = {kind: file_sizes(artifact)["size_bytes"] for kind, (artifact, _) in made.items()}
    time, size = taken["integers"] / taken["left"], sizes["integers"] / sizes["left"]
    said = (
        f"{time:.2f} of the time, {size:.2f} of the bytes; {taken['integers'] / taken['float32']:.2f} of float32's time"
    )
    asked = "under those left in floating point"
    record("transposed", [(f"{name}, {engine_name}", asked, said, max(time, size) < 1)])


def main() -> None:
    torch.set_num_threads(1)
    for name in NETWORKS if "accuracy" not in sys.argv[1:] else ():
        for engine_name in ENGINES:
            with tempfile.TemporaryDirectory() as folder:
                compare(name, engine_name, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        accuracies(Path(folder))
    table(
        "transposed", "# Transposed convolutions in integers\n\n`python benchmarks/transposed.py`, see its docstring."
    )


if __name__ == "__main__":
    main()
