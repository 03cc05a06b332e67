"""LiteRT gives what the reference gives, to a level or the rounding of rows that are quantized as they come."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layout_networks import ConvNeXt, Tokens, Transposed, Windowed
from networks import NETWORKS, Function, Noise, accuracy_lost, assert_close, context, made, network, shared
from networks import lowered as lowered_by
from pydantic import TypeAdapter
from test_gates import KINDS, Branches, Dense
from test_odd_networks import INPUTS, ODD
from test_odd_networks import made as odd
from test_recurrent import INPUTS as SOUNDS
from test_recurrent import Gated
from test_words import Classifier, texts
from torch import Tensor, nn
from written_networks import Attended, Rotated

from qsweep.engines import Engine
from qsweep.engines.litert import LiteRT
from qsweep.errors import BundleError, Refused
from qsweep.hub.export import float_graph
from qsweep.hub.fixed import with_computed_layers
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import QUANTIZE
from qsweep.hub.nodes import nodes_of
from qsweep.quantize.cast import Cast
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Compression

pytest.importorskip("ai_edge_litert", reason="LiteRT cannot be installed here")

COUNT = 50
NOISE = Noise(COUNT).inputs


def lowered(model: QuantizedModel, folder: Path, batch_size: int = COUNT) -> LiteRT:
    engine = LiteRT(batch_size=batch_size)
    lowered_by(engine, model, folder)
    return engine


NARROW: dict[str, dict[str, Any]] = {
    "depthwise": {"weight_bits": 2, "activation_bits": 4},
    "sequence": {"weight_bits": 3, "activation_bits": 2},
    "shortcut": {"activation_bits": 3, "sum_grid": "own", "edge_bits": 8},
    "pools": {"activation_scheme": "symmetric"},
}


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in NETWORKS), *NARROW.items()],
    ids=[*NETWORKS, *(f"{name}, narrow" for name in NARROW)],
)
def test_every_layer_runs_on_integers_and_gives_what_the_reference_gives(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = PTQ.model_validate({"calibration_samples": 200} | fields).apply(network(name), shared(name, NOISE))
    engine = lowered(model, tmp_path / "artifact")
    run = engine.load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(model.graph)(NOISE), within=0.03)
    assert engine.integer_macs(tmp_path / "artifact", run, NOISE) == COUNT * model.macs


@pytest.mark.parametrize("name", ["digits_cnn", "depthwise", "shortcut", "pools"])
def test_integers_of_every_layer_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    """Sums that differ lie between two levels."""
    from ai_edge_litert.interpreter import Interpreter

    model = PTQ(calibration_samples=200).apply(network(name), shared(name, NOISE))
    lowered(model, tmp_path / "artifact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is for debugging, it says
        path = str(tmp_path / "artifact" / "model.tflite")
        interpreter = Interpreter(path, experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], NOISE.numpy())
    interpreter.invoke()
    found: dict[tuple[float, int], list[Tensor]] = {}
    for tensor in interpreter.get_tensor_details():
        scales = tensor["quantization_parameters"]["scales"]
        if len(scales) == 1 and tensor["shape"].prod() >= COUNT:
            values = torch.from_numpy(interpreter.get_tensor(tensor["index"]).copy())
            found.setdefault((float(scales[0]), int(tensor["shape"].prod())), []).append(values)
    reference = IntegerInterpreter(model.graph)
    reference.keep = True
    reference(NOISE)
    different = total = 0
    for node in nodes_of(model.graph, {QUANTIZE}):
        expected = reference.tensors[node.name]
        scale = float(torch.tensor(node.args[1], dtype=torch.float32))
        laid = expected.movedim(1, -1) if expected.dim() == 4 else expected
        errors = [(each.flatten().int() - laid.flatten().int()).abs() for each in found[scale, laid.numel()]]
        nearest = min(errors, key=lambda error: int(error.sum()))
        assert int(nearest.max()) <= 1
        different, total = different + int((nearest > 0).sum()), total + laid.numel()
    assert different <= total / 1000


@pytest.mark.parametrize("name", [*ODD, *(kind.__name__ for kind in KINDS)])
def test_what_is_odd_or_gated_is_on_integers_too(name: str, tmp_path: Path) -> None:
    model = odd(name) if name in ODD else made(next(kind for kind in KINDS if kind.__name__ == name))
    quantized = PTQ(calibration_samples=20).apply(model, shared(name, INPUTS))
    engine = lowered(quantized, tmp_path / "artifact", len(INPUTS))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(INPUTS), IntegerInterpreter(quantized.graph)(INPUTS), within=0.05)
    work = len(INPUTS) * with_computed_layers(quantized).macs
    share = engine.integer_macs(tmp_path / "artifact", run, INPUTS) / work
    assert share == 1


@pytest.mark.parametrize(
    ("kind", "inputs", "mode", "share"),
    [
        (Tokens, INPUTS, "token", 0.5),
        (Attended, INPUTS, "static", 1.0),
        (Rotated, INPUTS, "static", 0.61),
        (Gated, SOUNDS, "static", 0.01),
        (ConvNeXt, INPUTS, "static", 1.0),
        (Windowed, INPUTS, "static", 0.94),
        (Classifier, texts(40), "token", 0.84),
        (Classifier, texts(40), None, 0.0),
    ],
)
def test_transformers_and_what_else_people_write(
    kind: type[nn.Module], inputs: Tensor, mode: str | None, share: float, tmp_path: Path
) -> None:
    fields = {"activation_mode": mode} if mode else {"activation_bits": None}
    model = PTQ.model_validate({"calibration_samples": 20} | fields).apply(made(kind), shared(kind.__name__, inputs))
    engine = lowered(model, tmp_path / "artifact", len(inputs))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(inputs), IntegerInterpreter(model.graph)(inputs), within=0.06)
    found = engine.integer_macs(tmp_path / "artifact", run, inputs) / (len(inputs) * model.macs)
    assert found >= share


FLOATS: dict[str, tuple[type[nn.Module], Tensor]] = {
    kind.__name__: (kind, inputs)
    for kind, inputs in [
        (Branches, INPUTS), (Dense, INPUTS), (Tokens, INPUTS), (Rotated, INPUTS), (Gated, SOUNDS),
        (Classifier, texts(40)), (Transposed, INPUTS), (Windowed, INPUTS),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", ["depthwise", "sequence", *ODD, *FLOATS])
def test_float_baselines_are_the_model(name: str, tmp_path: Path) -> None:
    kind, inputs = FLOATS.get(name, (None, NOISE if name in NETWORKS else INPUTS))
    model = made(kind) if kind else network(name) if name in NETWORKS else odd(name)
    live = float_graph(model, shared(name, inputs))
    engine = lowered(live, tmp_path / "artifact", len(inputs))
    run = engine.load(tmp_path / "artifact")
    torch.testing.assert_close(run(inputs), model(inputs).detach(), atol=1e-4, rtol=1e-4)
    assert engine.integer_macs(tmp_path / "artifact", run, inputs) == 0


ELEMENTWISE = {
    "softplus": lambda x: F.softplus(x, beta=3),
    "mish": F.mish,
    "elu": lambda x: F.elu(x, alpha=0.7),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "erf gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "hard": lambda x: F.hardsigmoid(x) * F.hardswish(x),
    "powers": lambda x: x**2 + (x.abs() + 1) ** 0.5 + (x.abs() + 1) ** 1.5 + 1 / (x.abs() + 1),
    "choice": lambda x: torch.where((x > 0) & ~(x >= 1), x, 1 - x.exp()),
    "softmax": lambda x: x.softmax(1) + x.log_softmax(2),
    "extremes": lambda x: x.amax((2, 3), keepdim=True) - x.amin(1, keepdim=True) + torch.maximum(x, -x),
    "bilinear": lambda x: (
        F.interpolate(x, scale_factor=2, mode="bilinear")[..., ::2, ::2]
        + F.interpolate(x, size=(15, 9), mode="bilinear", align_corners=True)[..., :8, :8]
    ),
    "windows": lambda x: F.adaptive_avg_pool2d(x, (5, 3)) + F.adaptive_avg_pool2d(F.max_pool2d(x, 4), (5, 3)),
    "lengths": lambda x: x / (x.norm(dim=1, keepdim=True) + 1),
    "whole numbers": lambda x: (x * 9).long() * 0.5 + (x * 9).long() / 4 + ((x > 0).long() == 1) * x + (x > 0.5) * 2,
    "sums so far": lambda x: (x > 0).long().cumsum(2).float() + x.cumsum(3),
    "places": lambda x: x.permute(1, 2, 0, 3)[torch.tensor([3, 1]), torch.tensor([0, 7])].permute(1, 0, 2),
    "taken": lambda x: x.gather(2, x.argmin(3, keepdim=True).expand(-1, -1, -1, 8)),
    "flipped": lambda x: x.flip(1, 3) + x.flip(2),
    "windows of a series": lambda x: (
        x.unfold(3, 4, 2).sum(4).repeat(1, 1, 1, 2) + x.unfold(1, 2, 2).mean(4).sum(1, keepdim=True)[..., :6]
    ),
    "chosen channels": lambda x: x[:, torch.tensor([3, 1, 1])],
    "shuffled": lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 4).repeat_interleave(2, 1)[:, :, :8, :8],
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_functions_are_what_pytorch_gives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, conv = ELEMENTWISE[name], nn.Conv2d(1, 8, 3, padding=1)
    model = Function(lambda x, conv: function(conv(x)).flatten(1), conv).eval()
    live = float_graph(model, context(tmp_path, task=Noise(inputs=NOISE)))
    run = lowered(live, tmp_path / "artifact").load(tmp_path / "artifact")
    torch.testing.assert_close(run(NOISE), model(NOISE).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, "causal", "boolean", "real"])
def test_attention_is_what_pytorch_gives(mask: str | None, tmp_path: Path) -> None:
    bits = torch.ones(8, 8, dtype=torch.bool).tril(2)
    masks = {"boolean": bits, "real": torch.where(bits, 0.0, -torch.inf)}

    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x + 1, x * 2, masks.get(mask or ""), is_causal=mask == "causal")

    live = float_graph(Heads(), context(tmp_path, task=Noise(inputs=NOISE)))
    run = lowered(live, tmp_path / "artifact").load(tmp_path / "artifact")
    torch.testing.assert_close(run(NOISE), Heads()(NOISE), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a small network."""
    folder = tmp_path_factory.mktemp("file") / "artifact"
    lowered(PTQ(calibration_samples=200).apply(network("mlp"), shared("mlp", NOISE)), folder)
    return folder


