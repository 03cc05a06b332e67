from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Noise, context, digits, network
from torch import Tensor, nn

from qsweep.config import members
from qsweep.hub.convert import convert
from qsweep.hub.form import QuantizedModel, constant, nodes_of
from qsweep.hub.ops import DEQUANTIZE_WEIGHT
from qsweep.hub.simulate import simulation
from qsweep.quantize import _calibrate as calibrate
from qsweep.quantize import _training as training
from qsweep.quantize._fake import FakeWeight, straight_through
from qsweep.quantize._norm import FoldedNorm, split_norms
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


def pruned() -> nn.Module:
    """A network half of whose convolution weights are zero."""
    model = network("digits_cnn")
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data *= torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return model


def training_graph(config: Trained, model: nn.Module, found: Context) -> QuantizedModel:
    """The graph as it is trained, before its first step."""
    live = training.prepared(config, model, found)
    training.start(live.graph, config.weight_bits, calibrate.calibration_inputs(config, found))
    return live


@given(low=st.floats(-10, -0.1), high=st.floats(0.1, 10), bits=st.integers(2, 8))
def test_gradients_pass_straight_through_inside_the_grid_and_stop_outside(low: float, high: float, bits: int) -> None:
    scale = torch.tensor((high - low) / (2**bits - 1))
    bottom, top = float(round(low / scale.item())), float(round(low / scale.item()) + 2**bits - 1)
    ends = [bottom * scale, top * scale]
    values = torch.tensor([*ends, 0.0, 2 * low - scale, 2 * high + scale], requires_grad=True)
    straight_through(values, scale, bottom, top - bottom).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


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


@pytest.mark.parametrize("options", [{}, {"weight_granularity": "tensor"}], ids=["channel", "tensor"])
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
    nodes = nodes_of(found.graph, {DEQUANTIZE_WEIGHT})
    assert len(nodes) == len(seen)
    for node in nodes:
        integers, scale = (constant(found.graph, argument) for argument in node.args[:2])
        assert integers is not None
        assert scale is not None
        name = str(node.all_input_nodes[0].target)
        assert torch.equal(integers * scale.reshape(-1, *[1] * (integers.dim() - 1)), seen[name])


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


def test_running_statistics_follow_the_batches(tmp_path: Path) -> None:
    live = training_graph(QAT(), network("digits_cnn"), context(tmp_path))
    before = live.graph.get_buffer("stem.bn.running_mean").clone()
    nn.Module.train(live.graph, True)
    live.graph(INPUTS)
    after = live.graph.get_buffer("stem.bn.running_mean")
    outputs = live.graph.get_parameter("stem.conv.weight")
    assert outputs.requires_grad
    assert not torch.equal(before, after)
    mean = torch.nn.functional.conv2d(INPUTS, outputs, padding=1).mean((0, 2, 3))
    torch.testing.assert_close(after, (0.9 * before + 0.1 * mean).detach(), atol=0.02, rtol=0)
