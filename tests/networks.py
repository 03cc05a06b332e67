"""Small networks that between them hold every op the hub knows, and the ways people write them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Generator, Tensor, nn

from qsweep.build import context_of
from qsweep.engines import Engine, EngineConfig
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.models import build
from qsweep.quantize.ptq import PTQ
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.tasks import AnyTask, Task
from qsweep.tasks.base import Samples, SplitName, Training


class Pools(nn.Module):
    """Max pool, average pool, concatenation, ReLU6, a rectifier after a pool, in-place ops, dropout, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 3, padding=1)
        self.right = nn.Conv2d(8, 6, 1)
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6(inplace=True)
        self.max = nn.MaxPool2d(3, stride=2, padding=1)
        self.average = nn.AvgPool2d(2)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.max(self.bn(self.first(x))))
        x = torch.cat([self.relu6(self.left(x)), self.relu(self.right(x))], 1)
        logits: Tensor = self.head(self.average(x))
        return logits


class Depthwise(nn.Module):
    """An inverted residual: expansion, depthwise and grouped convolutions, an in-place sum, adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depth = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.project(self.depth(self.expand(x)))
        out += x
        logits: Tensor = self.linear(self.pool(out).flatten(1))
        return logits


class Shortcut(nn.Module):
    """Option A of ResNet: every other pixel, zero channels on both sides, added to a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        logits: Tensor = self.linear(F.relu(self.conv(x) + short).mean((2, 3)))
        return logits


class Sequence(nn.Module):
    """Conv1d, and linears over (batch, time, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.bn = nn.BatchNorm1d(6)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x.squeeze(1))))
        x = self.narrow(F.relu(self.wide(x))) + x
        logits: Tensor = self.head(x.mean(2))
        return logits


class Computed(nn.Module):
    """A weight that is computed from others, before a batch norm; a gate, a table that is looked up; awkward names."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 8, 3, bias=False))
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 10, bias=False)
        self.gate = nn.Parameter(torch.randn(8))
        self.bias_table = nn.Parameter(torch.randn(5, 10))
        self.register_buffer("places", torch.randint(0, 5, (3,)))
        self.logit_scale = nn.Parameter(1 + torch.rand(()))
        self.my_zero_point = nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x))).mean((2, 3)) * torch.sigmoid(self.gate)
        logits: Tensor = self.linear(x) * self.logit_scale + self.bias_table[self.places].sum(0) + self.my_zero_point
        return logits


class Function(nn.Module):
    """A model made of a function and its layers."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


def mlp() -> nn.Module:
    """Linears, one with batch norm, after a view that counts its samples."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.size(0), -1)

    layers = nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    return nn.Sequential(Flat(), *layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits_cnn": lambda: build("digits_cnn", 10, 1),
    "pools": Pools,
    "depthwise": Depthwise,
    "shortcut": Shortcut,
    "sequence": Sequence,
    "computed": Computed,
    "mlp": mlp,
}
"""Each takes (B, 1, 8, 8) and gives (B, 10)."""


def network(name: str, seed: int = 0) -> nn.Module:
    """One of `NETWORKS` in eval mode, its batch norms not as they begin."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                module.weight.data[0] = 0.0
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


class Noise:
    """A task of random inputs and labels, for what does not depend on what a model has learnt."""

    def __init__(self, count: int = 200, inputs: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(count, 1, 8, 8, generator=generator) if inputs is None else inputs
        self.labels = torch.randint(0, 10, (len(self.inputs),), generator=generator)

    def model(self) -> nn.Module:
        return network("digits_cnn")

    def samples(self, split: SplitName) -> Samples:
        return Samples(self.inputs, self.labels)

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        return inputs

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()


def context(root: Path, key: str = "model", task: Task | None = None, seed: int = 0) -> Context:
    """What a stage works in, its store under `root`."""
    task = task or Noise()
    return Context(
        task=task,
        store=Store(root / "store"),
        key=key,
        seed=seed,
        original=task.model,
        training=Training(batch_size=64),
    )


@cache
def _session() -> Path:
    root = Path(tempfile.mkdtemp(prefix="networks"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def shared(key: str, inputs: Tensor) -> Context:
    """A context whose store is that of all tests: the model that `key` names is traced once, and calibrated once on
    `inputs`, however many tests want it."""
    return context(_session(), key, Noise(inputs=inputs))


DIGITS = {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": {"method": "digits"}}


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """A network of this class, in eval mode, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def assert_close(found: Tensor, wanted: Tensor, within: float = 0.02) -> None:
    """Nowhere further apart than `within` standard deviations."""
    torch.testing.assert_close(found, wanted, atol=within * wanted.std().item(), rtol=0)


@cache
def digits() -> tuple[nn.Module, Context, Path]:
    """A digits_cnn trained for a few epochs, its context, and the root whose store holds both; made once a session."""
    root = Path(tempfile.mkdtemp(prefix="digits"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = TypeAdapter(AnyTask).validate_python(DIGITS | {"training": {"epochs": 5}})
    store = Store(root / "sweeps" / "store")
    found = context_of(config, config.open(root), root, store, 0, lambda text: None)
    return found.original(), found, root


def pruned() -> nn.Module:
    """A network half of whose convolution weights are zero."""
    model = network("digits_cnn")
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data *= torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return model


def needs(engine: str) -> None:
    """Skip the test where `engine` does not work."""
    if (reason := TypeAdapter(Engine).validate_python({"engine": engine}).available()) is not None:
        pytest.skip(reason)


def lowered(engine: EngineConfig, model: QuantizedModel, folder: Path) -> None:
    """The artifact of `model` in `folder`; the model stays as it is."""
    folder.mkdir(exist_ok=True)
    before = model.graph.code
    engine.lower(model, folder, Store(folder.parent / "store"))
    assert model.graph.code == before


def accuracy_lost(engine: EngineConfig, folder: Path, within: float) -> float:
    """By a trained network in 8 bits, whose outputs are `within` that of the reference's."""
    model, found, _ = digits()
    samples = found.task.samples("validation")
    inputs = found.task.transform(samples.inputs)
    quantized = PTQ(calibration_samples=200).apply(model, found)
    engine = engine.model_copy(update={"batch_size": len(inputs)})
    lowered(engine, quantized, folder)
    outputs = engine.load(folder)(inputs)
    assert_close(outputs, IntegerInterpreter(quantized.graph)(inputs), within)
    with torch.no_grad():
        scores = [found.task.score(each, samples.labels).mean() for each in (model(inputs), outputs)]
    return float(scores[0] - scores[1])
