from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from networks import Noise, context, network, pruned, shared
from networks import made as made_network
from torch import Tensor, nn

from qsweep.config import members
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.hub.form import Layer, QuantizedModel, weight_bits_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.ops import DEQUANTIZE_WEIGHT, STORED
from qsweep.hub.simulate import simulation
from qsweep.hub.weights import real_weight
from qsweep.quantize import Quantization
from qsweep.quantize import _calibrate as calibrate
from qsweep.quantize._arithmetic import activation_grid, weight_levels
from qsweep.quantize.base import Scheme, Uniform
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.mixed import Mixed
from qsweep.quantize.pact import PACT
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.spec import Compression

METHODS: tuple[type[Quantization], ...] = members(Quantization, "qsweep.quantize")
UNIFORM = [method for method in METHODS if issubclass(method, Uniform)]
INPUTS = Noise(50).inputs


def weights(model: QuantizedModel) -> dict[str, tuple[Tensor, int]]:
    """Integer weights and their bits, by name."""
    found = {}
    for node in nodes_of(model.graph, {DEQUANTIZE_WEIGHT}):
        integers = constant(model.graph, node)
        assert integers is not None
        found[str(node.all_input_nodes[0].target)] = integers, weight_bits_of(node)
    return found


def real(model: QuantizedModel, layer: Layer) -> Tensor:
    """The weights of `layer` as numbers."""
    stored = source(layer.node, 1)
    return real_weight(model.graph, stored) if stored.target in STORED else layer.weight


def small(method: type[Quantization], **changes: Any) -> Quantization:
    fields = {"calibration_samples": 60} if "calibration_samples" in method.model_fields else {}
    return method.model_validate(fields | changes)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.__name__)
def method(request: pytest.FixtureRequest) -> type[Quantization]:
    found: type[Quantization] = request.param
    return found


