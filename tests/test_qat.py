from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Noise, context, digits, made, network, pruned
from torch import Tensor, nn

from qsweep.config import members
from qsweep.errors import NotFinite, TaskFailure
from qsweep.hub.convert import convert
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import Place
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import constant, nodes_of
from qsweep.hub.ops import DEQUANTIZE_GROUPS, DEQUANTIZE_WEIGHT
from qsweep.hub.simulate import simulation
from qsweep.hub.weights import real_weight
from qsweep.quantize import _calibrate as calibrate
from qsweep.quantize import _training as training
from qsweep.quantize._arithmetic import weight_levels
from qsweep.quantize._begin import begin_rounded
from qsweep.quantize._fake import (
    FakeActivation,
    FakeWeight,
    learned_clip,
    learned_step,
    straight_through,
    straight_through_observed,
)
from qsweep.quantize._norm import FoldedNorm, split_norms
from qsweep.quantize.base import Scheme
from qsweep.quantize.dorefa import DoReFa
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.quantize.trained import Trained
from qsweep.stage import Context
from qsweep.tasks.base import Samples, SplitName

METHODS: tuple[type[Trained], ...] = members(Trained, "qsweep.quantize")
INPUTS = Noise(50).inputs


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.__name__)
def method(request: pytest.FixtureRequest) -> type[Trained]:
    found: type[Trained] = request.param
    return found


def training_graph(config: Trained, model: nn.Module, found: Context) -> QuantizedModel:
    """The graph as it is trained, before its first step."""
    live = training.prepared(config, model, found)
    training.start(live.graph, config.weight_bits, calibrate.calibration_inputs(config, found))
    return live


quarters = st.lists(st.integers(-80, 80), min_size=1, max_size=30)
arriving = st.integers(0, 2**16)
exponents = st.integers(-6, 6)


def backward(outputs: Tensor, seed: int) -> Tensor:
    """Send small random integers back through `outputs`; returns them."""
    gradient = torch.randint(-8, 9, outputs.shape, generator=torch.Generator().manual_seed(seed)).float()
    outputs.backward(gradient)  # type: ignore[no-untyped-call]
    return gradient


