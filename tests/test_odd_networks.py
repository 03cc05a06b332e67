"""Networks with ops that runtimes, exporters and compilers take for something else: all engines give the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, assert_close, context, shared
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import ExportFailure, Refused
from qsweep.hub.export import export, float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import NORMS
from qsweep.hub.nodes import nodes_of
from qsweep.hub.simulate import simulation
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.store import Store

INPUTS = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, then what is odd, then a linear of what it gives."""

    def __init__(self, odd: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.odd, self.layers = odd, nn.ModuleList(layers)
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        with torch.no_grad():
            self.head = nn.Linear(self._before(INPUTS[:2]).shape[1], 4)

    def _before(self, x: Tensor) -> Tensor:
        return self.odd(F.relu(self.stem(x)), *self.layers).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self._before(x))
        return logits


class Positions(nn.Module):
    """A bias that layers make of a table alone, as Swin V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wide, self.narrow = nn.Parameter(torch.randn(64, 2)), nn.Linear(2, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.narrow(F.relu(self.wide(self.table))).t().reshape(1, 8, 8, 8)
        return x + bias


def norm(count: int) -> nn.BatchNorm2d:
    found = nn.BatchNorm2d(count)
    for value in (found.running_mean, found.running_var, found.weight, found.bias):
        assert value is not None
        nn.init.uniform_(value, 0.5, 2.0)
    return found


ODD: dict[str, tuple[Callable[..., Tensor], Callable[[], list[nn.Module]]]] = {
    "view of an image": (lambda x: x.view(x.size(0), -1), list),
    "view as another": (lambda x: x.reshape(-1, 8, 64).view_as(x), list),
    "max pool, ceil": (lambda x, conv: conv(F.max_pool2d(x, 3, 2, ceil_mode=True)), lambda: [nn.Conv2d(8, 8, 3)]),
    "transposed and normed": (
        lambda x, up, bn, conv: conv(F.relu(bn(up(x)))),
        lambda: [nn.ConvTranspose2d(8, 8, 2, 2), norm(8), nn.Conv2d(8, 4, 3, 2)],
    ),
    "transposed, in groups": (
        lambda x, up, bn, conv: conv(F.relu(bn(up(x)))),
        lambda: [nn.ConvTranspose2d(8, 6, 3, 2, groups=2), norm(6), nn.Conv2d(6, 4, 3, 2)],
    ),
    "normed twice": (
        lambda x, conv, one, other, last: last(F.relu(other(one(conv(x))))),
        lambda: [nn.Conv2d(8, 6, 3), norm(6), norm(6), nn.Conv2d(6, 4, 3)],
    ),
    "transposed and scaled": (
        lambda x, up: up(x) * torch.linspace(0.5, 2, 8).reshape(1, 8, 1, 1),
        lambda: [nn.ConvTranspose2d(8, 8, 2, 2)],
    ),
    "nearest pixels": (
        lambda x, conv, last: last(torch.cat([x, F.interpolate(conv(x), x.shape[2:])], 1)),
        lambda: [nn.Conv2d(8, 4, 3, 2, 1), nn.Conv2d(12, 4, 3)],
    ),
    "times the sigmoid of a square": (
        lambda x, conv, last: last((y := conv(x)) * torch.sigmoid(y * y)),
        lambda: [nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3)],
    ),
    "channels times numbers": (
        lambda x, scale, last: last(F.relu(scale(x))),
        lambda: [nn.Conv2d(8, 8, 1, groups=8, bias=False), nn.Conv2d(8, 4, 3)],
    ),
    "groups of 24 channels": (
        lambda x, wide, groups: groups(wide(x)),
        lambda: [nn.Conv2d(8, 48, 1), nn.Conv2d(48, 96, 3, padding=1, groups=2)],
    ),
    "sixteen steps at once": (
        lambda x, wide, steps: steps(steps(wide(x.flatten(2)))),
        lambda: [nn.Conv1d(8, 16, 1), nn.Conv1d(16, 16, 16, padding=8)],
    ),
    "shuffled pixels": (lambda x, conv: conv(F.pixel_shuffle(x, 2)), lambda: [nn.Conv2d(2, 4, 3)]),
    "layers of constants": (lambda x, made: made(x), lambda: [Positions()]),
    "mean of rank 3": (lambda x: x[:, 0].mean((-2, -1), keepdim=True).flatten(1) + x[:, 1].mean(2), list),
    "mean of rank 5": (lambda x: x.reshape(-1, 2, 4, 8, 8).mean((2, 3), keepdim=True), list),
    "means and deviations": (
        lambda x, conv: torch.cat([(y := conv(x)).mean((2, 3)), y.std((2, 3))], 1),
        lambda: [nn.Conv2d(8, 8, 3)],
    ),
    "average pool, ceil": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), list),
    "average pool, ceil and padding": (lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 0), ceil_mode=True), list),
    "clamped above": (lambda x, conv: conv(x).clamp(max=0.3), lambda: [nn.Conv2d(8, 8, 3)]),
    "clamped below": (lambda x, conv: conv(x).clamp(min=-0.2), lambda: [nn.Conv2d(8, 8, 3)]),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    odd, layers = ODD[name]
    return Net(odd, *layers()).eval()


def outputs(engine: EngineConfig, model: QuantizedModel, folder: Path, inputs: Tensor = INPUTS) -> Tensor:
    (folder / engine.engine).mkdir()
    engine.lower(model, folder / engine.engine, Store(folder / "store"))
    return engine.load(folder / engine.engine)(inputs)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("engine", [Inductor, OnnxRuntime], ids=lambda engine: engine.__name__)
def test_integers_are_those_of_the_reference(name: str, engine: type[EngineConfig], tmp_path: Path) -> None:
    model = PTQ(calibration_samples=20).apply(made(name), shared(name, INPUTS))
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    given = outputs(engine(batch_size=20), model, tmp_path)
    torch.testing.assert_close(given, wanted, atol=0.02 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "engine", [Float(batch_size=20), Float(batch_size=20, compile=False), OnnxRuntime(batch_size=20)], ids=str
)
def test_float_baselines_are_the_model(name: str, engine: EngineConfig, tmp_path: Path) -> None:
    model = made(name)
    live = float_graph(model, shared(name, INPUTS))
    torch.testing.assert_close(outputs(engine, live, tmp_path), model(INPUTS).detach(), atol=1e-4, rtol=1e-4)


def test_factors_behind_transposed_convolutions_stay_in_the_first_compilation_of_a_process(tmp_path: Path) -> None:
    found, folder = shared("transposed and scaled", INPUTS), tmp_path / "artifact"
    model = PTQ(calibration_samples=20).apply(made("transposed and scaled"), found)
    folder.mkdir()
    Inductor(batch_size=20).lower(model, folder, found.store)
    torch.save(INPUTS, tmp_path / "inputs")
    load = f"Inductor(batch_size=20).load(Path({str(folder)!r}))(torch.load('inputs'))"
    imports = "from pathlib import Path; import torch; from qsweep.engines.inductor import Inductor"
    code = f"{imports}; torch.save({load}, 'given')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    torch.testing.assert_close(torch.load(tmp_path / "given"), wanted, atol=0.02 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("sizes", [(64, 16, 1), (16, 16, 4), (64, 8, 1)], ids=str)
def test_one_sample_runs_on_integers_in_inductor(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second, last = sizes
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, first), nn.ReLU(), nn.Linear(first, second), nn.Linear(second, last)
    )
    found, engine = context(tmp_path, "odd", task=Noise(inputs=INPUTS)), Inductor(batch_size=1)
    quantized = PTQ(calibration_samples=20).apply(model.eval(), found)
    given = outputs(engine, quantized, tmp_path, INPUTS[:1])
    torch.testing.assert_close(given, IntegerInterpreter(quantized.graph)(INPUTS[:1]), atol=1e-4, rtol=1e-4)
    assert engine.integer_macs(tmp_path / "inductor", engine.load(tmp_path / "inductor"), INPUTS[:1]) == quantized.macs


WRITES: list[Callable[[Tensor], Any]] = [
    lambda x: x.squeeze(1),
    lambda x: x.unflatten(2, (2, 4)),
    lambda x: x.movedim(1, 2),
    lambda x: x.expand_as(x),
    lambda x: x.ravel(),
]


@pytest.mark.parametrize("view", WRITES)
def test_a_write_through_a_view_that_is_no_slice_is_refused(view: Callable[[Tensor], Tensor]) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            view(x).add_(1)
            return x

    with pytest.raises(ExportFailure, match="writes into a tensor that is read elsewhere"):
        export(Writes().eval(), INPUTS[:2])


@pytest.mark.parametrize("bits", [None, 8])
def test_a_norm_of_a_norm_is_trained_and_shipped_as_one(bits: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), norm(6), norm(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 10)
    found = context(tmp_path, "odd", task=Noise(inputs=INPUTS))
    live = QAT(activation_bits=bits, weight_granularity="tensor", calibration_samples=20).apply(
        nn.Sequential(*layers), found
    )
    assert not nodes_of(live.graph, NORMS)
    given, wanted = outputs(OnnxRuntime(batch_size=20), live, tmp_path), simulation(live)(INPUTS).detach()
    assert_close(given, wanted)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's exporter
def test_a_norm_that_onnx_takes_into_weights_is_refused(tmp_path: Path) -> None:
    live = export(nn.Sequential(nn.Conv2d(1, 6, 3), norm(6)).eval(), INPUTS[:2])
    with pytest.raises(Refused, match=r"computes with `0\.weight` beforehand"):
        OnnxRuntime(batch_size=20).lower(live, tmp_path, Store(tmp_path / "store"))


def test_a_divisor_that_onnx_does_not_have_is_refused(tmp_path: Path) -> None:
    found = context(tmp_path, "odd", task=Noise(inputs=INPUTS))
    model = Net(lambda x: F.avg_pool2d(x, 2, divisor_override=3)).eval()
    with pytest.raises(Refused, match="divisor_override"):
        OnnxRuntime(batch_size=20).lower(PTQ(calibration_samples=20).apply(model, found), tmp_path, found.store)
