"""Values that are multiplied element by element, norms that no layer takes in, and what convolutions give to readers
that compute in floats."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, context, made
from test_odd_networks import norm, outputs
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import NotFinite, Refused
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import DEQUANTIZE, QUANTIZE, aten
from qsweep.hub.nodes import constant, nodes_of, set_constant, source
from qsweep.hub.weights import real_weight
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
    """A depthwise convolution that a layer norm reads, and one that a concatenation and a group norm do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.wide = nn.LayerNorm(8), nn.Linear(8, 8)
        self.dense, self.groups, self.last = nn.Conv2d(8, 4, 3, padding=1), nn.GroupNorm(3, 12), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.wide(self.norm(self.depth(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = self.last(F.relu(self.groups(torch.cat([x, self.dense(x)], 1))))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


class Dense(nn.Module):
    """Concatenations that are normed and rectified before they are convolved, and a norm behind a GELU and before a
    sum, one of its channels off and one turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = (nn.Conv2d(size, 8, 3, padding=1) for size in (1, 8, 16))
        self.bn, self.bn2, self.bn3 = norm(8), norm(16), norm(24)
        self.down, self.mixed, self.head = nn.Conv2d(24, 12, 1), norm(12), nn.Linear(12, 10)
        with torch.no_grad():
            self.mixed.weight[:2] = torch.tensor([0.0, -1.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.one(F.relu(self.bn(x)))], 1)
        x = torch.cat([x, self.other(F.relu(self.bn2(x)))], 1)
        x = F.avg_pool2d(self.down(F.relu(self.bn3(x))), 2)
        logits: Tensor = self.head((x + self.mixed(F.gelu(x))).mean((2, 3)))
        return logits


class Branches(nn.Module):
    """One-dimensional: a convolution beside a norm of what it reads, and a norm without factors, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = (nn.Conv1d(size, 12, 3, padding=1) for size in (8, 12))
        self.bn, self.plain = nn.BatchNorm1d(12), nn.BatchNorm1d(12, affine=False)
        self.head = nn.Linear(96, 10)
        for module in (self.bn, self.plain):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x[:, 0]))
        x = F.relu(self.conv(x) + self.bn(x))
        x = F.relu(self.plain(x + self.plain(x)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Swished(nn.Module):
    """Values times a sigmoid of them, of an image and, as CLIP has it, of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.wide, self.head = nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.silu(self.conv(F.silu(self.stem(x)))).flatten(1))
        logits: Tensor = self.head(torch.sigmoid(1.702 * x) * x)
        return logits


KINDS: list[type[nn.Module]] = [Squeezed, Units, Before, Normed, Dense, Branches, Swished]


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


@pytest.mark.parametrize(
    ("engine", "kind"),
    [*((OnnxRuntime, kind) for kind in KINDS), *((Inductor, kind) for kind in (Squeezed, Dense, Branches))],
)
def test_every_layer_is_on_integers_and_gives_those_of_the_reference(
    kind: type[nn.Module], engine: type[EngineConfig], quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    model, config = quantized(kind), engine(batch_size=20)
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    found = outputs(config, model, tmp_path, INPUTS)
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.std().item(), rtol=0)
    artifact = tmp_path / config.engine
    norms = sum(
        layer.macs for layer in model.layers() if engine is Inductor and layer.weight.numel() == len(layer.weight)
    )
    integers = config.integer_macs(artifact, config.load(artifact), INPUTS)
    assert integers == len(INPUTS) * (model.macs - norms)  # these are multiplied in floating point there


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
    assert len(integers) >= 5
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


def test_values_times_their_sigmoid_are_one_op_of_onnxruntime(
    quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    onnx, engine = pytest.importorskip("onnx"), OnnxRuntime(batch_size=20)
    outputs(engine, quantized(Swished), tmp_path, INPUTS)
    nodes = onnx.load(tmp_path / engine.engine / "model.onnx").graph.node
    slopes = [round(node.attribute[0].f, 3) for node in nodes if node.op_type == "QuickGelu"]
    assert slopes == [1.0, 1.0, 1.702]
    assert not any(node.op_type == "Sigmoid" for node in nodes)


@pytest.mark.parametrize(("wide", "left"), [(0.8, 0), (0.1, 1)], ids=["reaches -3", "does not"])
def test_a_hardswish_is_a_product_of_integers_on_onnxruntime(
    wide: float, left: int, quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    onnx, engine = pytest.importorskip("onnx"), OnnxRuntime(batch_size=20)

    def network() -> nn.Module:
        found = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.Conv2d(4, 2, 6), nn.Flatten())
        nn.init.uniform_(found[0].weight, -wide, wide)
        return found

    model = quantized(network)
    (node,) = nodes_of(model.graph, {aten.hardswish.default})
    grid = grid_of(source(node))
    assert (grid.zero_point - grid.low >= 3 / grid.scale) == (not left)
    found = outputs(engine, model, tmp_path, INPUTS)
    torch.testing.assert_close(found, IntegerInterpreter(model.graph)(INPUTS), atol=1e-6, rtol=0)
    kinds = [node.op_type for node in onnx.load(tmp_path / engine.engine / "model.onnx").graph.node]
    assert (kinds.count("HardSwish"), kinds.count("Mul")) == (left, 2 - left)  # the input is scaled by the other one


def test_a_norm_between_integers_is_a_layer_of_its_factors(quantized: Callable[..., QuantizedModel]) -> None:
    model, own = quantized(Dense, weight_bits=3), made(Dense)
    layers = {layer.name: layer for layer in model.layers()}
    assert {name: layer.weight_bits for name, layer in layers.items() if "bn" in name or "mixed" in name} == {
        "bn.weight": 8, "bn2.weight": 8, "bn3.weight": 8, "mixed.weight": 8
    }  # fmt: skip
    assert layers["one.weight"].weight_bits == 3
    for name in ("bn2", "mixed"):
        node = layers[f"{name}.weight"].node
        bn = own.get_submodule(name)
        factor = bn.weight * (bn.running_var + bn.eps).rsqrt()
        torch.testing.assert_close(real_weight(model.graph, source(node, 1)).flatten(), factor, rtol=1e-6, atol=0)
        shift, bias = bn.bias - bn.running_mean * factor, constant(model.graph, node.args[2])
        torch.testing.assert_close(bias, shift, rtol=1e-3, atol=1e-3)
    assert len(quantized(Branches).layers()) == 6  # one of them twice


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(norm(1), nn.Conv2d(1, 4, 3)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softmax(1), norm(4), nn.Conv2d(4, 4, 3)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), norm(4), nn.Softmax(1), nn.Conv2d(4, 4, 3)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), norm(4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)),
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)
        ),
    ],
    ids=["the input's", "of a float op", "read by a float op", "the model's", "of rows", "without statistics"],
)
def test_other_norms_stay_real(model: Callable[[], nn.Module], quantized: Callable[..., QuantizedModel]) -> None:
    found = quantized(model)
    assert len(nodes_of(found.graph, {aten.batch_norm.default})) == 1
    assert set(found.layer_bits()) == {name for name, value in made(model).named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("fields", [{"activation_mode": "dynamic"}, {"activation_bits": None}], ids=str)
def test_norms_stay_real_where_sums_do(fields: dict[str, Any], quantized: Callable[..., QuantizedModel]) -> None:
    assert len(nodes_of(quantized(Dense, **fields).graph, {aten.batch_norm.default})) == 4


def test_a_norm_of_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = made(Dense)
    model.get_submodule("bn2").running_var[3] = torch.nan
    with pytest.raises(NotFinite):
        PTQ(calibration_samples=20).apply(model, context(tmp_path, task=Noise(inputs=INPUTS)))


def test_a_shift_too_large_for_its_factor_keeps_its_precision(tmp_path: Path) -> None:
    model = made(Dense)
    with torch.no_grad():
        model.get_submodule("bn2").weight[2:6] = torch.tensor([1e-6, 1e-9, 1e-42, 0.0])
    found = PTQ(calibration_samples=20).apply(model, context(tmp_path, task=Noise(inputs=INPUTS)))
    wanted = model(INPUTS).detach()
    reference = IntegerInterpreter(found.graph)(INPUTS)
    assert (reference - wanted).std() < 0.03 * wanted.std()
    assert torch.allclose(outputs(OnnxRuntime(batch_size=20), found, tmp_path, INPUTS), reference, atol=1e-5)


def test_biases_of_layers_are_corrected_around_norms(quantized: Callable[..., QuantizedModel]) -> None:
    wanted = made(Dense)(INPUTS).detach()
    plain, corrected = (quantized(Dense, weight_bits=4, bias_correction=on) for on in (False, True))
    errors = [(model.graph(INPUTS) - wanted).mean(0).abs().mean() for model in (plain, corrected)]
    assert errors[1] < errors[0]


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
    kind = apply(function, nn.ConvTranspose2d(8, 6, 3, 2, groups=2, dilation=2), nn.Conv2d(6, 8, 3))
    found = context(tmp_path, task=Noise(inputs=INPUTS))
    model = PTQ(calibration_samples=20).apply(made(kind), found)
    (up,) = nodes_of(model.graph, {aten.conv_transpose2d.input})
    assert source(up).target is DEQUANTIZE
    set_constant(model.graph, str(source(up, 1).target), torch.randn(8, 3, 3, 3) ** 9)
    wanted = IntegerInterpreter(model.graph)(INPUTS)
    given = outputs(OnnxRuntime(batch_size=20), model, tmp_path, INPUTS)
    torch.testing.assert_close(given, wanted, atol=1e-3 * wanted.std().item(), rtol=0)
