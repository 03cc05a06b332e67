"""Recurrent layers: weights of few bits where they are gated, arithmetic in floating point, on every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import made, shared
from torch import Tensor, nn

from qsweep.engines.base import EngineConfig
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import Refused
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel, stored_bits
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.measure.files import file_sizes
from qsweep.measure.sizes import work
from qsweep.quantize.base import Quantization
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.mixed import Mixed
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.stage import Context
from qsweep.store import Store

STEPS = 6
INPUTS = torch.randn(40, 8, STEPS, generator=torch.Generator().manual_seed(0))


class Spoken(nn.Module):
    """Sound: convolutions, two layers in both directions, the mean of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.heard = nn.LSTM(16, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.heard(self.conv(x).relu().transpose(1, 2))
        found: Tensor = self.last(outputs.mean(1))
        return found


class Gated(nn.Module):
    """The last state decides; steps come first, and the first state is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.last = nn.GRU(8, 40), nn.Linear(40, 10)
        self.first = nn.Parameter(torch.randn(1, 1, 40))

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.heard(x.permute(2, 0, 1), self.first.expand(-1, x.shape[0], -1).contiguous())
        found: Tensor = self.last(state[-1])
        return found


class Simple(nn.Module):
    """Plain recurrences, one with tanh, one with ReLU; an LSTM that runs twice; its last state and its cell."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.RNN(8, 12, batch_first=True)
        self.other = nn.RNN(12, 12, nonlinearity="relu", bias=False, batch_first=True)
        self.third, self.last = nn.LSTM(12, 12, batch_first=True), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.third(self.other(self.one(x.transpose(1, 2))[0])[0])
        _, (state, cell) = self.third(outputs)
        found: Tensor = self.last(torch.cat([state[0], cell[0]], 1))
        return found


KINDS: list[type[nn.Module]] = [Spoken, Gated, Simple]
MACS = {
    Spoken: STEPS * (3 * 8 * 16 + 2 * 48 * (16 + 12) + 2 * 48 * (24 + 12)) + 240,
    Gated: STEPS * 120 * (8 + 40) + 400,
    Simple: STEPS * (12 * (8 + 12) + 12 * 24 + 2 * 48 * 24) + 240,
}
ENGINES = [Inductor, OnnxRuntime, None]


def found_in(kind: type[nn.Module]) -> Context:
    return shared(f"recurrent {kind.__name__}", INPUTS)


def quantized(kind: type[nn.Module], config: Quantization) -> QuantizedModel:
    return config.apply(made(kind), found_in(kind))


def run(engine: EngineConfig, model: QuantizedModel, folder: Path) -> tuple[Tensor, float]:
    """Outputs and the size of the artifact."""
    (artifact := folder / "artifact").mkdir()
    engine.lower(model, artifact, Store(folder / "store"))
    return engine.load(artifact)(INPUTS), file_sizes(artifact)["size_bytes"]


@pytest.mark.parametrize("engine", ENGINES, ids=["inductor", "ort", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_give_what_the_reference_gives(
    kind: type[nn.Module], engine: type[EngineConfig] | None, tmp_path: Path, device: str
) -> None:
    model = quantized(kind, PTQ(calibration_samples=40))
    expected = IntegerInterpreter(model.graph)(INPUTS)
    with torch.no_grad():
        assert (expected - made(kind)(INPUTS)).std() < 0.03 * expected.std()
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        chain = Chain(model, len(INPUTS), device, {}, products=torch.float32)
        found = chain(INPUTS.to(device)).cpu()
        assert chain.plan.macs[1] == len(INPUTS) * MACS[kind]
    else:
        found, _ = run(engine(batch_size=40), model, tmp_path)
    torch.testing.assert_close(found, expected, atol=0.02 * expected.std().item(), rtol=0)


@pytest.mark.parametrize("engine", [Float, OnnxRuntime])
@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_the_model(kind: type[nn.Module], engine: type[EngineConfig], tmp_path: Path) -> None:
    live = float_graph(made(kind), found_in(kind))
    assert live.macs == work(live)["macs"] == MACS[kind]
    wanted = made(kind)(INPUTS).detach()
    found, _ = run(engine(batch_size=40), live, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    for dtype in ("bf16", "fp16"):
        torch.testing.assert_close(simulation(live.cast_to(dtype))(INPUTS), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        PTQ(weight_bits=4),
        PTQ(weight_bits=4, group_size=4, activation_bits=None),
        QAT(weight_bits=4),
        LSQ(weight_bits=4),
    ],
    ids=lambda config: config.label(),
)
@pytest.mark.parametrize("kind", KINDS)
def test_their_weights_have_the_bits_of_the_method(kind: type[nn.Module], config: Quantization, tmp_path: Path) -> None:
    model = quantized(kind, config)
    weights = {name for name, value in made(kind).named_parameters() if value.dim() == 2 or "conv.weight" in name}
    weights -= {name for name in weights if name.startswith(("one.", "other."))}
    assert stored_bits(model.graph) == model.layer_bits() == dict.fromkeys(weights, 4)
    (saved := tmp_path / "saved").mkdir()
    save(model, saved)
    assert torch.equal(simulation(load(saved))(INPUTS), simulation(model)(INPUTS))


@pytest.mark.parametrize(
    "config", [PTQ(weight_bits=4, layer_bits={"heard.*": 8}), Mixed(average_bits=4, layer_bits={"heard.*": 8})], ids=str
)
def test_their_bits_may_be_named(config: Quantization) -> None:
    bits = quantized(Spoken, config).layer_bits()
    heard = {name: found for name, found in bits.items() if name.startswith("heard.")}
    assert len(heard) > 1
    assert set(heard.values()) == {8}
    assert set(bits.values()) - {8}


def test_they_may_stay_in_floating_point(tmp_path: Path) -> None:
    model = quantized(Spoken, PTQ(weight_bits=4, float_layers=("heard.*",)))
    assert model.layer_bits()
    assert not any(name.startswith("heard.") for name in stored_bits(model.graph))
    found, _ = run(OnnxRuntime(batch_size=40), model, tmp_path)
    torch.testing.assert_close(found, IntegerInterpreter(model.graph)(INPUTS), atol=1e-3, rtol=0)


def test_a_pattern_that_matches_none_is_told_their_names() -> None:
    with pytest.raises(Refused, match=r"`heart.\*` must match the weight of a layer \(there are: .*heard.weight_ih_l0"):
        quantized(Spoken, PTQ(float_layers=("heart.*",)))


def test_tables_of_values_take_them_too(tmp_path: Path) -> None:
    model = quantized(Spoken, Codebook(weight_bits=8))
    with torch.no_grad():
        torch.testing.assert_close(simulation(model)(INPUTS), made(Spoken)(INPUTS), atol=0.02, rtol=0)


class Wide(Spoken):
    """Too wide for the exporter to compute with its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.last = nn.LSTM(16, 64, batch_first=True, bidirectional=True), nn.Linear(128, 10)


@pytest.mark.parametrize(("kind", "rest"), [(Spoken, 16_000), (Wide, 12_000)])
def test_onnx_has_them_as_integers_and_computes_with_real_ones(
    kind: type[nn.Module], rest: int, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    from qsweep.engines._onnx import complete

    model = quantized(kind, PTQ(calibration_samples=40))
    found, size = run(OnnxRuntime(batch_size=40), model, tmp_path)
    torch.testing.assert_close(found, IntegerInterpreter(model.graph)(INPUTS), atol=1e-3, rtol=0)
    assert size < work(model)["size_theoretical_bytes"] + rest
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(complete(tmp_path / "artifact").SerializeToString(), options)
    content = onnx.load(options.optimized_model_filepath)
    constants = {tensor.name for tensor in content.graph.initializer}
    layers = [node for node in content.graph.node if node.op_type == "LSTM"]
    assert layers
    assert all(node.input[1] in constants and node.input[2] in constants for node in layers)


@pytest.mark.parametrize("kind", [Spoken, Gated])
def test_pytorch_alone_runs_an_exported_one(kind: type[nn.Module], tmp_path: Path) -> None:
    model = quantized(kind, PTQ(calibration_samples=40))
    (artifact := tmp_path / "artifact").mkdir()
    Inductor(batch_size=40).lower(model, artifact, Store(tmp_path / "store"))
    Inductor(batch_size=40).export(artifact, tmp_path)
    found = torch.export.load(tmp_path / "model.pt2").module()(INPUTS[:3])
    torch.testing.assert_close(found, simulation(model)(INPUTS[:3]), atol=1e-4, rtol=0)
