"""Transposed convolutions: convolutions once they are quantized, in integers on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, assert_close, context, made, shared
from networks import lowered as lowered_by
from pydantic import TypeAdapter
from torch import Tensor, nn

from qsweep.engines import Engine, EngineConfig
from qsweep.hub.export import float_graph, quantizable_graph, traced
from qsweep.hub.fixed import with_computed_layers
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import RECTIFIERS, TRANSPOSED, aten
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.simulate import simulation
from qsweep.hub.subpixel import with_convolutions
from qsweep.quantize._training import prepared
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT

INPUTS = Noise(20).inputs


class UNet(nn.Module):
    """Halves an image twice and doubles it again, beside shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.bottom, self.up = nn.Conv2d(16, 24, 3, 2, 1), nn.ConvTranspose2d(24, 16, 2, 2)
        self.last, self.norm = nn.ConvTranspose2d(32, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(16, 3, 1)
        seed_norm(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.first(x))
        half = F.relu(self.down(F.max_pool2d(wide, 2)))
        small = self.up(F.relu(self.bottom(half)))
        up = F.relu(self.norm(self.last(torch.cat([small, half], 1))))
        logits: Tensor = self.head(torch.cat([up, wide], 1)).flatten(1)[:, :10]
        return logits


class Vocoder(nn.Module):
    """Lengthens a sequence twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv1d(8, 16, 3, padding=1), nn.ConvTranspose1d(16, 12, 8, 4, 2)
        self.again, self.last = nn.ConvTranspose1d(12, 8, 2, 2), nn.Conv1d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.up(F.leaky_relu(self.first(x[:, 0]), 0.1)), 0.1)
        waves: Tensor = self.last(F.relu(self.again(x)))
        return waves


class Generator(nn.Module):
    """All its layers are transposed convolutions: of one pixel, in groups, with other strides across than down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.ConvTranspose2d(64, 16, 4, bias=False), nn.BatchNorm2d(16)
        self.second = nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2)
        self.third, self.last = nn.ConvTranspose2d(8, 8, (3, 4), (1, 2), 1), nn.ConvTranspose2d(8, 1, 4, 2, 1)
        seed_norm(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x.reshape(-1, 64, 1, 1))))
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.last(x).tanh()  # type: ignore[no-any-return]


