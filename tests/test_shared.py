"""Weights that several layers read: rounded once, stored once, on every engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Noise, context
from torch import Tensor, nn

from qsweep.engines.base import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.hub.convert import convert
from qsweep.hub.form import QuantizedModel, stored_bits
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.measure.sizes import work
from qsweep.prune._global import zero_smallest
from qsweep.quantize._begin import begin_rounded
from qsweep.quantize._training import finished, prepared, start
from qsweep.quantize.base import Quantization
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.mixed import Mixed
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.quantize.rounding import GPTQ, AdaRound, Nearest
from qsweep.quantize.trained import Trained
from qsweep.weights import weight_names


class Heads(nn.Module):
    """One head for features of two sizes, as detectors have it, and two sequences by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head, self.line = nn.Conv2d(16, 16, 3, padding=1), nn.Conv1d(16, 8, 3, padding=1)
        self.last = nn.Linear(640, 10)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.stem(x).relu()
        narrow = self.narrow(wide).relu()
        found = [self.head(wide).relu().flatten(2), self.head(narrow).relu().flatten(2)]
        lines: Tensor = self.last(torch.cat([self.line(each) for each in found], 2).flatten(1))
        return lines


INPUTS = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
METHODS = [
    PTQ(weight_bits=4, bias_correction=True),
    PTQ(weight_bits=4, rounding=AdaRound(iterations=20)),
    QAT(weight_bits=4),
    LSQ(weight_bits=4),
    Codebook(weight_bits=4),
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quantization], QuantizedModel]:
    @cache
    def once(label: str) -> QuantizedModel:
        (config,) = (config for config in METHODS if config.label() == label)
        torch.manual_seed(0)
        found = context(tmp_path_factory.mktemp("shared"), task=Noise(inputs=INPUTS))
        return config.apply(Heads().eval(), found)

    return lambda config: once(config.label())


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.label())
def test_they_are_stored_once_by_every_method(
    config: Quantization, quantized: Callable[[Quantization], QuantizedModel]
) -> None:
    made = quantized(config)
    names = [layer.name for layer in made.layers()]
    assert names == ["stem.weight", "narrow.weight", *["head.weight"] * 2, *["line.weight"] * 2, "last.weight"]
    assert stored_bits(made.graph) == dict.fromkeys(names, 4)
    assert simulation(made)(INPUTS).isfinite().all()


@pytest.mark.parametrize("config", [METHODS[0], METHODS[3]], ids=lambda config: config.label())
@pytest.mark.parametrize("engine", [Inductor, OnnxRuntime, None], ids=["inductor", "ort", "cuda"])
def test_engines_run_them_on_integers(
    config: Quantization,
    engine: type[EngineConfig] | None,
    quantized: Callable[[Quantization], QuantizedModel],
    tmp_path: Path,
    device: str,
) -> None:
    model = quantized(config)
    expected = IntegerInterpreter(model.graph)(INPUTS)
    step = expected.abs().max().item() / 100
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        chain = Chain(model, 8, device, {}, products=torch.float32)
        torch.testing.assert_close(chain(INPUTS[:8].to(device)).cpu(), expected[:8], atol=1e-5, rtol=1e-5)
        assert chain.plan.macs[0] == chain.plan.macs[1]
        return
    (artifact := tmp_path / "artifact").mkdir()
    settings = engine(batch_size=len(INPUTS))
    settings.lower(model, artifact, context(tmp_path, task=Noise(inputs=INPUTS)).store)
    runner = settings.load(artifact)
    torch.testing.assert_close(runner(INPUTS), expected, atol=step, rtol=0)
    assert settings.integer_macs(artifact, runner, INPUTS) == len(INPUTS) * work(model)["macs"]