def leaf(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


def got(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@settings(deadline=None)  # the first call is slow
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    scale=st.floats(2**-10, 100, width=32),
    bits=st.integers(2, 8),
    zero_point=st.integers(-128, 127),
)
def test_what_is_faked_is_what_is_shipped_bit_for_bit(
    values: list[float], scale: float, bits: int, zero_point: int
) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero_point = max(low, min(high, zero_point))
    shipped = torch.fake_quantize_per_tensor_affine(torch.tensor(values), scale, zero_point, low, high)
    grid = torch.tensor(scale), float(low - zero_point), high - low
    moving = grid[0], torch.tensor(grid[1]), grid[2]
    ends = torch.tensor(grid[1] * scale), torch.tensor((high - zero_point) * scale)
    for outputs in (
        straight_through(leaf(values), *grid),
        straight_through(leaf(values), *moving),
        learned_step(leaf(values), *grid, 1.0),
        learned_step(leaf(values), *moving, 1.0, ends[0]),
        learned_clip(leaf(values), *ends, *grid),
    ):
        assert torch.equal(outputs, shipped)


@settings(deadline=None)  # the first call is slow
@given(quarters=quarters, exponent=exponents, bottom=st.integers(-15, 0), steps=st.integers(1, 15), seed=arriving)
def test_gradients_pass_straight_through_to_half_a_step_beyond_the_grid(
    quarters: list[int], exponent: int, bottom: int, steps: int, seed: int
) -> None:
    values = leaf([2.0**exponent * quarter / 4 for quarter in quarters])
    gradient = backward(straight_through(values, torch.tensor(2.0**exponent), float(bottom), steps), seed)
    inside = torch.tensor([bottom - 0.5 < quarter / 4 < bottom + steps + 0.5 for quarter in quarters])
    assert torch.equal(got(values), gradient * inside)


@settings(deadline=None)  # the first call is slow
@given(quarters=quarters, exponent=exponents, bottom=st.integers(-15, 0), steps=st.integers(1, 15), seed=arriving)
def test_gradients_of_a_learned_step_are_those_of_equations_3_and_5(
    quarters: list[int], exponent: int, bottom: int, steps: int, seed: int
) -> None:
    v, top = torch.tensor(quarters) / 4, bottom + steps
    values, scale = leaf((v * 2.0**exponent).tolist()), leaf(2.0**exponent)
    gradient = backward(learned_step(values, scale, float(bottom), steps, 0.125), seed)
    slope = torch.where(v <= bottom, bottom, torch.where(v >= top, top, v.round() - v))
    assert torch.equal(got(values), gradient * ((v > bottom) & (v < top)))
    torch.testing.assert_close(got(scale), (gradient * slope).sum() * 0.125, atol=1e-4, rtol=1e-5)


@settings(deadline=None)  # the first call is slow
@given(quarters=quarters, exponent=exponents, bottom=st.integers(-15, 0), steps=st.integers(1, 15), seed=arriving)
def test_gradients_of_a_learned_offset_are_those_of_lsq_plus(
    quarters: list[int], exponent: int, bottom: int, steps: int, seed: int
) -> None:
    v, top = torch.tensor(quarters) / 4, bottom + steps
    values, scale, offset = leaf((v * 2.0**exponent).tolist()), leaf(2.0**exponent), leaf(bottom * 2.0**exponent)
    gradient = backward(learned_step(values, scale, torch.tensor(float(bottom)), steps, 0.125, offset), seed)
    inside = (v > bottom) & (v < top)
    slope = torch.where(v <= bottom, 0, torch.where(v >= top, steps, v.round() - v))
    assert torch.equal(got(values), gradient * inside)
    torch.testing.assert_close(got(scale), (gradient * slope).sum() * 0.125, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got(offset), (gradient * ~inside).sum() * 0.125, atol=1e-4, rtol=1e-5)


@settings(deadline=None)  # the first call is slow
@given(quarters=quarters, exponent=exponents, below=st.integers(0, 8), above=st.integers(0, 8), seed=arriving)
def test_gradients_of_a_learned_clip_are_those_of_equation_3(
    quarters: list[int], exponent: int, below: int, above: int, seed: int
) -> None:
    unit, x = 2.0**exponent, torch.tensor(quarters) / 4
    ends = -below, above if (below + above) in (1, 2, 4, 8, 16) else 16 - below  # a power of two apart: exact
    values, low, high = leaf((x * unit).tolist()), leaf(ends[0] * unit), leaf(ends[1] * unit)
    gradient = backward(learned_clip(values, low, high, torch.tensor(unit), float(-below), 3), seed)
    assert torch.equal(got(values), gradient * ((x > ends[0]) & (x < ends[1])))
    torch.testing.assert_close(got(high), (gradient * (x >= ends[1])).sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got(low), (gradient * (x <= ends[0])).sum(), atol=1e-4, rtol=1e-5)


def test_gradients_are_the_same_in_another_layout_and_close_in_bf16() -> None:
    inputs = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    arrives = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for layout, dtype in ((torch.contiguous_format, torch.float32), (torch.channels_last, torch.float32)):
        values, scale = inputs.clone(memory_format=layout).requires_grad_(), leaf(0.3)
        learned_step(values, scale, -4.0, 7, 0.1).backward(arrives)  # type: ignore[no-untyped-call]
        found.append((got(values), got(scale), dtype))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    values, scale = inputs.bfloat16().requires_grad_(), leaf(0.3)
    learned_step(values, scale, -4.0, 7, 0.1).backward(arrives.bfloat16())  # type: ignore[no-untyped-call]
    torch.testing.assert_close(got(scale), found[0][1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["digits_cnn", "mlp", "sequence", "depthwise"])
def test_the_training_graph_gives_the_same_bits_before_and_after_its_norms_are_split(
    name: str, method: type[Trained], tmp_path: Path
) -> None:
    live = training_graph(method(weight_bits=4), network(name), context(tmp_path))
    assert any(isinstance(module, FoldedNorm) for module in live.graph.modules())
    nn.Module.train(live.graph, False)
    with torch.no_grad():
        before = live.graph(INPUTS)
        split_norms(live.graph)
        assert torch.equal(live.graph(INPUTS), before)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_granularity": "tensor"}, {"group_size": 3}, {"group_size": 3, "weight_scheme": "asymmetric"}],
    ids=["channel", "tensor", "groups", "asymmetric"],
)
def test_integers_that_were_trained_are_the_integers_that_are_shipped(
    method: type[Trained], options: dict[str, Any], tmp_path: Path
) -> None:
    live = training_graph(method.model_validate({"weight_bits": 3} | options), network("digits_cnn"), context(tmp_path))
    seen: dict[str, Tensor] = {}
    for node in live.graph.graph.nodes:
        module = live.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FoldedNorm):
            seen[str(node.args[1].target)] = module.shipped(*module.constants(live.graph, node))[0].detach()
        elif isinstance(module, FakeWeight):
            weight = constant(live.graph, node.args[0])
            assert weight is not None
            seen[str(node.args[0].target)] = module(weight).detach()
    found = convert(training.finished(live))
    nodes = nodes_of(found.graph, {DEQUANTIZE_GROUPS if "group_size" in options else DEQUANTIZE_WEIGHT})
    assert len(nodes) == len(seen)
    for node in nodes:
        assert torch.equal(real_weight(found.graph, node), seen[str(node.all_input_nodes[0].target)])


