"""OpenVINO gives what the reference gives: to a level where it adds biases, or sums, in floating point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from chain_networks import Transformer
from layout_networks import ConvNeXt, NormedParts, Tokens, Upsampled, Windowed
from networks import NETWORKS, Noise, accuracy_lost, assert_close, context, digits, made, network, shared
from networks import lowered as lowered_by
from pydantic import TypeAdapter
from test_engines import case, onnx_tensors
from test_gates import KINDS
from test_odd_networks import INPUTS, ODD
from test_odd_networks import made as odd
from test_recurrent import INPUTS as SOUNDS
from test_recurrent import Gated, Spoken
from test_tokens import Attention
from test_words import Classifier, texts
from torch import Tensor, nn
from written_networks import WRITTEN

from qsweep.engines import Engine, EngineConfig
from qsweep.engines._onnx import complete
from qsweep.engines.openvino import OpenVINO
from qsweep.errors import BundleError, Refused
from qsweep.hub.export import float_graph
from qsweep.hub.fixed import with_computed_layers
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.simulate import simulation
from qsweep.quantize import Quantization
from qsweep.quantize.cast import Cast
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Compression

pytest.importorskip("openvino", reason="OpenVINO cannot be installed here")

from qsweep.engines._openvino_graph import core

COUNT = 50
NOISE = Noise(COUNT).inputs


def lowered(model: QuantizedModel, folder: Path, batch_size: int = COUNT) -> EngineConfig:
    engine = OpenVINO(batch_size=batch_size)
    lowered_by(engine, model, folder)
    return engine


NARROW: dict[str, dict[str, Any]] = {
    "depthwise": {"weight_bits": 2, "activation_bits": 4},
    "sequence": {"weight_bits": 3, "activation_bits": 2},
    "pools": {"weight_bits": 4, "activation_bits": 6, "activation_scheme": "symmetric"},
    "shortcut": {"activation_bits": 3, "sum_grid": "own", "edge_bits": 8},
    "digits_cnn": {"calibration": "percentile"},
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in NETWORKS), *NARROW.items()],
    ids=[*NETWORKS, *(f"{name}, {' '.join(map(str, fields.values()))}" for name, fields in NARROW.items())],
)
def test_every_layer_runs_on_integers_and_gives_what_the_reference_gives(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = PTQ.model_validate({"calibration_samples": 200} | fields).apply(network(name), shared(name, NOISE))
    engine = lowered(model, tmp_path / "artifact")
    run = engine.load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(model.graph)(NOISE), within=0.03)
    assert engine.integer_macs(tmp_path / "artifact", run, NOISE) == COUNT * model.macs


NAMED = [
    "max pool, ceil",
    "transposed, in groups",
    "nearest pixels",
    "layers of constants",
    "means and deviations",
    "average pool, ceil and padding",
    "clamped below",
    "groups of 24 channels",
    "sixteen steps at once",
]
FLOATS = {"Shifted", "Rotated", "Related", "Compared"}
"""With attention."""


@pytest.mark.parametrize("name", [*NAMED, *(kind.__name__ for kind in (*KINDS, *WRITTEN))])
def test_what_is_odd_gated_or_written_otherwise_gives_what_the_reference_gives(name: str, tmp_path: Path) -> None:
    model = odd(name) if name in ODD else made(next(kind for kind in (*KINDS, *WRITTEN) if kind.__name__ == name))
    quantized = PTQ(calibration_samples=20).apply(model, shared(name, INPUTS))
    engine = lowered(quantized, tmp_path / "artifact", len(INPUTS))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(INPUTS), IntegerInterpreter(quantized.graph)(INPUTS), within=0.03)
    work = len(INPUTS) * with_computed_layers(quantized).macs
    share = engine.integer_macs(tmp_path / "artifact", run, INPUTS) / work
    assert share < 0.95 if name in FLOATS else share == 1


@pytest.mark.parametrize(
    ("kind", "inputs", "share"),
    [
        (Tokens, INPUTS, 0.55),
        (Transformer, INPUTS, 0.93),
        (Windowed, INPUTS, 0.94),
        (ConvNeXt, INPUTS, 1.0),
        (NormedParts, INPUTS, 1.0),
        (Upsampled, INPUTS, 1.0),
        (Gated, SOUNDS, 0.01),
        (Classifier, texts(40), 0.84),
    ],
)
def test_transformers_and_recurrent_networks_run(
    kind: type[nn.Module], inputs: Tensor, share: float, tmp_path: Path
) -> None:
    model = PTQ(calibration_samples=20).apply(made(kind), shared(kind.__name__, inputs))
    engine = lowered(model, tmp_path / "artifact", len(inputs))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(inputs), IntegerInterpreter(model.graph)(inputs), within=0.02)
    found = engine.integer_macs(tmp_path / "artifact", run, inputs) / (len(inputs) * model.macs)
    assert share <= found <= 1


class Mean(nn.Module):
    """Of tokens whose channels have a factor or a summand of their own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.factor, self.summand = nn.Parameter(torch.rand(1, 1, 32) + 0.5), nn.Parameter(torch.randn(1, 1, 32))
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x.squeeze(1))
        tokens = tokens + self.second(tokens)
        tokens = tokens * self.factor if self.what == "factor" else tokens + self.summand
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["factor", "summand"])
@pytest.mark.parametrize("count", [1, 4])
def test_what_stands_before_a_mean_of_tokens_is_each_channel_s_own(what: str, count: int, tmp_path: Path) -> None:
    model = PTQ(calibration_samples=20).apply(made(lambda: Mean(what)), shared(f"mean of {what}", NOISE))
    run = lowered(model, tmp_path / "artifact", count).load(tmp_path / "artifact")
    assert_close(run(NOISE[:count]), IntegerInterpreter(model.graph)(NOISE[:count]), within=0.05)


