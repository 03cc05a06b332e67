"""Values that are multiplied element by element, and what convolutions give to readers that compute in floats."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, context
from test_odd_networks import norm, outputs
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import Refused
from qsweep.hub.form import (
    DEQUANTIZE,
    QUANTIZE,
    QuantizedModel,
    aten,
    grid_of,
    nodes_of,
    set_constant,
    source,
)
from qsweep.hub.integer import IntegerInterpreter
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ

INPUTS = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Squeezed(nn.Module):
    """An inverted residual with squeeze and excitation, as MobileNetV3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), norm(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), norm(16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.stem(x)))
        y = F.relu(self.bn2(self.depth(x)))
        y = y * F.hardsigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head((x + self.project(y)).mean((2, 3)))
        return logits


class Units(nn.Module):
    """A gated linear unit over tokens, its halves cut from one linear, and one over an image, rectified."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.gate = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.wide, self.narrow, self.head = nn.Linear(64, 32), nn.Linear(16, 8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.tanh(self.image(x)) * self.gate(x)).flatten(2)
        one, other = self.wide(x).chunk(2, -1)
        logits: Tensor = self.head(self.narrow(one * F.silu(other)).flatten(1))
        return logits


class Before(nn.Module):
    """Rectified before it is convolved, beside a shortcut of the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.relu(x))
        logits: Tensor = self.head((x + self.last(x.clamp(max=0.3))).mean((2, 3)))
        return logits