def test_learned_steps_of_groups_are_16_bit_floats_in_training_too() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    quantizer = LSQ(weight_bits=3, group_size=4).weight(Place(("w",), edge=False))
    quantizer.start(weight, 3)
    quantizer.get_parameter("steps").data *= 1.0009
    outputs = quantizer(weight)
    integers, levels = quantizer.integers(weight)
    assert torch.equal(levels.scale.half().float(), levels.scale)
    assert not torch.equal(levels.scale.flatten(), quantizer.get_parameter("steps"))
    assert torch.equal(outputs, levels.real(integers))
    outputs.sum().backward()
    assert (got(quantizer.get_parameter("steps")) != 0).any()


class Watched(Noise):
    """Real digits, with the losses that were seen."""

    def __init__(self, count: int) -> None:
        images, labels = digits()[1].task.samples("train")
        super().__init__(inputs=digits()[1].task.transform(images[:count]))
        self.labels, self.losses = labels[:count], list[float]()

    def samples(self, split: SplitName) -> Samples:
        return Samples(self.inputs, self.labels)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        value = super().loss(outputs, labels)
        self.losses.append(value.item())
        return value


def test_training_lowers_the_loss_moves_the_statistics_and_keeps_zeros(method: type[Trained], tmp_path: Path) -> None:
    task = Watched(640)
    model = pruned()
    model.load_state_dict(digits()[0].state_dict())
    keep = {name: p == 0 for name, p in pruned().named_parameters() if p.dim() == 4}
    for name, parameter in model.named_parameters():
        if name in keep:
            parameter.data[keep[name]] = 0.0
    found = replace(context(tmp_path, task=task))
    plain = PTQ(weight_bits=3, calibration_samples=60).apply(model, found)
    trained = method(weight_bits=3, epochs=2, calibration_samples=60).apply(model, found)
    losses = [super(Watched, task).loss(simulation(each)(task.inputs), task.labels).item() for each in (plain, trained)]
    assert losses[1] < 0.7 * losses[0]
    assert sum(task.losses[-5:]) < sum(task.losses[:5])
    stored = {layer.name: layer.weight for layer in trained.layers()}
    assert all((stored[name][zeros] == 0).all() for name, zeros in keep.items())


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_grid_of_the_inputs_is_not_learned_and_nothing_goes_back_to_them(
    method: type[Trained], scheme: Scheme, tmp_path: Path
) -> None:
    config = method(weight_bits=4, activation_bits=4, activation_scheme=scheme)
    live = training_graph(config, network("digits_cnn"), context(tmp_path))
    fakes = [module for module in live.graph.modules() if isinstance(module, FakeActivation)]
    of_inputs, others = [fake for fake in fakes if fake.place.inputs], [fake for fake in fakes if not fake.place.inputs]
    assert len(of_inputs) == 1
    assert of_inputs[0].penalty() is None
    assert not any(parameter.requires_grad for parameter in of_inputs[0].parameters())
    assert all(parameter.requires_grad for fake in others for parameter in fake.parameters())
    seen: list[bool] = []
    of_inputs[0].register_forward_hook(lambda module, given, rounded: seen.append(rounded.requires_grad))
    live.graph(INPUTS).sum().backward()
    assert seen == [False]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_the_batches(momentum: float | None, tmp_path: Path) -> None:
    model: Any = network("digits_cnn")
    model.stem.bn.momentum = momentum
    live = training_graph(QAT(), model, context(tmp_path))
    before = live.graph.get_buffer("stem.bn.running_mean").clone()
    nn.Module.train(live.graph, True)
    live.graph(INPUTS)
    after = live.graph.get_buffer("stem.bn.running_mean")
    outputs = live.graph.get_parameter("stem.conv.weight")
    assert outputs.requires_grad
    assert not torch.equal(before, after)
    mean = torch.nn.functional.conv2d(INPUTS, outputs, padding=1).mean((0, 2, 3))
    torch.testing.assert_close(after, (0.9 * before + 0.1 * mean).detach(), atol=0.02, rtol=0)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # its own, inside the compiler
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_training_graph_compiles_whole_and_to_the_same_gradients(
    method: type[Trained], scheme: Scheme, tmp_path: Path
) -> None:
    found = []
    for compiled in (False, True):
        config = method(weight_bits=4, activation_bits=4, activation_scheme=scheme)
        live = training_graph(config, network("digits_cnn" if scheme == "symmetric" else "mlp"), context(tmp_path))
        nn.Module.train(live.graph, True)
        run = torch.compile(live.graph, fullgraph=True, backend="aot_eager") if compiled else live.graph
        run(INPUTS).square().mean().backward()
        found.append({name: got(value) for name, value in live.graph.named_parameters() if value.grad is not None})
    torch.compiler.reset()
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