def test_a_file_takes_the_batches_that_it_was_made_for(artifact: Path) -> None:
    run = LiteRT(batch_size=COUNT).load(artifact)
    with pytest.raises(Refused, match=r"takes inputs \[50, 1, 8, 8\] \(got \[2, 1, 8, 8\]\)"):
        run(NOISE[:2])


def test_what_is_exported_is_the_file_and_its_weights_have_their_names(artifact: Path, tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    LiteRT(batch_size=COUNT).export(artifact, tmp_path)
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], NOISE.numpy())
    interpreter.invoke()
    found = torch.from_numpy(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    assert torch.equal(found, LiteRT(batch_size=COUNT).load(artifact)(NOISE))
    signed = interpreter.get_signature_runner()(input=NOISE.numpy())
    assert torch.equal(torch.from_numpy(signed["output"]), found)
    names = {tensor["name"] for tensor in interpreter.get_tensor_details()}
    assert {"input", "output", *(name for name, value in network("mlp").named_parameters() if value.dim() > 1)} <= names


def test_constants_lie_at_multiples_of_16_bytes(artifact: Path) -> None:
    from ai_edge_litert import schema_py_generated as schema

    content = (artifact / "model.tflite").read_bytes()
    model = schema.Model.GetRootAs(content, 0)
    found = [model.Buffers(place) for place in range(model.BuffersLength())]
    places = [buffer._tab.Vector(buffer._tab.Offset(4)) for buffer in found if buffer.DataLength()]
    assert places
    assert all(place % 16 == 0 for place in places)


def test_a_damaged_file_is_told(artifact: Path, tmp_path: Path) -> None:
    content = (artifact / "model.tflite").read_bytes()
    (tmp_path / "model.tflite").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        LiteRT(batch_size=COUNT).load(tmp_path)


class Turned(nn.Module):
    """Reads one tensor as it is, and turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(48, 10)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.rows(x[:, 0]))
        x = torch.cat([x, x * x.mean(1, keepdim=True)], 2)[:, :, :8]
        both = self.rows(self.norm(x)) + self.columns(self.norm(x.transpose(1, 2)))
        found: Tensor = self.head((both + self.columns(x.transpose(1, 2))).flatten(1))
        return found


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tensor_that_is_read_in_two_orders_is_each_in_its_place(quantized: bool, tmp_path: Path) -> None:
    found, model = shared("turned", NOISE), made(Turned)
    graph = PTQ(calibration_samples=200).apply(model, found) if quantized else float_graph(model, found)
    run = lowered(graph, tmp_path / "artifact").load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(graph.graph)(NOISE), within=0.06 if quantized else 1e-4)


class Twice(nn.Module):
    """One weight, read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(64, 64, bias=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.layer(torch.relu(self.layer(x.flatten(1))))))
        return found