def seed_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    """As if it had been trained."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for values, low, high in ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, -1, 1)):
        nn.init.uniform_(values, low, high)


DECODERS = [UNet, Vocoder, Generator]
ENGINES = ["onnxruntime", "inductor", "openvino", "litert", "executorch"]
LIBRARIES = {"litert": "ai_edge_litert", "openvino": "openvino", "executorch": "executorch"}


def engine_of(name: str) -> EngineConfig:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} cannot be installed here")
    return TypeAdapter[EngineConfig](Engine).validate_python({"engine": name, "batch_size": len(INPUTS)})


WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 4, "stride": 4, "groups": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3},
    {"kernel_size": 6, "stride": 2, "padding": 2, "groups": 4},
    {"kernel_size": 6, "stride": 3, "padding": 4, "output_padding": 1},
    {"kernel_size": 8, "stride": 2, "padding": 2, "groups": 8, "bias": False},
    {"kernel_size": 2, "padding": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    {"kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2},
    {"kernel_size": 5, "stride": 2, "padding": 4},
    {"kernel_size": 5, "stride": 3, "padding": 4, "output_padding": 2},
]


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("fields", WINDOWS, ids=str)
def test_a_convolution_gives_what_the_transposed_one_gave(fields: dict[str, Any], dims: int, normed: bool) -> None:
    torch.manual_seed(0)
    layer: nn.Module = (nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d)(8, 16, **fields)
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(16)
    seed_norm(norm)
    model = nn.Sequential(layer, *([norm] if normed else []), nn.ReLU()).eval()
    inputs = torch.randn(5, 8, *[9, 7][:dims])
    found = with_convolutions(traced(model, inputs[:2]))
    assert not nodes_of(found.graph, TRANSPOSED)
    (layer_node,) = nodes_of(found.graph, {aten.conv1d.default, aten.conv2d.default})
    assert [user.target for user in layer_node.users] == [aten.relu.default]  # which joins it
    assert found.layers()[0].name == "0.weight"
    torch.testing.assert_close(found.graph(inputs), model(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 4, "stride": 2, "dilation": 2},
        {"kernel_size": 2, "stride": 2, "output_padding": 1},
    ],
    ids=str,
)
def test_one_that_would_be_mostly_zeros_or_is_dilated_or_extended_stays(fields: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, **fields)).eval()
    found = PTQ(calibration_samples=20).apply(model, context(tmp_path, task=Noise(inputs=INPUTS)))
    assert len(nodes_of(found.graph, TRANSPOSED)) == 1
    assert_close(IntegerInterpreter(found.graph)(INPUTS), model(INPUTS).detach(), within=0.1)


def test_a_weight_that_two_read_is_that_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.relu(self.up(x)))  # type: ignore[no-any-return]

    model, inputs = made(Twice), torch.randn(2, 3, 4, 4)
    found = with_convolutions(traced(model, inputs))
    torch.testing.assert_close(found.graph(inputs), model(inputs))
    assert len({id(layer.weight) for layer in found.layers()}) == 1


def test_a_rectifier_behind_rearranged_pixels_joins_the_layer() -> None:
    class Enlarged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.pixel_shuffle(self.conv(x), 2)[..., 1:])

    model = made(Enlarged)
    graph = traced(model, INPUTS[:2]).graph
    (rectifier,) = nodes_of(graph, RECTIFIERS)
    assert source(rectifier).target is aten.conv2d.default
    torch.testing.assert_close(graph(INPUTS), model(INPUTS))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_are_in_integers_on_every_engine(kind: type[nn.Module], name: str, tmp_path: Path) -> None:
    model = PTQ(calibration_samples=20).apply(made(kind), shared(kind.__name__, INPUTS))
    engine = engine_of(name)
    lowered_by(engine, model, tmp_path / "artifact")
    run = engine.load(tmp_path / "artifact")
    assert_close(run(INPUTS), IntegerInterpreter(model.graph)(INPUTS), within=1e-4)
    layers, work = model.layers(), with_computed_layers(model).macs
    share = engine.integer_macs(tmp_path / "artifact", run, INPUTS) / (len(INPUTS) * work)
    assert 1 - layers[-1].macs / work <= share <= 1  # the last one gives real numbers


@pytest.mark.parametrize("kind", DECODERS)
def test_8_bits_are_close_to_the_model(kind: type[nn.Module]) -> None:
    model = made(kind)
    found = PTQ(calibration_samples=20).apply(model, shared(kind.__name__, INPUTS))
    assert_close(IntegerInterpreter(found.graph)(INPUTS), model(INPUTS).detach(), within=0.15)


@pytest.mark.parametrize("name", ["onnxruntime", "inductor", "openvino", "litert"])
def test_weights_alone_have_few_bits(name: str, tmp_path: Path) -> None:
    method = PTQ(calibration_samples=20, weight_bits=4, activation_bits=None)
    model = method.apply(made(UNet), shared("UNet", INPUTS))
    assert set(model.layer_bits().values()) == {4}
    assert {"up.weight", "last.weight"} < model.layer_bits().keys()
    engine = engine_of(name)
    lowered_by(engine, model, tmp_path / "artifact")
    assert_close(engine.load(tmp_path / "artifact")(INPUTS), IntegerInterpreter(model.graph)(INPUTS), within=1e-4)


def test_one_may_stay_in_floating_point(tmp_path: Path) -> None:
    found = shared("UNet", INPUTS)
    model = PTQ(calibration_samples=20, float_layers=("up.*",)).apply(made(UNet), found)
    bits = model.layer_bits()
    assert (bits["up.weight"], bits["last.weight"]) == (32, 8)


def test_the_float_baseline_is_the_model_as_it_is() -> None:
    found = shared("UNet", INPUTS)
    assert len(nodes_of(float_graph(made(UNet), found).graph, TRANSPOSED)) == 2
    assert not nodes_of(quantizable_graph(made(UNet), found).graph, TRANSPOSED)


@pytest.mark.parametrize("method", [QAT, LSQ])
def test_their_weights_are_trained(method: type[QAT] | type[LSQ], tmp_path: Path) -> None:
    found, config = context(tmp_path, task=Noise(inputs=INPUTS)), method(epochs=1, calibration_samples=20)
    before = quantizable_graph(made(UNet), found).layers()
    live = prepared(config, made(UNet), found).graph
    trained = {name for name, value in live.named_parameters() if value.requires_grad}
    assert {"up.weight", "up.bias", "last.weight", "last.bias"} <= trained
    model = config.apply(made(UNet), found)
    shapes = {layer.name: layer.weight.shape for layer in model.layers()}
    assert shapes == {layer.name: layer.weight.shape for layer in before}
    assert {layer.weight_bits for layer in model.layers()} == {8}
    assert_close(IntegerInterpreter(model.graph)(INPUTS), simulation(model)(INPUTS), within=0.1)


def test_zeros_that_make_up_whole_strides_stay_in_trainings(tmp_path: Path) -> None:
    """Windows of three pixels every two: pixels between get one weight, or two, where the others get two, or four."""
    up, last = nn.ConvTranspose2d(6, 5, 3, 2, 1, 1), nn.Conv2d(5, 10, 3)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), up, last, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    (_, layer, _) = LSQ(epochs=1, calibration_samples=20).apply(model, found).layers()
    used = (layer.weight.reshape(5, 2, 2, 6, 2, 2) != 0).any(0).any(2)
    assert used.sum((2, 3)).tolist() == [[4, 2], [2, 1]]