@pytest.fixture(scope="module")
def made(method: type[Quantization], tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    return small(method).apply(pruned(), context(tmp_path_factory.mktemp("made")))


def test_integer_weights_lie_on_the_grid_of_their_bits(made: QuantizedModel) -> None:
    for integers, bits in weights(made).values():
        assert integers.dtype is torch.int8
        assert integers.abs().max() <= 2 ** (bits - 1) - 1


def test_real_weights_take_no_more_values_than_their_bits_allow(made: QuantizedModel) -> None:
    for layer in made.layers():
        if layer.weight_bits <= 8:
            assert all(len(set(row.tolist())) <= 2**layer.weight_bits for row in real(made, layer).flatten(1))


def test_what_is_not_for_integers_is_refused_by_their_engines_and_runs_in_float(
    method: type[Quantization], made: QuantizedModel, tmp_path: Path
) -> None:
    config = Compression(quantize=small(method))  # type: ignore[arg-type]
    engine = Float(batch_size=len(INPUTS), compile=False)
    if not small(method).in_float:
        assert all(each().refuses(config) is None for each in (Reference, Inductor, OnnxRuntime))
        assert engine.refuses(config)
        return
    assert all("`float`" in (each().refuses(config) or "") for each in (Reference, Inductor, OnnxRuntime))
    assert engine.refuses(config) is None
    engine.lower(made, tmp_path, context(tmp_path / "store").store)
    torch.testing.assert_close(engine.load(tmp_path)(INPUTS), simulation(made)(INPUTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("uniform", UNIFORM, ids=lambda method: method.__name__)
def test_weight_bits_are_those_of_the_config(uniform: type[Quantization], bits: int, tmp_path: Path) -> None:
    found = weights(small(uniform, weight_bits=bits).apply(network("mlp"), context(tmp_path)))
    assert [width for _, width in found.values()] == [bits] * 2
    assert all(integers.abs().max() == 2 ** (bits - 1) - 1 for integers, _ in found.values())


def test_outputs_are_finite_and_come_for_any_batch_size(made: QuantizedModel) -> None:
    for count in (1, 50):
        found = simulation(made)(INPUTS[:count])
        assert found.shape == (count, 10)
        assert found.isfinite().all()


def test_the_simulation_equals_the_quantize_dequantize_graph_bit_for_bit(made: QuantizedModel) -> None:
    if made.dtype is torch.float32:  # a cast model is simulated in its own type
        assert torch.equal(simulation(made)(INPUTS), copy.deepcopy(made.graph)(INPUTS))


def test_the_uid_is_that_of_the_content(method: type[Quantization]) -> None:
    assert small(method).uid() == small(method).uid()
    assert len({member.model_validate({}).uid() for member in METHODS}) == len(METHODS)


FLOAT = {"activation_bits": None}
DRAW = {"calibration_samples": 7, "calibration_seed": 3}
SAME: list[tuple[type[Quantization], dict[str, Any], dict[str, Any]]] = [
    (PTQ, FLOAT, DRAW | {"calibration": "mse", "activation_scheme": "symmetric", "activation_mode": "dynamic"}),
    (PTQ, {"activation_mode": "dynamic"}, DRAW | {"calibration": "entropy"}),
    (PTQ, {"weight_bits": 8}, {"edge_bits": 8}),
    (PTQ, {"weight_bits": 3, "rounding": "gptq"}, {"rounding": {"method": "gptq"}}),
    (PTQ, {"activation_bits": 16}, {"calibration": "mse"}),
    (LSQ, {"activation_bits": 16}, {"calibration": "entropy"}),
    (Mixed, FLOAT, {"calibration_samples": 7, "calibration": "mse"}),
    (QAT, FLOAT, DRAW | {"calibration": "mse"}),
    (LSQ, {"weight_bits": 4, "epochs": 2, "bits_schedule": (8,)}, {"bits_schedule": (8, 4, 3)}),
    (PACT, FLOAT, {"clip_decay": 0.1}),
    (Codebook, {"weight_bits": 8}, {"edge_bits": 8}),
]


@pytest.mark.parametrize(("method", "fields", "idle"), SAME, ids=str)
def test_configs_that_differ_in_what_counts_for_nothing_are_one_and_do_the_same(
    method: type[Quantization], fields: dict[str, Any], idle: dict[str, Any], tmp_path: Path
) -> None:
    configs = [small(method, **fields), small(method, **fields | idle)]
    assert configs[0].uid() == configs[1].uid()
    made = [config.apply(network("mlp"), context(tmp_path / str(place))) for place, config in enumerate(configs)]
    assert torch.equal(*(simulation(model)(INPUTS) for model in made))


def test_what_samples_decide_keeps_their_draw_in_the_identity() -> None:
    for fields in ({"rounding": "gptq"}, {"bias_correction": True}, {"smooth": 0.5}, {"activation_bits": 8}):
        for draw in DRAW:
            assert PTQ.model_validate(FLOAT | fields).uid() != PTQ.model_validate(FLOAT | fields | {draw: 1}).uid()
    for fields in (FLOAT, {"activation_mode": "token"}):
        for draw in DRAW:
            one, other = fields | {"rounding": "gptq"}, fields | {"rounding": "gptq", draw: 1}
            assert LSQ.model_validate(one).uid() != LSQ.model_validate(other).uid()
    assert Mixed(activation_bits=None).uid() != Mixed(activation_bits=None, calibration_seed=1).uid()


def test_every_switch_and_every_alternative_counts(method: type[Quantization]) -> None:
    few = {"activation_bits": 4} if "activation_bits" in method.model_fields else {}  # where all others count
    for name, field in method.model_fields.items():
        others = [not field.default] if isinstance(field.default, bool) else get_args(field.annotation)
        for value in others if get_origin(field.annotation) is Literal or field.annotation is bool else ():
            if value != field.default and name != "activation_mode":  # trainings refuse all but one
                assert small(method, **few, **{name: value}).uid() != small(method, **few).uid()


def test_weights_that_are_zero_stay_zero(made: QuantizedModel) -> None:
    masks = {name: value == 0 for name, value in pruned().named_parameters() if value.dim() == 4}
    stored = {layer.name: real(made, layer) for layer in made.layers()}
    assert all((stored[name][mask] == 0).all() for name, mask in masks.items())
    assert sum(int(mask.sum()) for mask in masks.values()) > 1000


def test_the_model_that_was_passed_in_is_unchanged(method: type[Quantization], tmp_path: Path) -> None:
    model = network("mlp")
    before = copy.deepcopy(model.state_dict())
    small(method).apply(model, context(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_the_same_seed_gives_the_same_bits(method: type[Quantization], tmp_path: Path) -> None:
    runs = [small(method).apply(network("mlp"), context(tmp_path / str(number))) for number in range(2)]
    assert torch.equal(*(simulation(run)(INPUTS) for run in runs))


@pytest.mark.parametrize("uniform", UNIFORM, ids=lambda method: method.__name__)
def test_more_calibration_samples_than_there_are_means_all(uniform: type[Quantization], tmp_path: Path) -> None:
    found = [
        small(uniform, calibration_samples=count).apply(network("mlp"), context(tmp_path)) for count in (200, 10**6)
    ]
    assert torch.equal(*(simulation(model)(INPUTS) for model in found))


def test_calibration_runs_once_for_all_bit_widths_and_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    see = calibrate.see_extremes

    def counted(graph: torch.fx.GraphModule, inputs: Tensor) -> None:
        runs.append(len(inputs))
        see(graph, inputs)

    monkeypatch.setattr(calibrate, "see_extremes", counted)
    schemes: tuple[Scheme, ...] = ("symmetric", "asymmetric")
    for bits in (2, 5, 8):
        for scheme in schemes:
            config = PTQ(weight_bits=bits, activation_bits=max(4, bits), activation_scheme=scheme)
            config.apply(network("mlp"), context(tmp_path))
    assert runs == [200]
    PTQ().apply(network("mlp"), context(tmp_path, seed=1))
    assert len(runs) == 2


bounds = st.floats(0, 1e6, allow_subnormal=False)
schemes = st.sampled_from(["symmetric", "asymmetric"])


@given(low=bounds, high=bounds, bits=st.integers(2, 8), scheme=schemes)
def test_an_activation_grid_has_zero_on_it_and_covers_the_range_within_a_step(
    low: float, high: float, bits: int, scheme: Scheme
) -> None:
    grid = activation_grid(-low, high, bits, scheme, nonnegative=False)
    assert grid.low <= grid.zero_point <= grid.high
    assert grid.high - grid.low == 2**bits - 1
    assert grid.scale == torch.tensor(grid.scale, dtype=torch.float32).item()
    ends = [(level - grid.zero_point) * grid.scale for level in (grid.low, grid.high)]
    assert ends[0] - grid.scale <= -low * (1 - 1e-6)
    assert high * (1 - 1e-6) <= ends[1] + grid.scale


@given(low=bounds, high=bounds, bits=st.integers(2, 8))
def test_a_symmetric_grid_has_its_zero_in_the_middle(low: float, high: float, bits: int) -> None:
    assert activation_grid(-low, high, bits, "symmetric", nonnegative=False).zero_point == 0


@given(high=bounds, bits=st.integers(2, 8), scheme=schemes)
def test_a_grid_of_values_that_are_never_negative_has_its_zero_at_the_lower_end(
    high: float, bits: int, scheme: Scheme
) -> None:
    grid = activation_grid(0.0, high, bits, scheme, nonnegative=True)
    assert grid.zero_point == grid.low


@pytest.mark.parametrize("bits", [2, 8])
def test_biases_behind_activations_that_are_all_zero_keep_their_precision(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, -1.0)  # behind it all is 0
    made = PTQ(weight_bits=bits, calibration_samples=50).apply(model, context(tmp_path))
    inputs = Noise(10).inputs
    torch.testing.assert_close(simulation(made)(inputs), model(inputs), atol=2e-3, rtol=0)


@given(exponents=st.lists(st.integers(-20, 0), min_size=2, max_size=6), bits=st.integers(2, 8))
def test_a_channel_however_small_has_all_its_levels(exponents: list[int], bits: int) -> None:
    weight = torch.tensor([1.0, -0.5, 0.25]) * 10.0 ** torch.tensor(exponents).unsqueeze(1)
    levels = weight_levels(weight, bits)
    assert (levels.integers(weight).abs().amax(1) == levels.high).all()


matrices = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@example(rows=[[0.0, 0.0, 0.0, 2.0**-149]], bits=2)
@given(rows=matrices, bits=st.integers(2, 8))
def test_a_quantized_weight_is_within_half_a_step(rows: list[list[float]], bits: int) -> None:
    weight = torch.tensor(rows)
    levels = weight_levels(weight, bits)
    error = (levels.real(levels.integers(weight)) - weight).abs()
    assert (levels.scale > 0).all()
    assert (error <= levels.scale * (0.5 + 1e-4)).all()


@given(value=st.floats(-1e3, 1e3, width=32).filter(lambda value: abs(value) > 1e-3), bits=st.integers(2, 8))
def test_a_constant_channel_is_on_the_last_level_and_a_zero_channel_on_zero(value: float, bits: int) -> None:
    weight = torch.stack([torch.full((3, 3), value), torch.zeros(3, 3)])
    integers = weight_levels(weight, bits).integers(weight)
    assert (integers[0].abs() == 2 ** (bits - 1) - 1).all()
    assert (integers[1] == 0).all()


def test_channels_of_zeros_keep_their_bias(tmp_path: Path) -> None:
    model = network("mlp")
    model[4].weight.data[2] = 0.0  # type: ignore[index, union-attr, operator]
    found = simulation(PTQ().apply(model, context(tmp_path)))(INPUTS)[:, 2]
    torch.testing.assert_close(found, model(INPUTS)[:, 2], atol=1e-3, rtol=0)


class LastValue(nn.Module):
    """Adds the last value of its first column, whose range is a hundredth of the others'."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.last = nn.Linear(4, 8), nn.Linear(8, 3), last

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(x))
        found: Tensor = self.last(x) + self.head(hidden[:, -1]) / 100
        return found


LAST: dict[str, Callable[[Tensor], Tensor]] = {
    "step and column": lambda x: x[:, -1, :1],
    "column and step": lambda x: x[:, :, :1][:, -1],
    "steps and column": lambda x: x[:, -1:, 0],
    "one number": lambda x: x[:, -1, 0].unsqueeze(1),
}


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
def test_columns_of_the_input_have_a_grid_of_their_own(last: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    inputs = torch.randn(64, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100, 100, 100])
    torch.manual_seed(0)
    model = LastValue(last).eval()
    with torch.no_grad():
        model.hidden.weight /= 100
    found = PTQ().apply(model, context(tmp_path, task=Noise(inputs=inputs)))
    step = float(inputs[:, -1, 0].max() - inputs[:, -1, 0].min()) / 255
    assert (IntegerInterpreter(found.graph)(inputs) - model(inputs)).abs().max() < 2 * step


class Reversible(nn.Module):
    """Forecasts a series less its own mean, over its deviation; both are put back (Kim et al. 2022, RevIN)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        series = x[:, 0]
        mean, deviation = series.mean(1, keepdim=True), (series.var(1, keepdim=True) + 1e-5).sqrt()
        inner = ((series - mean) / deviation).transpose(1, 2)
        forecast: Tensor = self.narrow(F.relu(self.wide(inner))).transpose(1, 2) * deviation + mean
        return forecast


@pytest.mark.parametrize("level", [0.0, 5.0, 500.0])
def test_a_normalization_that_is_undone_may_have_any_level(level: float) -> None:
    inputs = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(2)
    model = made_network(Reversible)
    found = PTQ(calibration_samples=40).apply(model, shared("Reversible", inputs))
    with torch.no_grad():
        wanted = model(inputs + level)
    torch.testing.assert_close(IntegerInterpreter(found.graph)(inputs + level), wanted, atol=0.05, rtol=0)