ROWS = {"zeros": 0.0, "denormal": 1e-40, "large": 1e30}


@pytest.mark.parametrize("count", [1, 3, 8, 9, COUNT])
@pytest.mark.parametrize(("name", "bits"), [("mlp", 8), ("mlp", 3), ("digits_cnn", 8)])
def test_rows_that_set_their_grids_give_what_the_reference_gives(
    name: str, bits: int, count: int, tmp_path: Path
) -> None:
    model = PTQ(activation_mode="token", activation_bits=bits).apply(network(name), shared(name, NOISE))
    inputs = torch.cat([NOISE, *(factor * NOISE[:1] for factor in ROWS.values())])[-count:]
    engine = lowered(model, tmp_path / "artifact", count)
    run, reference = engine.load(tmp_path / "artifact"), IntegerInterpreter(model.graph)
    torch.testing.assert_close(run(inputs), reference(inputs), atol=1e-5, rtol=1e-5)
    assert engine.integer_macs(tmp_path / "artifact", run, inputs) == reference.integer_macs > 0


@pytest.mark.parametrize("kind", [Attention, Tokens])
def test_every_linear_of_a_transformer_multiplies_the_integers_of_tokens(kind: type[nn.Module], tmp_path: Path) -> None:
    model = PTQ(activation_mode="token").apply(made(kind), shared(kind.__name__, NOISE))
    engine = lowered(model, tmp_path / "artifact")
    run, reference = engine.load(tmp_path / "artifact"), IntegerInterpreter(model.graph)
    torch.testing.assert_close(run(NOISE), reference(NOISE), atol=1e-4, rtol=0)
    assert engine.integer_macs(tmp_path / "artifact", run, NOISE) == reference.integer_macs > 0