class Interrupted(Noise):
    """Its loss is interrupted once, after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__(130)
        self.left, self.steps = after, 0

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.left, self.steps = self.left - 1, self.steps + 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().loss(outputs, labels)


@pytest.mark.parametrize("after", [5, 11])
def test_a_training_that_was_killed_goes_on_to_the_same_bits(method: type[Trained], after: int, tmp_path: Path) -> None:
    config = method(weight_bits=3, activation_bits=4, epochs=4, bits_schedule=(8,), calibration_samples=60)
    whole, task = Interrupted(0), Interrupted(after)  # 3 steps an epoch, 2 epochs at 8 bits, 2 at 3
    expected = config.apply(network("mlp"), context(tmp_path / "whole", task=whole))
    with pytest.raises(KeyboardInterrupt):
        config.apply(network("mlp"), context(tmp_path, task=task))
    assert len(list(tmp_path.rglob("*.pt"))) > 0
    found = config.apply(network("mlp"), context(tmp_path, task=task))
    assert (whole.steps, task.steps) == (12, 12 + (after - 1) % 3 + 1)
    assert torch.equal(simulation(found)(INPUTS), simulation(expected)(INPUTS))
    assert not list(tmp_path.rglob("*checkpoints*"))


def test_bits_fall_to_those_of_the_config(tmp_path: Path) -> None:
    config = LSQ(weight_bits=2, activation_bits=4, edge_bits=8, epochs=4, bits_schedule=(8, 4, 2))
    assert (config.widths(), config.epochs_at()) == ([8, 4, 2], [1, 1, 2])
    seen: list[list[int]] = []
    live = training.prepared(config, network("digits_cnn"), context(tmp_path))
    for bits in config.widths():
        training.start(live.graph, bits, INPUTS)
        quantizers = [module for module in live.graph.modules() if isinstance(module, FakeWeight | FakeActivation)]
        seen.append(sorted({quantizer.bits for quantizer in quantizers}))
        widths = {(q.grid().high - q.grid().low).bit_length() for q in quantizers if isinstance(q, FakeActivation)}
        assert widths == {max(bits, 4), 8}
    assert seen == [[8], [4, 8], [2, 4, 8]]
    layers = config.apply(network("digits_cnn"), context(tmp_path)).layers()
    assert [layer.weight_bits for layer in layers] == [8, *[2] * (len(layers) - 2), 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"bits_schedule": (4, 8)}, "must be falling"), ({"bits_schedule": (8, 4), "epochs": 2}, "at least 3")],
)
def test_a_schedule_of_bits_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSQ.model_validate({"weight_bits": 2, "epochs": 9} | fields)


def test_a_loss_that_is_not_finite_is_a_typed_failure_and_leaves_nothing(method: type[Trained], tmp_path: Path) -> None:
    class Diverging(Noise):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().loss(outputs, labels) * torch.inf

    with pytest.raises(NotFinite, match="training loss"):
        method().apply(network("mlp"), context(tmp_path, task=Diverging()))
    assert not list(tmp_path.rglob("*checkpoints*"))


class OneChannel(nn.Module):
    """A layer of one channel, a channel of zeros, and two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.bn = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.shared, self.other = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.other.weight = self.shared.weight
        self.norms = nn.ModuleList([nn.BatchNorm2d(1), nn.BatchNorm2d(1)])
        self.linear = nn.Linear(64, 10)
        self.linear.weight.data[3] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.one(x)).relu()
        x = self.norms[1](self.other(self.norms[0](self.shared(x)).relu()))
        logits: Tensor = self.linear(x.flatten(1))
        return logits