class Normed(nn.Module):
    """A depthwise convolution that a layer norm reads, and one that a concatenation and a batch norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.wide = nn.LayerNorm(8), nn.Linear(8, 8)
        self.dense, self.bn, self.last = nn.Conv2d(8, 4, 3, padding=1), norm(12), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.wide(self.norm(self.depth(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.last(F.relu(self.bn(torch.cat([x, self.dense(x)], 1))))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


KINDS: list[type[nn.Module]] = [Squeezed, Units, Before, Normed]


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., QuantizedModel]:
    @cache
    def once(kind: Callable[[], nn.Module], **fields: Any) -> QuantizedModel:
        found = context(tmp_path_factory.mktemp("gates"), task=Noise(inputs=INPUTS))
        return PTQ.model_validate({"calibration_samples": 20} | fields).apply(made(kind), found)

    return once


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_within_quantization(
    kind: type[nn.Module], quantized: Callable[..., QuantizedModel]
) -> None:
    wanted = made(kind)(INPUTS).detach()
    assert (IntegerInterpreter(quantized(kind).graph)(INPUTS) - wanted).std() < 0.03 * wanted.std()


@pytest.mark.parametrize("engine", [Inductor, OnnxRuntime], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_on_integers_and_gives_those_of_the_reference(
    kind: type[nn.Module], engine: type[EngineConfig], quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    model, config = quantized(kind), engine(batch_size=20)
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    found = outputs(config, model, tmp_path, INPUTS)
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.std().item(), rtol=0)
    artifact = tmp_path / config.engine
    assert config.integer_macs(artifact, config.load(artifact), INPUTS) == len(INPUTS) * model.macs


@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_gives_the_integers_of_the_reference(
    kind: type[nn.Module], quantized: Callable[..., QuantizedModel], device: str
) -> None:
    pytest.importorskip("triton")
    from qsweep.cuda.chain import Chain

    model = quantized(kind)
    reference = IntegerInterpreter(model.graph)
    reference.keep = True
    wanted = reference(INPUTS[:2])
    apart, together = Chain(model, 2, device, {}, keep=True), Chain(model, 2, device, {})
    for chain in (apart, together):
        chain(INPUTS[2:4].to(device))
        torch.testing.assert_close(chain(INPUTS[:2].to(device)).cpu(), wanted, atol=1e-5, rtol=0)
    integers = apart.integers()
    assert len(integers) >= 6
    for name, values in integers.items():
        assert torch.equal(values.cpu(), reference.tensors[name]), name
    assert bool(apart.plan.islands) == (kind is Normed)
    assert apart.integer_share == 1.0


def read_as_integers(model: QuantizedModel, target: Any) -> list[bool]:
    """Of each node of `target` whether all that it reads stands on a grid."""
    nodes = nodes_of(model.graph, {target})
    return [all(given.target is DEQUANTIZE for given in node.all_input_nodes) for node in nodes]


def apply(function: Callable[..., Tensor], *layers: nn.Module) -> type[nn.Module]:
    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layers, self.head = nn.Conv2d(1, 8, 3), nn.ModuleList(layers), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(function(self.stem(x), *self.layers).mean((2, 3)))
            return logits

    return Applied


@pytest.mark.parametrize(
    ("function", "integer"),
    [
        (lambda x: x * torch.tanh(x), True),
        (lambda x: F.relu(x) * torch.tanh(x.mean((2, 3), keepdim=True)), True),
        (lambda x: (x * torch.tanh(x)) * F.gelu(x), True),
        (lambda x: F.gelu(x) * F.gelu(x).amax((2, 3), keepdim=True), True),
        (lambda x: (lambda y: y * y)(F.gelu(x)), False),
        (lambda x: F.gelu(x) * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-5), False),
        (lambda x: F.gelu(x) * torch.softmax(x, 1), False),
    ],
    ids=["gate", "pool", "twice", "maximum", "square", "norm", "softmax"],
)
def test_products_are_on_integers_where_layers_sums_and_pools_give_both_sides(
    function: Callable[..., Tensor], integer: bool, quantized: Callable[..., QuantizedModel]
) -> None:
    *_, last = nodes_of(quantized(apply(function)).graph, {aten.mul.Tensor})
    assert all(given.target is DEQUANTIZE for given in last.all_input_nodes) == integer


def test_what_a_convolution_gives_is_on_a_grid_whoever_reads_it(quantized: Callable[..., QuantizedModel]) -> None:
    model = quantized(Normed)
    for node in nodes_of(model.graph, {aten.conv2d.default}):
        (user,) = node.users
        assert QUANTIZE in (user.target, *(reader.target for reader in user.users))
    assert read_as_integers(model, aten.layer_norm.default) == [False]  # a move lies between
    (moved, _) = nodes_of(model.graph, {aten.permute.default})
    assert source(moved).target is DEQUANTIZE
    (joined,) = nodes_of(model.graph, {aten.cat.default})
    assert [given.target is DEQUANTIZE for given in joined.all_input_nodes] == [False, True]


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten()),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2)),
    ],
    ids=["given", "read by a float op"],
)
def test_what_the_last_convolution_gives_stays_real(
    model: Callable[[], nn.Module], quantized: Callable[..., QuantizedModel]
) -> None:
    graph = quantized(model).graph
    *_, last = nodes_of(graph, {aten.conv2d.default})
    assert not nodes_of(graph, {QUANTIZE})[2:]
    assert all(user.target is not QUANTIZE for user in last.users)


@pytest.mark.parametrize(("grid", "bits"), [("shared", 4), ("own", 8)])
def test_gates_read_8_bits_of_what_layers_read_in_4_where_sums_do(
    grid: str, bits: int, quantized: Callable[..., QuantizedModel]
) -> None:
    function = lambda x, conv: F.relu(conv(x)) + x * torch.tanh(x)  # noqa: E731
    model = quantized(apply(function, nn.Conv2d(8, 8, 3, padding=1)), activation_bits=4, sum_grid=grid)
    (product,) = nodes_of(model.graph, {aten.mul.Tensor})
    widths = [grid_of(given) for given in product.all_input_nodes]
    assert [(each.high - each.low).bit_length() for each in widths] == [bits, 8]
    *_, last = nodes_of(model.graph, {aten.conv2d.default})
    assert grid_of(source(last)).high - grid_of(source(last)).low == 15


def test_what_training_has_fitted_ships(tmp_path: Path) -> None:
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    model = LSQ(weight_bits=4, activation_bits=8, epochs=2, calibration_samples=20).apply(made(Squeezed), found)
    assert read_as_integers(model, aten.mul.Tensor) == [True]
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    given = outputs(OnnxRuntime(batch_size=20), model, tmp_path, INPUTS)
    torch.testing.assert_close(given, wanted, atol=1e-5 * wanted.std().item(), rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.graph(INPUTS), wanted, atol=0.05 * wanted.std().item(), rtol=0)


def test_a_product_whose_step_is_denormal_is_refused(quantized: Callable[..., QuantizedModel]) -> None:
    pytest.importorskip("triton")
    from qsweep.cuda.numbers import check_scales

    model = quantized(Squeezed, calibration_samples=19)  # of its own
    check_scales(model.graph)
    (product,) = nodes_of(model.graph, {aten.mul.Tensor})
    for given in product.all_input_nodes:
        given.update_arg(1, 1e-20)
    with pytest.raises(Refused, match=rf"the step of `{product.name}`: must be finite and at least 1.18e-38"):
        check_scales(model.graph)


def test_transposed_convolutions_between_grids_keep_their_real_weights(tmp_path: Path) -> None:
    """ONNX Runtime would round them to 8 bits of its own."""
    function = lambda x, up, conv: conv(F.relu(up(x)))  # noqa: E731
    kind = apply(function, nn.ConvTranspose2d(8, 6, 3, 2, groups=2), nn.Conv2d(6, 8, 3))
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    model = PTQ(calibration_samples=20).apply(made(kind), found)
    (up,) = nodes_of(model.graph, {aten.conv_transpose2d.input})
    assert source(up).target is DEQUANTIZE
    set_constant(model.graph, str(source(up, 1).target), torch.randn(8, 3, 3, 3) ** 9)
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    given = outputs(OnnxRuntime(batch_size=20), model, tmp_path, INPUTS)
    torch.testing.assert_close(given, wanted, atol=1e-3 * wanted.std().item(), rtol=0)
