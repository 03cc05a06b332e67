from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Noise, context, network
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, fx, nn

from qsweep.errors import NotFinite
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import insert_observers
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import constant, nodes_of
from qsweep.hub.ops import STORED
from qsweep.hub.simulate import simulation
from qsweep.quantize import _patches as windows
from qsweep.quantize import _rounding as rounding
from qsweep.quantize._adaround import adaround
from qsweep.quantize._arithmetic import WeightLevels, weight_levels
from qsweep.quantize._gptq import _by_columns, _inverse_factor, gptq, second_order
from qsweep.quantize._layerwise import Layer, Rounded, rounded_layers
from qsweep.quantize._observers import NearestWeight
from qsweep.quantize._patches import as_rows, groups_of, patches
from qsweep.quantize.ptq import PTQ
from qsweep.space import Space, assignments, complaint
from qsweep.spec import Compression

INPUTS = Noise(50).inputs
OPS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "conv": (aten.conv2d.default, (5, 3, 3, 3), (6, 3, 7, 6), ([2, 1], [1, 1])),
    "dilated": (aten.conv2d.default, (4, 2, 3, 2), (6, 2, 8, 9), ([1, 2], [0, 2], [2, 1])),
    "grouped": (aten.conv2d.default, (4, 3, 1, 3), (6, 6, 4, 5), ([1, 1], [0, 1], [1, 1], 2)),
    "depthwise": (aten.conv2d.default, (4, 1, 3, 3), (6, 4, 5, 5), ([1, 1], [1, 1], [1, 1], 4)),
    "one_channel": (aten.conv2d.default, (1, 2, 2, 2), (6, 2, 5, 5), ()),
    "conv1d": (aten.conv1d.default, (3, 4, 3), (6, 4, 9), ([2], [1])),
    "linear": (aten.linear.default, (4, 6), (30, 6), ()),
    "sequence": (aten.linear.default, (4, 6), (5, 7, 6), ()),
}
"""Op, shape of its weight, shape of its inputs, the arguments after the bias."""
RECTIFIERS = {None: (), aten.relu.default: (), aten.hardtanh.default: (0.0, 6.0)}


def layer(
    kind: str,
    bits: int = 4,
    *,
    rectifier: Any = None,
    bias: bool = True,
    zeros: bool = False,
    seed: int = 0,
    **how: Any,
) -> Layer:
    """A layer of random weights, whose inputs are a little off those of the float model."""
    generator = torch.Generator().manual_seed(seed)
    op, shape, inputs, settings = OPS[kind]
    weight = torch.randn(shape, generator=generator)
    if zeros:
        weight[0] = 0.0
        weight *= torch.rand(shape, generator=generator) < 0.7
    given = torch.randn(shape[0], generator=generator) if bias else None
    exact = torch.randn(inputs, generator=generator)
    graph = fx.Graph()
    arguments = [graph.placeholder("inputs"), graph.placeholder("weight"), graph.placeholder("bias") if bias else None]
    node = graph.call_function(op, (*arguments, *settings))
    graph.output(graph.call_function(rectifier, (node, *RECTIFIERS[rectifier])) if rectifier else node)
    target = op(exact, weight, given, *settings)
    off = exact + 0.1 * torch.randn(inputs, generator=generator)
    return Layer(node, weight, given, off, target, weight_levels(weight, bits, **how))


def nearest(found: Layer) -> Tensor:
    return found.levels.integers(found.weight)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def assert_on_grid(integers: Tensor, levels: WeightLevels) -> None:
    assert torch.equal(integers, integers.round())
    assert integers.min() >= levels.low
    assert integers.max() <= levels.high


