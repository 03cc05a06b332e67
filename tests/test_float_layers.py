"""Layers that stay in floating point: `float_layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, context, made, network, shared
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines.executorch import ExecuTorch
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel, stored_bits
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import QUANTIZE
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.simulate import simulation
from qsweep.quantize.base import Quantization
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.mixed import Mixed
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT

WAVES = torch.randn(24, 1, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 24)[:, None, None]
"""Sounds, the quietest a hundredth as loud as the loudest."""


class Spectrum(nn.Module):
    """Energy by frequency, of which the logarithm is taken: over a range that 8 bits do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cosines, self.sines = (nn.Conv1d(1, 16, 32, stride=16, bias=False) for _ in range(2))
        self.bands = nn.Linear(16, 8, bias=False)
        nn.init.uniform_(self.bands.weight)

    def forward(self, x: Tensor) -> Tensor:
        energy = self.cosines(x).pow(2) + self.sines(x).pow(2)
        return (self.bands(energy.transpose(1, 2)) + 1e-6).log().transpose(1, 2)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = Spectrum()
        self.body = nn.Sequential(
            nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(self.front(x)).mean(2))
        return found


class Residual(nn.Module):
    """Blocks with norms, one of whose layers is to stay as it is: at the start, within, at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = F.relu(self.second(self.one(x)) + x)
        x = F.relu(self.third(self.other(x)) + x)
        found: Tensor = self.head(x.mean((2, 3)))
        return found


NOISE = Noise(24).inputs
PLACES = ["stem.weight", "one.weight", "other.weight", "head.weight"]


def residual(*floats: str, config: type[PTQ | QAT | LSQ] = PTQ, **fields: Any) -> QuantizedModel:
    chosen = config.model_validate({"float_layers": list(floats), "calibration_samples": 24} | fields)
    return chosen.apply(made(Residual), shared("residual of noise", NOISE))


def keywords(**fields: Any) -> QuantizedModel:
    config = PTQ.model_validate({"calibration_samples": 24} | fields)
    return config.apply(made(Keywords), shared("keywords of waves", WAVES))


def test_a_spectrum_in_the_model_is_kept() -> None:
    wanted = made(Keywords)(WAVES)
    errors = [
        ((simulation(keywords(**fields))(WAVES) - wanted).std() / wanted.std()).item()
        for fields in ({}, {"float_layers": ["front.*"]})
    ]
    assert errors[1] < 0.03
    assert errors[0] > 5 * errors[1]


def test_nothing_of_it_is_on_a_grid() -> None:
    model = keywords(float_layers=["front.*"])
    assert set(stored_bits(model.graph)) == {"body.0.weight", "body.3.weight", "head.weight"}
    first, *_ = nodes_of(model.graph, {QUANTIZE})
    assert source(first).target in (torch.ops.aten.transpose.int, torch.ops.aten.log.default)


@pytest.mark.parametrize("name", PLACES)
def test_all_other_layers_are_quantized(name: str) -> None:
    model = residual(name)
    assert set(stored_bits(model.graph)) == set(PLACES) - {name}
    assert model.layer_bits() == {other: 8 for other in PLACES if other != name} | {name: 32}


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *((engine, name) for engine in (Reference, OnnxRuntime, "openvino", "cuda") for name in PLACES),
        *((engine, name) for engine in (Inductor, ExecuTorch) for name in ("one.weight", "head.weight")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_engine_runs_it_beside_integers(
    engine: type[EngineConfig] | str, name: str, tmp_path: Path, device: str
) -> None:
    model = residual(name)
    wanted = simulation(model)(NOISE)
    if engine == "cuda":
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        found = Chain(model, len(NOISE), device, {}, products=torch.float32)(NOISE.to(device)).cpu()
    else:
        config = engine_of(engine)
        if (reason := config.available()) is not None:
            pytest.skip(reason)
        (artifact := tmp_path / "artifact").mkdir()
        config.lower(model, artifact, shared("residual of noise", NOISE).store)
        run = config.load(artifact)
        found = run(NOISE).clone()
        share = config.integer_macs(artifact, run, NOISE) / (len(NOISE) * model.macs)
        left = sum(layer.macs for layer in model.layers() if layer.name == name) / model.macs
        assert share <= 1 - left + 1e-6
    torch.testing.assert_close(found, wanted, atol=0.05 * wanted.std().item(), rtol=0)


def engine_of(kind: type[EngineConfig] | str) -> EngineConfig:
    if not isinstance(kind, str):
        return kind(batch_size=len(NOISE))
    from qsweep.engines.openvino import OpenVINO

    return OpenVINO(batch_size=len(NOISE))


@pytest.mark.parametrize("config", [QAT, LSQ], ids=lambda config: config.__name__)
@pytest.mark.parametrize("name", PLACES)
def test_trainings_train_them_as_they_are(name: str, config: type[QAT | LSQ], tmp_path: Path) -> None:
    model = residual(name, config=config, epochs=1, learning_rate=1e-3)
    assert set(stored_bits(model.graph)) == set(PLACES) - {name}
    assert not [node for node in model.graph.graph.nodes if "batch_norm" in str(node.target)]
    assert torch.isfinite(IntegerInterpreter(model.graph)(NOISE)).all()
    (artifact := tmp_path / "artifact").mkdir()
    engine = OnnxRuntime(batch_size=len(NOISE))
    engine.lower(model, artifact, shared("residual of noise", NOISE).store)
    wanted = simulation(model)(NOISE)
    torch.testing.assert_close(engine.load(artifact)(NOISE), wanted, atol=0.05 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        PTQ(activation_bits=None, weight_bits=4, float_layers=("one.*", "head.*")),
        PTQ(activation_mode="token", float_layers=("one.*", "head.*")),
        PTQ(rounding={"method": "gptq"}, weight_bits=4, float_layers=("one.*", "head.*")),
        PTQ(bias_correction=True, equalize=True, float_layers=("one.*", "head.*")),
        Codebook(float_layers=("one.*", "head.*")),
        Mixed(average_bits=4, float_layers=("one.*", "head.*")),
    ],
    ids=lambda config: config.label(),
)
def test_every_method_leaves_them(config: Quantization) -> None:
    model = config.apply(made(Residual), shared("residual of noise", NOISE))
    assert set(stored_bits(model.graph)) == {"stem.weight", "other.weight"}


def test_ranges_of_a_network_do_not_serve_one_that_is_float_in_part(tmp_path: Path) -> None:
    both, alone = (context(tmp_path / name, task=Noise(inputs=WAVES)) for name in ("both", "alone"))
    PTQ(calibration_samples=24).apply(made(Keywords), both)
    config = PTQ(calibration_samples=24, float_layers=("front.*",))
    after, first = (config.apply(made(Keywords), found) for found in (both, alone))
    assert torch.equal(simulation(after)(WAVES), simulation(first)(WAVES))


def test_the_order_of_patterns_does_not_count_and_the_label_tells_their_number() -> None:
    one, other = PTQ(float_layers=("a.*", "b.*")), PTQ(float_layers=("b.*", "a.*", "b.*"))
    assert one.uid() == other.uid() != PTQ().uid()
    assert one.label() == "ptq-w8s-a8a-float2"


@pytest.mark.parametrize(
    ("patterns", "said"),
    [(("front.*",), "`float_layers`: `front.*` must match the weight of a layer"), (("*",), "it matches all")],
)
def test_patterns_that_match_no_layer_or_every_one_are_refused(patterns: tuple[str, ...], said: str) -> None:
    with pytest.raises(Refused) as refusal:
        PTQ(float_layers=patterns).apply(network("mlp"), shared("mlp of noise", NOISE))
    assert said in str(refusal.value)