def test_one_channel_zeros_and_shared_weights_train(method: type[Trained], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneChannel().eval()
    found = method(weight_bits=4, epochs=1, calibration_samples=60).apply(model, context(tmp_path))
    assert [layer.weight_bits for layer in found.layers()] == [4] * 4
    assert (found.layers()[-1].weight[3] == 0).all()
    assert simulation(found)(INPUTS).isfinite().all()


def test_ranges_are_calibrated_with_the_statistics_of_the_norms_which_stay(method: type[Trained]) -> None:
    model, found, _ = digits()
    live = training.prepared(method(calibration_samples=129), model, found)  # the last of its batches is one sample
    before = {name: value.clone() for name, value in live.graph.named_buffers() if "running" in name}
    training.start(live.graph, 8, calibrate.calibration_inputs(method(calibration_samples=129), found))
    assert before
    assert all(torch.equal(value, dict(live.graph.named_buffers())[name]) for name, value in before.items())


@pytest.mark.parametrize("cut", [0, 2])
def test_what_is_frozen_stays_frozen(cut: int, tmp_path: Path) -> None:
    frozen = (
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3)), nn.Conv2d(6, 6, 1), nn.ReLU(),
    )  # fmt: skip
    model = nn.Sequential(*frozen, nn.Flatten(), nn.Linear(96, 10)).eval()
    for layer in frozen:
        layer.requires_grad_(False)
    for parameter in frozen[5].parameters():
        parameter[:cut] = 0.0
    live = training.prepared(QAT(), model, context(tmp_path))
    learned = {name: value.shape for name, value in live.graph.named_parameters() if value.requires_grad}
    assert learned == {"8.weight": (10, 16 * (6 - cut)), "8.bias": (10,)}


def test_a_model_that_is_all_frozen_is_refused(method: type[Trained], tmp_path: Path) -> None:
    model = network("digits_cnn").requires_grad_(False)
    with pytest.raises(TaskFailure, match=r"`requires_grad` to be trained \(all are frozen\)"):
        method().apply(model, context(tmp_path))