layers = st.builds(
    layer,
    st.sampled_from(sorted(OPS)),
    st.sampled_from([2, 3, 4, 8, 16]),
    rectifier=st.sampled_from([*RECTIFIERS]),
    bias=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    per_tensor=st.booleans(),
    group_size=st.sampled_from([None, 2, 3]),
    mse=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(found=layers)
def test_adaround_stays_within_a_level_of_each_weight_and_on_the_grid(found: Layer) -> None:
    chosen = adaround(found, 8, generator())
    assert_on_grid(chosen, found.levels)
    steps = found.weight.reshape(*found.levels.scale.shape, -1) / found.levels.scale.unsqueeze(-1)
    exact = (steps + found.levels.zero_point.unsqueeze(-1)).clamp(found.levels.low, found.levels.high)
    assert (chosen - exact.reshape(chosen.shape)).abs().max() <= 1 + 2**-7  # what float32 leaves of 16 bits
    assert (found.levels.real(chosen)[found.weight == 0] == 0).all()


@settings(max_examples=25, deadline=None)
@given(found=layers)
def test_adaround_never_increases_a_channels_error_against_nearest(found: Layer) -> None:
    after, before = (
        found.errors(found.levels.real(each)) for each in (adaround(found, 8, generator()), nearest(found))
    )
    assert (after <= before).all()


@settings(max_examples=25, deadline=None)
@given(found=layers)
def test_gptq_is_on_the_grid_and_keeps_zeros(found: Layer) -> None:
    chosen = gptq(found, generator())
    assert_on_grid(chosen, found.levels)
    assert (found.levels.real(chosen)[found.weight == 0] == 0).all()


def correlated(width: int, seed: int, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (1, count, width), the Hessian of correlated inputs, their 3 bit scale."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=drawn) @ torch.randn(width, width, generator=drawn)
    inputs = inputs + torch.randn(inputs.shape, generator=drawn)
    weight = torch.randn(1, count, width, generator=drawn)
    scale = (weight.abs().amax(2, keepdim=True) / 3).expand(weight.shape)
    return weight, 2 * (inputs.T @ inputs).double().unsqueeze(0), scale


def hessian_error(difference: Tensor, hessian: Tensor) -> Tensor:
    return torch.einsum("gck,gkl,gcl->gc", difference.double(), hessian, difference.double())


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), seed=st.integers(0, 1000))
def test_gptq_has_no_more_error_in_the_norm_of_the_hessian_than_nearest(width: int, seed: int) -> None:
    weight, hessian, scale = correlated(width, seed)
    chosen = second_order(weight, hessian, scale, torch.zeros_like(scale), -3, 3)
    rounded = (weight * (1 / scale)).round().clamp(-3, 3)
    errors = [hessian_error(weight - integers * scale, hessian) for integers in (chosen, rounded)]
    assert (errors[0] <= errors[1] * (1 + 1e-9)).all()


def test_gptq_lowers_the_error_on_correlated_inputs_by_a_third() -> None:
    weight, hessian, scale = correlated(64, 0)
    chosen = second_order(weight, hessian, scale, torch.zeros_like(scale), -3, 3)
    rounded = (weight / scale).round()
    errors = [hessian_error(weight - integers * scale, hessian).sum() for integers in (chosen, rounded)]
    assert errors[0] < 0.67 * errors[1]


def test_gptq_rounds_as_optimal_brain_surgeon_column_by_column() -> None:
    """The Cholesky factor, in blocks, gives what eliminating each column from the inverse of the Hessian gives."""
    weight, hessian, scale = (value.double() for value in correlated(150, 1))
    zeros = torch.zeros_like(scale)
    found = _by_columns(weight, scale, zeros, _inverse_factor(hessian), -3, 3)
    damped = hessian[0] + 0.01 * hessian[0].diagonal().mean() * torch.eye(150, dtype=torch.float64)
    inverse, left = torch.linalg.inv(damped), weight[0].clone()
    expected = torch.empty_like(left)
    for column in range(150):
        expected[:, column] = (left[:, column] / scale[0, :, column]).round().clamp(-3, 3)
        error = (left[:, column] - expected[:, column] * scale[0, :, column]) / inverse[column, column]
        left -= error.unsqueeze(1) * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_gptq_takes_a_singular_hessian(rank: int) -> None:
    weight, _, scale = correlated(20, 2)
    inputs = torch.randn(rank, 20, generator=generator()).double()
    inputs[:, 3] = 0.0
    hessian = (2 * inputs.T @ inputs).unsqueeze(0)
    chosen = second_order(weight, hessian, scale, torch.zeros_like(scale), -3, 3)
    rounded = (weight * (1 / scale)).round().clamp(-3, 3)
    assert torch.equal(chosen[:, :, 3], rounded[:, :, 3])
    errors = [hessian_error(weight - integers * scale, hessian) for integers in (chosen, rounded)]
    assert (errors[0] <= errors[1]).all()