class Levels(nn.Module):
    """One convolution, and a norm of its own for each level: folded it is two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head, self.norms = (
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]),
        )
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.stem(x).relu()
        levels = zip(self.norms, (wide, self.down(wide).relu()), strict=True)
        found: Tensor = self.last(torch.cat([norm(self.head(each)).relu().mean((2, 3)) for norm, each in levels], 1))
        return found


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ()], ids=lambda rounding: rounding.method)
def test_a_training_begins_near_the_model_whatever_norms_follow(rounding: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Levels()
    with torch.no_grad():
        model.down.weight.mul_(8)
        for norm in model.norms:
            norm.momentum = None
        model.train()(INPUTS)
        wanted = model.eval()(INPUTS)
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    config = LSQ(weight_bits=4, rounding=rounding)
    live = prepared(config, model, found)
    if (ptq := config.starts_from()) is not None:
        begin_rounded(live.graph, ptq, model, found)
    start(live.graph, 2, INPUTS)
    with torch.no_grad():
        assert (live.graph(INPUTS) - wanted).norm() < 0.15 * wanted.norm()


class Tower(nn.Module):
    """Two views through one tower with its norm, as siamese networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.both, self.after = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([self.tower(x).mean((2, 3)), self.tower(x.flip(3)).mean((2, 3))], 1)
        found: Tensor = self.last(self.after(self.both(views)).relu())
        return found


@pytest.mark.parametrize(
    "config", [*METHODS[:4], LSQ(weight_bits=4, rounding=GPTQ())], ids=lambda config: config.label()
)
def test_a_layer_and_its_norm_that_are_called_again_are_one(config: Quantization, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tower()
    with torch.no_grad():
        wanted = model.eval()(INPUTS)
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    made = config.apply(model, found)
    names = ["tower.0.weight", "tower.0.weight", "both.weight", "last.weight"]
    assert [layer.name for layer in made.layers()] == names
    assert stored_bits(made.graph) == dict.fromkeys(names, 4)
    (saved := tmp_path / "saved").mkdir()
    save(made, saved)
    assert torch.equal(simulation(load(saved))(INPUTS), simulation(made)(INPUTS))
    if not isinstance(config, Trained):
        assert (simulation(made)(INPUTS) - wanted).norm() < 0.2 * wanted.norm()


def test_its_training_sees_what_is_shipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, found = Tower(), context(tmp_path, task=Noise(inputs=INPUTS))
    model.train()(INPUTS)
    live = prepared(LSQ(weight_bits=3, activation_bits=None), model.eval(), found)
    start(live.graph, 2, None)
    (saved := tmp_path / "saved").mkdir()
    with torch.no_grad():
        seen = live.graph(INPUTS)
        save(convert(finished(live)), saved)
        torch.testing.assert_close(simulation(load(saved))(INPUTS), seen, atol=1e-5, rtol=0)


def tied() -> nn.Module:
    """Two convolutions with one weight, and a table that is the last layer's."""
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 10)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)


@pytest.mark.parametrize("config", [QAT(epochs=4, learning_rate=0.1), LSQ(epochs=4)], ids=lambda config: config.label())
def test_zeros_of_tied_weights_stay(config: Quantization, tmp_path: Path) -> None:
    model = tied()
    zero_smallest(model, 0.5)
    gone = model.get_parameter("0.weight") == 0
    assert gone.any()
    made = config.apply(model.eval(), context(tmp_path, task=Noise(inputs=INPUTS)))
    for layer in made.layers()[:2]:
        assert (layer.weight[gone] == 0).all()


def test_a_layer_that_is_tied_to_a_table_is_pruned() -> None:
    table, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, head)
    assert weight_names(model) == ["0.weight"]
    zero_smallest(model, 0.5)
    assert int((head.weight == 0).sum()) == 80


def test_bytes_of_a_shared_weight_count_once_in_a_budget(tmp_path: Path) -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(192, 64), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1))
            for _ in range(6):
                x = x + 0.01 * self.block(x).relu()
            return self.last(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    config = Mixed(average_bits=4, sensitivity="output_error")
    made = config.apply(Looped().eval(), context(tmp_path, task=Noise(inputs=INPUTS)))
    sizes = {layer.name: layer.weight.numel() for layer in made.layers()}
    assert sum(sizes[name] * bits for name, bits in made.layer_bits().items()) <= 4 * sum(sizes.values())