class PreActivated(nn.Module):
    """Norms on the input and on a sum, which no layer takes in, and one without statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.norm = nn.BatchNorm2d(1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.loose = nn.BatchNorm2d(4, track_running_stats=False)
        self.linear = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.given(x))
        x = x + self.loose(self.second(torch.relu(self.norm(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def test_norms_that_no_layer_takes_in_stay_live_in_training_and_are_shipped(tmp_path: Path) -> None:
    config, found = QAT(calibration_samples=50), context(tmp_path)
    live = training.prepared(config, PreActivated().eval(), found)
    training.start(live.graph, 8, calibrate.calibration_inputs(config, found))
    for module in live.graph.modules():
        module.training = True
    names = ("given.running_mean", "norm.running_mean")
    before = [live.graph.get_buffer(name).clone() for name in names]
    live.graph(INPUTS + 1)
    assert not any(torch.equal(live.graph.get_buffer(name), old) for name, old in zip(names, before, strict=True))
    for module in live.graph.modules():
        module.training = False
    trained = live.graph(INPUTS)
    shipped = convert(training.finished(live))
    assert len(nodes_of(shipped.graph, {aten.batch_norm.default})) == 2  # the other one reads and gives integers
    assert (shipped.graph(INPUTS) - trained).std() < 0.01 * trained.std()


class Blurred(nn.Module):
    """A convolution whose weights are no parameter."""

    blur: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 3, 3), nn.Linear(48, 10)
        self.register_buffer(
            "blur", torch.tensor([[1.0, 2.0, 1.0], [3.0, 6.0, 3.0], [2.0, 4.0, 2.0]]).repeat(3, 1, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.conv(x).relu(), self.blur, groups=3)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


@pytest.mark.parametrize("fields", [{}, {"weight_scheme": "asymmetric"}, {"group_size": 3}, {"edge_bits": 8}], ids=str)
@pytest.mark.parametrize("name", ["depthwise", "shortcut", "computed", "blurred"])
def test_a_training_begins_with_the_integers_that_rounding_has_chosen(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"weight_bits": 3, "activation_bits": 8, "calibration_samples": 50, "rounding": "gptq"} | fields
    model = made(Blurred) if name == "blurred" else network(name)
    config, found = LSQ.model_validate(shared), context(tmp_path)
    live = training.prepared(config, model, found)
    begin_rounded(live.graph, config.starts_from(), model, found)
    zeros = {key: int((value == 0).sum()) for key, value in live.graph.named_parameters()}
    assert zeros == {
        key: int((value == 0).sum()) for key, value in training.prepared(config, model, found).graph.named_parameters()
    }
    training.start(live.graph, 3, calibrate.calibration_inputs(config, found))
    begun, rounded = convert(training.finished(live)), config.starts_from().apply(model, found)
    for ours, theirs in zip(begun.layers(), rounded.layers(), strict=True):
        live_channels = real_weight(rounded.graph, theirs.node.args[1]).flatten(1).abs().amax(1) > 1e-6
        assert torch.equal(ours.weight[live_channels], theirs.weight[live_channels])


def test_what_rounding_cannot_begin_is_refused() -> None:
    for fields in ({"bits_schedule": [8], "epochs": 2, "weight_bits": 4}, {"weight_granularity": "tensor"}):
        with pytest.raises(ValueError, match="`rounding` must be `nearest` where"):
            LSQ.model_validate({"rounding": "gptq"} | fields)


@settings(deadline=None)  # the first call is slow
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=20), seed=arriving, bits=st.integers(2, 8))
def test_dorefa_rounds_the_tanh_of_weights_and_its_gradient_is_that_of_equation_9(
    values: list[float], seed: int, bits: int
) -> None:
    weight = leaf([values])
    quantizer = DoReFa(weight_bits=bits).weight(Place(("w",), edge=False))
    outputs = quantizer.rounded(weight)
    gradient = backward(outputs, seed)
    bent = torch.tanh(weight.detach())
    levels = weight_levels(bent, bits)
    assert torch.equal(outputs, levels.real(levels.integers(bent)))
    inside = gradient * (1 - bent.square())  # all lies within the grid
    torch.testing.assert_close(got(weight), inside)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_norms_that_dorefa_folds_in_bend_no_weights(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    model[0].weight.data *= 0.2  # tanh hardly bends it
    model[1].running_var.fill_(0.0025)  # type: ignore[union-attr, operator]
    config = DoReFa.model_validate({"calibration_samples": 50, "weight_granularity": granularity})
    live, wanted = training_graph(config, model, context(tmp_path)), model(INPUTS)
    assert (live.graph(INPUTS) - wanted).std() < 0.02 * wanted.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bottom", [0.0, -3.0, "tensor"])
def test_rounding_and_looking_for_extremes_in_one_pass_are_what_they_are_apart(dtype: torch.dtype, bottom: Any) -> None:
    values = torch.randn(3, 7, 41, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    scale, low = torch.tensor(0.3), torch.tensor(-5.0) if bottom == "tensor" else bottom
    outputs, least, most = straight_through_observed(values, scale, low, 7, rectified=bottom == 0.0)
    alone = straight_through(values, scale, low, 7, rectified=bottom == 0.0)
    assert torch.equal(outputs, alone)
    assert (least, most) == (values.min().float(), values.max().float())
    gradients = [torch.autograd.grad(each.float().square().sum(), values)[0] for each in (outputs, alone)]
    assert torch.equal(*gradients)
    values = values.detach().clone()
    values[0, 0, 0] = torch.nan
    assert straight_through_observed(values, scale, low, 7)[1].isnan()