def least_error(found: Layer) -> Tensor:
    """(C,) errors with the best of all ways to round each weight up or down."""
    levels, width = found.levels, found.weight[0].numel()
    down = (found.weight / levels.scale.reshape(-1, *[1] * (found.weight.dim() - 1))).floor()
    errors = []
    for choice in range(2**width):
        up = torch.tensor([choice >> place & 1 for place in range(width)]).reshape(found.weight.shape[1:])
        errors.append(found.errors(levels.real((down + up).clamp(levels.low, levels.high))))
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("rectifier", [None, aten.relu.default])
def test_adaround_gains_half_of_what_the_best_of_all_choices_gains(rectifier: Any) -> None:
    gained = possible = 0.0
    for seed in range(6):
        found = layer("linear", 3, rectifier=rectifier, seed=seed)
        chosen = adaround(found, 200, generator())
        before, after = (found.errors(found.levels.real(each)).sum().item() for each in (nearest(found), chosen))
        gained += before - after
        possible += before - least_error(found).sum().item()
    assert gained > 0.5 * possible


@pytest.mark.parametrize("most_rows", [1 << 16, 40])
@pytest.mark.parametrize("kind", sorted(OPS))
def test_patches_times_weights_are_the_layers_outputs(
    kind: str, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_MOST_ROWS", most_rows)
    monkeypatch.setattr(windows, "_SAMPLES", 4)
    found = layer(kind)
    exact = Layer(found.node, found.weight, found.bias, found.inputs, found.outputs(found.weight), found.levels)
    inputs, targets = patches(exact, generator())
    assert found.bias is not None
    groups = groups_of(found.node)
    products = inputs @ as_rows(found.weight, groups).mT + found.bias.reshape(groups, 1, -1)
    torch.testing.assert_close(products, targets)
    assert inputs.shape[1] == min(most_rows, exact.target.numel() // len(found.weight))


def stored(model: QuantizedModel) -> dict[str, Tensor]:
    """Integer weights by the name of their layer's node."""
    found = {}
    for node in nodes_of(model.graph, STORED):
        integers = constant(model.graph, node)
        assert integers is not None
        found[next(iter(node.users)).name] = integers
    return dict(sorted(found.items()))


BRIEF = {"method": "adaround", "iterations": 15}


def small(**changes: Any) -> PTQ:
    fields = {"weight_bits": 3, "rounding": BRIEF, "calibration_samples": 60}
    return PTQ.model_validate(fields | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for all tests of the module, so that a network is exported once; `key` is the network's name."""
    return tmp_path_factory.mktemp("rounding")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Rounded]]:
    """What `rounded_layers` returns from now on, call by call."""
    found: list[dict[str, Rounded]] = []

    def kept(*arguments: Any) -> dict[str, Rounded]:
        found.append(rounded_layers(*arguments))
        return found[-1]

    monkeypatch.setattr(rounding, "rounded_layers", kept)
    return found


FORMS: list[dict[str, Any]] = [
    {"activation_bits": None, "weight_scheme": "asymmetric"},
    {"activation_bits": None, "weight_granularity": "tensor", "weight_range": "mse"},
    {"activation_bits": 4, "group_size": 2},
    {"weight_bits": 2, "edge_bits": 8, "bias_correction": True},
    {"weight_bits": 4, "equalize": True},
    {"activation_mode": "dynamic", "layer_bits": {"*": 5}},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@pytest.mark.parametrize("how", [BRIEF, "gptq"], ids=["adaround", "gptq"])
@pytest.mark.parametrize("name", ["depthwise", "sequence"])
def test_the_levels_that_were_chosen_are_the_levels_that_are_shipped(
    name: str, how: Any, form: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watched(monkeypatch)
    config = small(rounding=how, **form)
    model = config.apply(network(name), context(root, key=name))
    shipped = stored(model)
    assert shipped.keys() == found[0].keys()
    for layer_name, rounded in found[0].items():
        assert_on_grid(rounded.integers, rounded.levels)
        assert torch.equal(shipped[layer_name].float(), rounded.integers)
    assert simulation(model)(INPUTS).isfinite().all()
    again = config.apply(network(name), context(root, key=name))
    assert torch.equal(simulation(again)(INPUTS), simulation(model)(INPUTS))
    assert len(found) == 1


@pytest.mark.parametrize("how", [BRIEF, "gptq"], ids=["adaround", "gptq"])
def test_the_same_seed_gives_the_same_bits(how: Any, tmp_path: Path) -> None:
    runs = [small(rounding=how).apply(network("mlp"), context(tmp_path / str(number))) for number in range(2)]
    assert torch.equal(*(simulation(run)(INPUTS) for run in runs))


def test_trials_that_round_alike_compute_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = watched(monkeypatch)
    for changes in ({}, {}, {"bias_correction": True}):
        small(**changes).apply(network("mlp"), context(tmp_path))
    assert len(found) == 1
    others: list[dict[str, Any]] = [
        {"weight_bits": 4},
        {"activation_bits": 4},
        {"rounding": BRIEF | {"iterations": 16}},
        {"rounding": "gptq"},
        {"equalize": True},
        {"calibration_seed": 1},
    ]
    for changes in others:
        small(**changes).apply(network("mlp"), context(tmp_path))
    small().apply(network("mlp"), context(tmp_path, seed=1))
    small().apply(network("mlp"), context(tmp_path, key="another"))
    assert len(found) == 3 + len(others)


class Twice(nn.Module):
    """One linear read twice, the second time by what it has given itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.linear(torch.relu(self.linear(x.flatten(1)))))
        return logits


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_a_weight_that_layers_share_is_rounded_once(
    activation_bits: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: list[str] = []

    def counted(found: Layer, iterations: int, generator: torch.Generator) -> Tensor:
        rounded.append(found.node.name)
        return adaround(found, iterations, generator)

    monkeypatch.setattr(rounding, "adaround", counted)
    torch.manual_seed(0)
    model = small(activation_bits=activation_bits).apply(Twice().eval(), context(tmp_path))
    first, second, _ = stored(model).values()
    assert torch.equal(first, second)
    assert len(rounded) == 2


def test_a_weight_that_the_first_layer_shares_has_the_bits_of_the_edge(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    model[3].weight = model[1].weight
    shipped = stored(small(weight_bits=3, edge_bits=8).apply(model.eval(), context(tmp_path)))
    assert [int(integers.abs().max()) for integers in shipped.values()] == [127, 127, 127]


def kept_layers(into: list[tuple[Layer, Tensor]]) -> Callable[[Layer, torch.Generator], Tensor]:
    def rounded(found: Layer, generator: torch.Generator) -> Tensor:
        into.append((found, second := gptq(found, generator)))
        return second

    return rounded


@pytest.mark.parametrize("name", ["pools", "shortcut", "mlp"])
def test_layers_read_the_rounded_model_and_aim_at_the_float_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Layer, Tensor]] = []
    monkeypatch.setattr(rounding, "gptq", kept_layers(seen))
    found = context(tmp_path)
    config = small(rounding="gptq", activation_bits=None, calibration_samples=200)
    model = config.apply(network(name), found)
    last, integers = seen[-1]
    inputs = found.task.samples("train").inputs
    with torch.no_grad():
        assert torch.equal(last.target, float_graph(network(name), found).graph(inputs))
        assert torch.equal(last.outputs(last.levels.real(integers)), simulation(model)(inputs))
    readers = [next(iter(each.node.users)).target for each, _ in seen]
    assert [not torch.equal(each.rectified(each.target), each.target) for each, _ in seen] == [
        target in (aten.relu.default, aten.relu6.default, aten.hardtanh.default) for target in readers
    ]


@pytest.mark.parametrize("how", [BRIEF, "gptq"], ids=["adaround", "gptq"])
def test_weights_that_are_not_finite_are_a_typed_failure(how: Any, tmp_path: Path) -> None:
    model = network("mlp")
    next(model.parameters()).data[0, 0] = torch.nan
    with pytest.raises(NotFinite):
        small(rounding=how, activation_bits=None).apply(model, context(tmp_path))


@pytest.mark.parametrize("how", [BRIEF, "gptq"], ids=["adaround", "gptq"])
def test_activations_that_are_not_finite_are_a_typed_failure_of_weight_only_rounding_too(
    how: Any, tmp_path: Path
) -> None:
    inputs = INPUTS.clone()
    inputs[3, 0, 2, 2] = torch.inf
    with pytest.raises(NotFinite, match="NaN or infinite on the calibration samples"):
        small(rounding=how, activation_bits=None).apply(network("mlp"), context(tmp_path, task=Noise(inputs=inputs)))


def test_a_channel_of_zeros_and_inputs_of_zeros_are_rounded_to_zero_and_to_nearest(tmp_path: Path) -> None:
    model = network("mlp")
    model[4].weight.data[2] = 0.0  # type: ignore[index]
    for how in (BRIEF, "gptq"):
        config = small(rounding=how)
        shipped = stored(config.apply(model, context(tmp_path, task=Noise(inputs=torch.zeros(20, 1, 8, 8)))))
        plain = stored(small(rounding="nearest").apply(model, context(tmp_path)))
        first, last = shipped
        assert (shipped[last][2] == 0).all()
        assert torch.equal(shipped[first], plain[first])


@pytest.mark.parametrize("how", [BRIEF, "gptq"], ids=["adaround", "gptq"])
def test_both_keep_the_outputs_for_samples_they_have_not_seen_better_than_nearest(how: Any, root: Path) -> None:
    model, found = network("shortcut"), context(root, key="shortcut")
    inputs = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    errors = []
    adaround = {"method": "adaround", "iterations": 200}
    for rounded in ("nearest", how if how == "gptq" else adaround):
        config = small(rounding=rounded, activation_bits=None, calibration_samples=200)
        outputs = simulation(config.apply(model, found))(inputs)
        errors.append((outputs - model(inputs)).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_samples_are_bounded_by_their_memory_and_drawn_evenly(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = float_graph(network("mlp"), context(root, key="mlp"))
    insert_observers(model, lambda place: None, lambda place: NearestWeight(PTQ(), place))
    monkeypatch.setattr(rounding, "_MOST_SAMPLES", 40)
    drawn = rounding._subset(INPUTS, model)
    assert len(drawn) == 40
    assert torch.equal(drawn[[0, -1]], INPUTS[[0, -1]])
    monkeypatch.setattr(rounding, "_MEMORY", 1)
    assert len(rounding._subset(INPUTS, model)) == 2


def test_a_name_is_short_for_the_method_with_its_usual_fields() -> None:
    usual = PTQ.model_validate({"rounding": "adaround"})
    assert usual == PTQ.model_validate({"rounding": {"method": "adaround", "iterations": 1000}})
    assert PTQ.model_validate(usual.model_dump(mode="json")).uid() == usual.uid()
    assert PTQ.model_validate({"rounding": "nearest"}).uid() == PTQ().uid()
    labels = [PTQ.model_validate({"rounding": how}).label() for how in ("nearest", "gptq", "adaround", BRIEF)]
    assert labels == ["ptq-w8s-a8a", "ptq-w8s-a8a-gptq", "ptq-w8s-a8a-adaround", "ptq-w8s-a8a-adaround15"]


def test_steps_of_adaround_are_searched_over_beside_methods_that_have_none() -> None:
    iterations = {"range": [100, 300], "step": 100}
    raw = {
        "method": "ptq",
        "rounding": {"choice": ["nearest", "gptq", {"method": "adaround", "iterations": iterations}]},
    }
    space: Space[Compression] = Space({"quantize": raw}, TypeAdapter(Compression), "compress")
    points = list(assignments(space.tree, "compress"))
    assert len(points) == 5
    assert points[-1] == {
        "compress.quantize.rounding": "adaround",
        "compress.quantize.rounding.adaround.iterations": 300,
    }
    configs = [space.sample(lambda path, domain, point=point: point[path]) for point in points]  # type: ignore[misc]
    assert len({config.uid() for config in configs}) == 5


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("magic", r"rounding\.method`: must be one of"),
        ({"method": "gptq", "iterations": 3}, r"rounding\.gptq\.iterations`: there is no such key"),
        (
            {"method": "adaround", "iterations": 0},
            r"rounding\.adaround\.iterations`: must be greater than or equal to 1",
        ),
    ],
)
def test_fields_of_another_rounding_are_refused(how: Any, wanted: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Compression.model_validate({"quantize": {"method": "ptq", "rounding": how}})
    assert re.search(wanted, complaint(raised.value))