def test_a_weight_that_several_layers_read_is_stored_once(tmp_path: Path) -> None:
    model = PTQ(calibration_samples=200).apply(made(Twice), shared("twice", NOISE))
    run = lowered(model, tmp_path / "artifact").load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(model.graph)(NOISE), within=0.03)
    content = (tmp_path / "artifact" / "model.tflite").read_bytes()
    weight = next(layer.weight for layer in model.layers() if layer.name == "layer.weight")
    assert content.count(weight.numpy().tobytes()) == 1


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).flatten(1)


def test_an_op_that_it_does_not_have_is_refused_with_its_name(tmp_path: Path) -> None:
    live = float_graph(Odd().eval(), context(tmp_path, "odd"))
    with pytest.raises(Refused, match=r"LiteRT has no operator for `aten\.special_bessel_j0\.default`"):
        lowered(live, tmp_path / "artifact")


@pytest.mark.parametrize(
    "config",
    [Cast(dtype="bf16"), PTQ(activation_mode="dynamic"), PTQ(weight_scheme="asymmetric")],
    ids=lambda config: config.label(),
)
def test_what_has_no_integer_kernels_is_refused(config: Any) -> None:
    engine = TypeAdapter(Engine).validate_python({"engine": "litert"})
    assert "use `float`" in engine.refuses(Compression(quantize=config))


def test_a_trained_network_keeps_its_accuracy(tmp_path: Path) -> None:
    assert accuracy_lost(LiteRT(), tmp_path / "artifact", within=0.02) < 0.01