def test_a_token_that_is_not_finite_touches_no_other(tmp_path: Path) -> None:
    model = PTQ(activation_mode="token").apply(network("mlp"), shared("mlp", NOISE))
    run = lowered(model, tmp_path / "artifact").load(tmp_path / "artifact")
    broken = NOISE.clone()
    broken[1, 0, 0, 3] = torch.nan
    torch.testing.assert_close(run(broken)[[0, 2]], IntegerInterpreter(model.graph)(NOISE)[[0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Gated, Spoken])
@pytest.mark.parametrize("bits", [4, 8])
def test_recurrent_layers_run_with_their_weights_alone_quantized(
    kind: type[nn.Module], bits: int, tmp_path: Path
) -> None:
    config = PTQ(activation_bits=None, weight_bits=bits)
    model = config.apply(made(kind), shared(kind.__name__, SOUNDS))
    engine = lowered(model, tmp_path / "artifact", len(SOUNDS))
    found = engine.load(tmp_path / "artifact")(SOUNDS)
    assert_close(found, simulation(model)(SOUNDS), within=1e-3)
    (tmp_path / "out").mkdir()
    engine.export(tmp_path / "artifact", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["CPU"]
    shipped = core().compile_model(tmp_path / "out" / "model.xml", "CPU", settings)
    assert_close(torch.from_numpy(shipped(SOUNDS.numpy())[0]), found, within=1e-3)


def layers(content: onnx.ModelProto, tensors: dict[str, Tensor]) -> Iterator[tuple[str, onnx.ModelProto, list[str]]]:
    """What gives each of the quantized `tensors` from those before it, by its name, and their names."""
    for name, value in tensors.items():
        content.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, value.shape))
    for end in list(tensors)[1:]:
        given = [name for name in tensors if name != end]
        for _ in range(2):  # the first time to see what it reads
            piece = onnx.utils.Extractor(content).extract_model(given, [end])
            given = [name for name in given if any(name in node.input for node in piece.graph.node)]
        yield end, piece, given


@pytest.mark.parametrize("fields", [{}, {"activation_bits": 4, "sum_grid": "own"}], ids=["a8", "a4 own sums"])
def test_integers_are_those_of_onnxruntime_layer_by_layer(fields: dict[str, Any], tmp_path: Path) -> None:
    found = case("digits", tmp_path, **fields)
    lowered(found.model, tmp_path / "artifact", len(found.inputs))
    tensors = onnx_tensors(tmp_path / "artifact", found.inputs)
    wrong = total = 0
    for end, piece, given in layers(complete(tmp_path / "artifact"), tensors):
        model = core().read_model(piece.SerializeToString())
        run = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        (levels,) = run({name: tensors[name].to(torch.uint8).numpy() for name in given}).values()
        difference = (torch.from_numpy(levels).int() - tensors[end]).abs()
        assert difference.max() <= 1
        wrong, total = wrong + int((difference > 0).sum()), total + difference.numel()
    assert wrong / total <= 1e-4


