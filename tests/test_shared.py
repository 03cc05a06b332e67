"""Weights that several layers read: rounded once, stored once, on every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Noise, context
from torch import Tensor, nn

from qsweep.engines.base import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.hub.form import QuantizedModel, stored_bits
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.simulate import simulation
from qsweep.measure.sizes import work
from qsweep.quantize.base import Quantization
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.quantize.rounding import AdaRound


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


def quantized(config: Quantization, folder: Path) -> QuantizedModel:
    torch.manual_seed(0)
    return config.apply(Heads().eval(), context(folder, task=Noise(inputs=INPUTS)))


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.label())
def test_they_are_stored_once_by_every_method(config: Quantization, tmp_path: Path) -> None:
    made = quantized(config, tmp_path)
    names = [layer.name for layer in made.layers()]
    assert names == ["stem.weight", "narrow.weight", *["head.weight"] * 2, *["line.weight"] * 2, "last.weight"]
    assert stored_bits(made.graph) == dict.fromkeys(names, 4)
    assert simulation(made)(INPUTS).isfinite().all()


@pytest.mark.parametrize("config", [METHODS[0], METHODS[3]], ids=lambda config: config.label())
@pytest.mark.parametrize("engine", [Inductor, OnnxRuntime, None], ids=["inductor", "ort", "cuda"])
def test_engines_run_them_on_integers(
    config: Quantization, engine: type[EngineConfig] | None, tmp_path: Path, device: str
) -> None:
    model = quantized(config, tmp_path)
    expected = IntegerInterpreter(model.graph)(INPUTS)
    step = expected.abs().max().item() / 100
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        chain = Chain(model, len(INPUTS), device, {}, products=torch.float32)
        torch.testing.assert_close(chain(INPUTS.to(device)).cpu(), expected, atol=1e-5, rtol=1e-5)
        assert chain.plan.macs[0] == chain.plan.macs[1]
        return
    (artifact := tmp_path / "artifact").mkdir()
    settings = engine(batch_size=len(INPUTS))
    settings.lower(model, artifact, context(tmp_path, task=Noise(inputs=INPUTS)).store)
    runner = settings.load(artifact)
    torch.testing.assert_close(runner(INPUTS), expected, atol=step, rtol=0)
    assert settings.integer_macs(artifact, runner, INPUTS) == len(INPUTS) * work(model)["macs"]
