"""Activations whose rows set their grids themselves: `activation_mode: token`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layout_networks import Tokens
from networks import Noise, context, digits, network
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines._torch import _calls
from qsweep.engines.cuda import Cuda
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.openvino import OpenVINO
from qsweep.engines.reference import Reference
from qsweep.errors import Refused
from qsweep.evaluate import predict
from qsweep.hub.accumulators import check_accumulators
from qsweep.hub.convert import convert
from qsweep.hub.form import QuantizedModel, layers_of
from qsweep.hub.insert import Place
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import CONVOLUTIONS, LINEARS, QUANTIZE
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.ops import QUANTIZE_DYNAMIC, QUANTIZE_ROWS, row_fake_quantize
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.quantize._fake import FakeActivation
from qsweep.quantize._fake_activations import TokenGrids
from qsweep.quantize._training import finished, prepared, start
from qsweep.quantize.dorefa import DoReFa
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.quantize.trained import Trained
from qsweep.spec import Compression
from qsweep.store import Store

INPUTS = Noise(50).inputs


def by_token(place: Path, name: str = "mlp", **fields: Any) -> QuantizedModel:
    config = PTQ.model_validate({"activation_mode": "token", "calibration_samples": 60} | fields)
    return config.apply(network(name), context(place, name))


@given(seed=st.integers(0, 999), bits=st.integers(2, 8), spread=st.floats(1e-20, 1e20))
def test_a_row_is_rounded_within_half_a_step_of_its_own(seed: int, bits: int, spread: float) -> None:
    high = 2 ** (bits - 1) - 1
    values = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(seed)) * spread
    values[1] *= 1e-3
    found = row_fake_quantize(values, -high, high)
    step = values.abs().amax(-1, keepdim=True) / high
    assert ((found - values).abs() <= step * (0.5 + 1e-5)).all()
    assert all(len(row.unique()) <= 2 * high + 1 for row in found.flatten(0, 1))
    assert torch.equal(found[1, 3:4], row_fake_quantize(values[1, 3:4], -high, high))


def test_rows_that_are_zero_or_not_finite_touch_no_other() -> None:
    values = torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 2.0], [1e-40, 0.0], [3.0, -1.5]])
    found = row_fake_quantize(values, -127, 127)
    assert found.isnan().all(1).tolist() == [False, True, True, False, False]
    assert found[[0, 3]].tolist() == [[0.0, 0.0]] * 2
    torch.testing.assert_close(found[4], values[4], atol=0.02, rtol=0)


def test_gradients_pass_through_rows() -> None:
    values = torch.linspace(-1, 2, 40).reshape(4, 10).requires_grad_()
    row_fake_quantize(values, -7, 7).sum().backward()
    assert values.grad is not None
    assert values.grad.unique().tolist() == [1.0]


@pytest.mark.parametrize("name", ["mlp", "digits_cnn"])
def test_what_linears_read_is_quantized_once_and_what_convolutions_read_stays_real(name: str, tmp_path: Path) -> None:
    model = by_token(tmp_path, name)
    assert nodes_of(model.graph, LINEARS)
    assert all(source(node).target is QUANTIZE_ROWS for node in nodes_of(model.graph, LINEARS))
    assert all(source(node).target is not QUANTIZE_ROWS for node in nodes_of(model.graph, CONVOLUTIONS))
    assert not nodes_of(model.graph, {QUANTIZE, QUANTIZE_DYNAMIC})


@pytest.mark.parametrize("bits", [8, 3])
def test_the_reference_is_the_simulation_but_for_the_order_of_sums(bits: int, tmp_path: Path) -> None:
    model = by_token(tmp_path, activation_bits=bits)
    reference = IntegerInterpreter(model.graph)
    torch.testing.assert_close(reference(INPUTS), simulation(model)(INPUTS), atol=1e-4, rtol=1e-4)
    assert reference.integer_macs > 0


def test_a_sample_gives_the_same_whatever_it_shares_a_batch_with(tmp_path: Path) -> None:
    reference = IntegerInterpreter(by_token(tmp_path, activation_bits=3).graph)
    alone, together = reference(INPUTS[:1]), reference(torch.cat([INPUTS[:1], 40 * INPUTS[1:2]]))[:1]
    assert torch.equal(alone, together)


def test_it_gives_the_same_bits_loaded_again(tmp_path: Path) -> None:
    model = by_token(tmp_path, activation_bits=5)
    (tmp_path / "saved").mkdir()
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(IntegerInterpreter(model.graph)(INPUTS), IntegerInterpreter(again.graph)(INPUTS))
    assert [layer.activation_bits for layer in again.layers()] == [5] * len(model.layers())
    assert not again.dynamic


def test_it_keeps_the_accuracy_of_a_trained_network() -> None:
    model, found, _ = digits()
    quantized = PTQ(activation_mode="token").apply(model, found)
    inputs, labels = found.task.samples("validation")
    scores = [found.task.score(predict(each, found.task, inputs), labels) for each in (model, simulation(quantized))]
    assert scores[1].float().mean() > scores[0].float().mean() - 0.02


def test_every_engine_of_integers_takes_it() -> None:
    config = Compression(quantize=PTQ(activation_mode="token"))
    assert all(engine().refuses(config) is None for engine in (Cuda, Inductor, OnnxRuntime, OpenVINO, Reference))
    assert Float().refuses(config)
    assert Float(simulate=True).refuses(config) is None


@pytest.mark.parametrize("method", [QAT, LSQ, DoReFa])
def test_what_a_training_rounds_is_what_ships(method: type[Trained], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = method(activation_mode="token", weight_bits=4, activation_bits=5, bits_schedule=(8,), epochs=2)
    model, found = Attention().eval(), context(tmp_path, task=Noise(50))
    live = prepared(config, model, found)
    for bits, expected in ((8, 8), (2, 5)):
        start(live.graph, bits, None)
        assert {module.bits for module in live.graph.modules() if isinstance(module, TokenGrids)} == {expected}
    rounded = live.graph(INPUTS)
    save(convert(finished(live)), tmp_path)
    shipped = load(tmp_path)
    assert {source(node).target for node in layers_of(shipped.graph)} == {QUANTIZE_ROWS}
    assert {(layer.weight_bits, layer.activation_bits) for layer in shipped.layers()} == {(4, 5)}
    torch.testing.assert_close(simulation(shipped)(INPUTS), rounded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [QAT, LSQ])
def test_training_wins_back_what_few_bits_lose(method: type[Trained]) -> None:
    model, found, _ = digits()
    fields = {"activation_mode": "token", "weight_bits": 2}
    inputs, labels = found.task.samples("validation")
    accuracy = [
        found.task.score(predict(simulation(config.apply(model, found)), found.task, inputs), labels).float().mean()
        for config in (PTQ.model_validate(fields), method.model_validate(fields | {"epochs": 2}))
    ]
    assert accuracy[1] > accuracy[0] + 0.05


def test_a_relu_stays_before_rows_that_are_symmetric(tmp_path: Path) -> None:
    live = prepared(QAT(activation_mode="token"), network("mlp"), context(tmp_path, "mlp"))
    assert nodes_of(live.graph, {torch.ops.aten.relu.default})
    assert not any(module.rectifies for module in live.graph.modules() if isinstance(module, FakeActivation))


def test_gradients_and_values_of_rows_are_those_of_the_contract() -> None:
    place = Place(("head.weight",), edge=False, rows=True)
    quantizer = TokenGrids(QAT(activation_mode="token", activation_bits=4), place)
    quantizer.watch(2)
    quantizer.start()
    values = (torch.randn(3, 5, 9) * torch.logspace(-20, 20, 15).reshape(3, 5, 1)).requires_grad_()
    found = quantizer(values)
    assert torch.equal(found, row_fake_quantize(values.detach(), -7, 7))
    found.sum().backward()
    assert values.grad is not None
    assert values.grad.unique().tolist() == [1.0]


class Attention(nn.Module):
    """Tokens (B, 8, 8): projections with and without bias, and a weight that two linears share."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(8, 12)
        self.shared, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        found = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        found = self.shared(torch.tanh(self.shared(found)))
        logits: Tensor = self.head(found.mean(1))
        return logits + x[:, 0, :5]