def test_bf16_and_float32_are_the_model(tmp_path: Path) -> None:
    model, found, _ = digits()
    inputs = found.task.transform(found.task.samples("validation").inputs)
    with torch.no_grad():
        wanted = model(inputs)
    for name, graph, within in (("fp32", float_graph(model, found), 1e-5), ("bf16", Cast().apply(model, found), 0.05)):
        engine = lowered(graph, tmp_path / name, len(inputs))
        run = engine.load(tmp_path / name)
        assert_close(run(inputs), wanted, within)
        assert engine.integer_macs(tmp_path / name, run, inputs) == 0
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("bf16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


class Whole(nn.Module):
    def forward(self, numbers: Tensor) -> Tensor:
        return numbers.long()


class Words(nn.Module):
    """Numbers of words beside a mask, (N, 2, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5000, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        words, mask = x[:, 0].long(), x[:, 1].long()
        first = torch.zeros(x.shape[0], 1, 16)
        logits: Tensor = self.head(torch.cat([first, self.table(words) * mask[..., None]], 1).mean(1))
        return logits


class Between(nn.Module):
    """A table read between its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        row = x.long()
        part = (x - row)[..., None]
        logits: Tensor = self.head((self.table(row) * (1 - part) + self.table(row + 1) * part).mean(1))
        return logits


@pytest.mark.parametrize("built", [Words, Between])
def test_what_becomes_integers_alone_stays_whole_in_bf16(built: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = built().eval()
    words = torch.stack([torch.randint(0, 5000, (COUNT, 6)), torch.randint(0, 2, (COUNT, 6))], 1).float()
    inputs = words if built is Words else 4 * torch.rand(COUNT, 6)
    with torch.no_grad():
        wanted = model(inputs)
    graph = Cast().apply(model, context(tmp_path, task=Noise(inputs=inputs)))
    run = lowered(graph, tmp_path / "bf16").load(tmp_path / "bf16")
    assert_close(run(inputs), wanted, 0.02)


class Places(nn.Module):
    """A convolution of what is the same for each sample, reshaped and added."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Buffer(torch.randn(1, 6, 4, 4))
        self.stem, self.project, self.head = nn.Conv2d(1, 8, 2, 2), nn.Conv2d(6, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = self.project(self.places.expand(x.shape[0], -1, -1, -1).sin())
        tokens = self.stem(x).flatten(2).transpose(1, 2) + places.flatten(2).transpose(1, 2)
        logits: Tensor = self.head(tokens.relu().mean(1))
        return logits


@pytest.mark.parametrize("fields", [{}, {"activation_bits": None, "weight_bits": 4}], ids=["int8", "weights alone"])
def test_convolutions_of_constants_compile(fields: dict[str, Any], tmp_path: Path) -> None:
    model = PTQ.model_validate({"calibration_samples": COUNT} | fields).apply(made(Places), context(tmp_path))
    run = lowered(model, tmp_path / "artifact").load(tmp_path / "artifact")
    assert_close(run(NOISE), simulation(model)(NOISE), within=0.03)


class Positions(nn.Module):
    """A token that is the same for each sample, in a sum; the largest of its features, times a number."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        seen = self.one(x.flatten(1, 2)[:, :1]) + token
        largest = F.softmax(self.two(x[:, 0]), -1).amax(1) * 0.5
        logits: Tensor = self.head(torch.cat([seen.flatten(1), largest], 1))
        return logits


class Mixed(nn.Module):
    """FNet's: Fourier transforms over tokens and features in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.wide(torch.fft.fftn(x[:, 0], dim=(1, 2)).real)).flatten(1)[:, :16])
        return logits


def test_fourier_transforms_are_those_of_their_axes(tmp_path: Path) -> None:
    model = made(Mixed)
    engine = lowered(float_graph(model, shared("Mixed", INPUTS)), tmp_path / "artifact", len(INPUTS))
    found = engine.load(tmp_path / "artifact")(INPUTS)
    torch.testing.assert_close(found, model(INPUTS).detach(), atol=1e-4, rtol=1e-4)


def test_what_the_compiler_gets_wrong_it_does_not_get(tmp_path: Path) -> None:
    model = PTQ(calibration_samples=20).apply(made(Positions), shared("Positions", INPUTS))
    engine = lowered(model, tmp_path / "artifact", len(INPUTS))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(INPUTS), IntegerInterpreter(model.graph)(INPUTS), within=0.02)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("biases", [None, 0.0, 0.5], ids=["none", "zeros", "one number"])
def test_linears_without_biases_of_their_own_give_what_the_reference_gives(
    biases: float | None, rows: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    first, second, last = (nn.Linear(64, width, bias=biases is not None) for width in (64, 64, 3))
    if biases is not None:
        nn.init.constant_(first.bias, biases)
        nn.init.constant_(second.bias, biases)
    layers = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.GELU(), last)
    model = PTQ(calibration_samples=200, weight_granularity="tensor").apply(layers.eval(), context(tmp_path))
    engine = lowered(model, tmp_path / "artifact", rows)
    run = engine.load(tmp_path / "artifact")
    assert_close(run(NOISE[:rows]), IntegerInterpreter(model.graph)(NOISE[:rows]), within=0.03)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a small network."""
    folder = tmp_path_factory.mktemp("openvino") / "artifact"
    lowered(PTQ(calibration_samples=200).apply(network("mlp"), shared("mlp", NOISE)), folder)
    return folder


def test_what_is_exported_takes_any_batch_and_needs_openvino_alone(artifact: Path, tmp_path: Path) -> None:
    engine = OpenVINO(batch_size=COUNT)
    engine.export(artifact, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml", "settings.json"]
    settings = json.loads((tmp_path / "settings.json").read_text())
    run = core().compile_model(tmp_path / "model.xml", "CPU", settings["CPU"])
    wanted = engine.load(artifact)(NOISE)
    for inputs, outputs in ((NOISE, wanted), (NOISE[:3], wanted[:3])):
        torch.testing.assert_close(torch.from_numpy(run(inputs.numpy())[0]), outputs)


def test_an_export_that_openvino_gets_wrong_for_any_batch_takes_that_which_was_measured(tmp_path: Path) -> None:
    tokens = nn.Sequential(Whole(), nn.Embedding(100, 32), nn.Linear(32, 7))
    inputs = torch.randint(0, 100, (4, 8), generator=torch.Generator().manual_seed(0)).float()
    model = PTQ(activation_mode="token", calibration_samples=4).apply(tokens, shared("tokens of words", inputs))
    engine = lowered(model, tmp_path / "artifact", 4)
    (out := tmp_path / "out").mkdir()
    engine.export(tmp_path / "artifact", out)
    run = core().compile_model(out / "model.xml", "CPU", json.loads((out / "settings.json").read_text())["CPU"])
    wanted = engine.load(tmp_path / "artifact")(inputs)
    torch.testing.assert_close(torch.from_numpy(run(inputs.numpy())[0]), wanted)


def test_an_artifact_takes_the_batches_that_it_is_loaded_for(artifact: Path) -> None:
    wanted = OpenVINO(batch_size=COUNT).load(artifact)(NOISE)
    run = OpenVINO(batch_size=1).load(artifact)
    torch.testing.assert_close(torch.cat([run(sample).clone() for sample in NOISE.split(1)]), wanted)
    with pytest.raises(Refused, match=r"takes inputs \[1, 1, 8, 8\] \(got \[2, 1, 8, 8\]\)"):
        run(NOISE[:2])


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "packed.json"])
def test_a_damaged_artifact_is_told(name: str, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        OpenVINO(batch_size=COUNT).load(tmp_path)


def test_what_it_cannot_compile_is_refused_with_the_reason(artifact: Path, tmp_path: Path) -> None:
    content = onnx.load(artifact / "model.onnx")
    content.graph.node[-1].op_type, content.graph.node[-1].domain = "Unheard", "of"
    shutil.copytree(artifact, tmp_path, dirs_exist_ok=True)
    onnx.save(content, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"OpenVINO cannot .*Unheard"):
        OpenVINO(batch_size=COUNT).load(tmp_path)


@pytest.mark.parametrize(
    ("config", "instead"),
    [
        (Cast(dtype="fp16"), "`float`"),
        (Codebook(), "`float`"),
        (PTQ(activation_mode="dynamic"), "`float`"),
        (PTQ(weight_scheme="asymmetric"), "`float`"),
        (PTQ(weight_bits=4, group_size=8), "`float`"),
    ],
    ids=lambda value: value.label() if isinstance(value, Quantization) else value,
)
def test_what_has_no_kernels_is_refused(config: Quantization, instead: str) -> None:
    engine = TypeAdapter(Engine).validate_python({"engine": "openvino"})
    assert f"use {instead}" in engine.refuses(Compression(quantize=config))


@pytest.mark.parametrize("features", [["avx2"], ["avx2", "avx512_bf16"], ["amx_bf16"]], ids=str)
def test_bf16_is_taken_where_the_processor_computes_in_it(features: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsweep.machine.features", lambda: features)
    reason = OpenVINO().refuses(Compression(quantize=Cast(dtype="bf16")))
    assert (reason is None) == any("bf16" in feature for feature in features)


def test_a_trained_network_keeps_its_accuracy(tmp_path: Path) -> None:
    assert accuracy_lost(OpenVINO(), tmp_path / "artifact", within=0.03) < 0.01