def assert_deployed(engine: EngineConfig, model: QuantizedModel, inputs: Tensor, place: Path, **apart: float) -> None:
    """All that the reference computes in integers `engine` does, too, and its outputs are no further apart."""
    folder = place / "artifact"
    folder.mkdir()
    engine.lower(model, folder, Store(place / "lowered"))
    run, reference = engine.load(folder), IntegerInterpreter(model.graph)
    torch.testing.assert_close(run(inputs), reference(inputs), **apart)
    layers = sum(layer.macs for layer in model.layers() if layer.node.target in LINEARS)
    assert engine.integer_macs(folder, run, inputs) == reference.integer_macs == len(inputs) * layers


@pytest.mark.parametrize("bits", [8, 3])
def test_onnxruntime_gives_the_bits_of_the_reference(bits: int, tmp_path: Path) -> None:
    inputs = torch.cat([INPUTS, torch.zeros(1, 1, 8, 8), 1e-40 * INPUTS[:1], 1e30 * INPUTS[:1]])
    assert_deployed(OnnxRuntime(), by_token(tmp_path, activation_bits=bits), inputs, tmp_path, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "engine"), [(Attention, OnnxRuntime), (Tokens, OnnxRuntime), (Attention, Inductor)], ids=str
)
def test_every_linear_of_a_transformer_is_on_integers(
    kind: type[nn.Module], engine: type[EngineConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = PTQ(activation_mode="token").apply(kind().eval(), context(tmp_path, task=Noise(50)))
    assert_deployed(engine(batch_size=len(INPUTS)), model, INPUTS, tmp_path, atol=0.02, rtol=0)


def test_inductor_multiplies_rows_in_a_kernel_for_signed_integers(tmp_path: Path) -> None:
    """oneDNN has only its reference one for them, a thousand times slower, which patterns of Inductor's would take."""
    folder, engine = tmp_path / "artifact", Inductor(batch_size=len(INPUTS))
    folder.mkdir()
    engine.lower(by_token(tmp_path), folder, Store(tmp_path / "store"))
    called = [name for name in _calls(engine.load(folder), INPUTS) if "mm" in name or "linear" in name]
    assert called == ["aten::_int_mm"] * 2


def test_the_scheme_of_activations_and_calibration_do_not_count() -> None:
    one = PTQ(activation_mode="token", activation_scheme="symmetric", calibration="entropy", calibration_samples=7)
    other = PTQ(activation_mode="token")
    assert one.uid() == other.uid()
    assert one.label() == other.label() == "ptq-w8s-a8s-token"
    assert other.uid() != PTQ(activation_mode="dynamic").uid()


class Wide(nn.Module):
    """One linear of so many inputs that its sums could leave 32 bits."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(count, 2)
        nn.init.constant_(self.linear.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1).repeat(1, self.linear.in_features // 64))  # type: ignore[no-any-return]


def test_sums_that_could_leave_32_bits_are_refused(tmp_path: Path) -> None:
    fits, large = (PTQ(activation_mode="token").apply(Wide(n), context(tmp_path, str(n))) for n in (2**16, 2**18))
    check_accumulators(fits)
    with pytest.raises(Refused, match=r"sums must stay below 2\^31"):
        check_accumulators(large)
