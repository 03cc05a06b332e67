from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Noise, context, digits, network
from test_schema import fits
from torch import Tensor, nn

from qsweep.errors import NotFinite, Refused, SpecError
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.nodes import set_constant
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.measure.sizes import work
from qsweep.quantize import _sensitivity
from qsweep.quantize._allocate import allocate
from qsweep.quantize._arithmetic import weight_levels
from qsweep.quantize.mixed import Mixed
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.records import Record
from qsweep.schema import json_schema
from qsweep.space import Choice, assignments
from qsweep.spec import load_spec
from qsweep.tasks.base import Samples
from qsweep.track.flat import params

INPUTS = Noise(50).inputs
KINDS = ["kl", "output_error", "fisher"]


def mixed(**changes: Any) -> Mixed:
    return Mixed.model_validate({"calibration_samples": 60, "sensitivity_samples": 40} | changes)


def bits_of(model: QuantizedModel) -> dict[str, int]:
    return {layer.name: layer.weight_bits for layer in model.layers()}


def average(model: QuantizedModel) -> float:
    layers = model.layers()
    return sum(layer.weight.numel() * layer.weight_bits for layer in layers) / sum(
        layer.weight.numel() for layer in layers
    )


# --- the programme ----------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[dict[int, float]], list[int], float]:
    widths = draw(st.lists(st.integers(2, 8), min_size=1, max_size=4, unique=True))
    sizes = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=4))
    score = st.floats(0, 1e3, allow_subnormal=False)
    scores = [{bits: draw(score) for bits in widths} for _ in sizes]
    return scores, sizes, draw(st.floats(2, 8))


def costs(sizes: list[int], chosen: tuple[int, ...]) -> int:
    return sum(size * bits for size, bits in zip(sizes, chosen, strict=True))


@settings(deadline=None)  # the first one imports scipy
@given(problems())
def test_no_choice_of_bits_within_the_budget_has_a_smaller_score(
    problem: tuple[list[dict[int, float]], list[int], float],
) -> None:
    scores, sizes, average_bits = problem
    budget = average_bits * sum(sizes)
    fit = [chosen for chosen in itertools.product(*scores) if costs(sizes, chosen) <= budget]
    if not fit:
        with pytest.raises(Refused, match=r"`average_bits`: must be at least .* for this model"):
            allocate(scores, sizes, average_bits)
        return
    found = tuple(allocate(scores, sizes, average_bits))
    totals = [sum(options[bits] for options, bits in zip(scores, chosen, strict=True)) for chosen in (*fit, found)]
    assert found in fit
    assert totals[-1] <= min(totals) + 1e-9 * max(max(options.values()) for options in scores)  # the solver's precision


def test_a_budget_that_is_too_small_is_refused_with_the_least_that_fits() -> None:
    scores, sizes = [{2: 1.0, 4: 0.5}, {3: 1.0}], [100, 200]
    with pytest.raises(Refused, match=r"must be at least 2\.667 for this model \(got 2\.5\)"):
        allocate(scores, sizes, 2.5)
    assert allocate(scores, sizes, 2.667) == [2, 3]


# --- the scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pools", "depthwise", "shortcut", "sequence"])
def test_a_score_is_the_error_of_the_model_with_that_layer_alone_rounded(name: str, tmp_path: Path) -> None:
    found = context(tmp_path)
    graph = float_graph(network(name), found)
    samples = Samples(INPUTS, Noise(50).labels)
    scores = _sensitivity.scored(mixed(sensitivity="output_error", candidates=[2, 5]), graph, found.task, samples)
    wanted = graph.graph(INPUTS)
    assert len(scores) == len(graph.layers())
    for layer in graph.layers():
        for bits, score in scores[layer.name].items():
            levels = weight_levels(layer.weight, bits)
            set_constant(graph.graph, layer.name, levels.real(levels.integers(layer.weight)).detach())
            error = (graph.graph(INPUTS) - wanted).square().sum() / wanted.square().sum()
            torch.testing.assert_close(score, error.item(), atol=1e-9, rtol=1e-3)
        set_constant(graph.graph, layer.name, layer.weight.detach())


def flat_linear(outputs: int = 10) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)).eval()


def test_the_divergence_is_that_of_the_softmax(tmp_path: Path) -> None:
    model, found = flat_linear(), context(tmp_path)
    scores = _sensitivity.sensitivity(
        mixed(sensitivity="kl", sensitivity_samples=200), float_graph(model, found), found
    )
    weight, bias = model.get_parameter("1.weight").data, model.get_parameter("1.bias").data
    levels, rows = weight_levels(weight, 3), Noise().inputs.flatten(1)
    first, second = (
        F.softmax(F.linear(rows, each, bias).double(), 1) for each in (weight, levels.real(levels.integers(weight)))
    )
    wanted = (first * (first / second).log()).sum(1).mean().item()
    assert scores["1.weight"][3] == pytest.approx(wanted, rel=1e-4)


def test_classes_of_tokens_are_those_that_labels_number() -> None:
    found, wanted = torch.randn(2, 8, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.zeros(8, 5, dtype=torch.long)
    flat = _sensitivity._divergence(found.reshape(-1, 3), wanted.reshape(-1, 3), None, labels.flatten())
    assert _sensitivity._divergence(found, wanted, None, labels).item() == pytest.approx(flat.item())


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_samples(tmp_path: Path) -> None:
    model, task = flat_linear(), Noise()
    found = context(tmp_path, task=task)
    config = mixed(sensitivity="fisher", sensitivity_samples=200)
    scores = _sensitivity.sensitivity(config, float_graph(model, found), found)
    weight, rows = model.get_parameter("1.weight").data, task.inputs.flatten(1)
    residual = F.softmax(model(task.inputs), 1).detach() - F.one_hot(task.labels, 10)
    fisher = (residual[:, :, None] * rows[:, None, :]).square().mean(0)  # the gradient of a sample: (p - y) x^T
    levels = weight_levels(weight, 2)
    wanted = (fisher * (levels.real(levels.integers(weight)) - weight).square()).sum().item() / 2
    assert scores["1.weight"][2] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_score_better(kind: str) -> None:
    model, found, _ = digits()
    config = mixed(sensitivity=kind, candidates=[2, 4, 8])
    scores = _sensitivity.sensitivity(config, float_graph(model, found), found)
    assert all(widths[2] > widths[4] > widths[8] >= 0 for widths in scores.values())


def test_scores_are_computed_once_for_all_budgets_and_again_for_other_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    scored = _sensitivity.scored

    def counted(config: Mixed, *rest: Any) -> _sensitivity.Scores:
        runs.append(config)
        return scored(config, *rest)

    monkeypatch.setattr(_sensitivity, "scored", counted)
    for average_bits in (3, 4, 5):
        mixed(average_bits=average_bits, layer_bits={"stem*": 6}, edge_bits=8).apply(
            network("digits_cnn"), context(tmp_path)
        )
    assert len(runs) == 1
    mixed(sensitivity_samples=41).apply(network("digits_cnn"), context(tmp_path))
    mixed().apply(network("digits_cnn"), context(tmp_path, key="another model"))
    assert len(runs) == 3


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average_bits", [2.5, 4.0])
def test_the_weights_have_no_more_bits_on_average_than_the_budget(kind: str, average_bits: float) -> None:
    model, found, _ = digits()
    made = mixed(average_bits=average_bits, sensitivity=kind).apply(model, found)
    assert average_bits - 1 < average(made) <= average_bits
    assert len(set(bits_of(made).values())) > 1


def test_bit_operations_are_no_more_than_those_of_uniform_bits() -> None:
    model, found, _ = digits()
    made = mixed(average_bits=4, budget="bit_operations").apply(model, found)
    uniform = PTQ(weight_bits=4, calibration_samples=60).apply(model, found)
    assert work(made)["bit_operations"] <= work(uniform)["bit_operations"]
    assert bits_of(made) != bits_of(mixed(average_bits=4).apply(model, found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average_bits", [4, 5])
def test_a_trained_model_is_nearer_to_the_float_one_than_with_uniform_bits_of_the_same_bytes(
    average_bits: int, kind: str
) -> None:
    model, found, _ = digits()
    inputs = found.task.transform(found.task.samples("validation").inputs)
    stages = (
        mixed(average_bits=average_bits, sensitivity=kind, activation_bits=None),
        PTQ(weight_bits=average_bits, activation_bits=None),
    )
    made = [stage.apply(model, found) for stage in stages]
    assert average(made[0]) <= average(made[1])
    errors = [F.mse_loss(simulation(each)(inputs), model(inputs)).item() for each in made]
    assert errors[0] < errors[1]


def test_with_one_candidate_it_is_ptq_bit_for_bit(tmp_path: Path) -> None:
    made = mixed(candidates=[4]).apply(network("digits_cnn"), context(tmp_path))
    plain = PTQ(weight_bits=4, calibration_samples=60).apply(network("digits_cnn"), context(tmp_path))
    assert torch.equal(simulation(made)(INPUTS), simulation(plain)(INPUTS))


def test_other_fields_of_ptq_work_with_the_bits_that_were_chosen(tmp_path: Path) -> None:
    model, changes = network("digits_cnn"), {"rounding": "gptq", "bias_correction": True, "activation_bits": None}
    made = mixed(average_bits=3, **changes).apply(model, context(tmp_path))
    plain = mixed(average_bits=3, activation_bits=None).apply(model, context(tmp_path))
    assert bits_of(made) == bits_of(plain)
    for layer in made.layers():
        assert layer.weight.abs().max() <= 2 ** (layer.weight_bits - 1) - 1
    assert not torch.equal(simulation(made)(INPUTS), simulation(plain)(INPUTS))


def test_bits_survive_saving_and_what_is_saved_is_as_small_as_the_bits(tmp_path: Path) -> None:
    model, found, _ = digits()
    made = {bits: mixed(average_bits=bits).apply(model, found) for bits in (3, 6)}
    sizes = {}
    for bits, each in made.items():
        (folder := tmp_path / str(bits)).mkdir()
        save(each, folder)
        assert bits_of(load(folder)) == bits_of(each)
        sizes[bits] = sum(file.stat().st_size for file in folder.rglob("*"))
    weights = sum(layer.weight.numel() for layer in made[3].layers())
    packed = weights * (average(made[6]) - average(made[3])) / 8
    assert sizes[6] - sizes[3] == pytest.approx(packed, rel=0.01)


def test_layers_that_are_settled_count_towards_the_budget(tmp_path: Path) -> None:
    model, changes = network("digits_cnn"), {"edge_bits": 8, "layer_bits": {"down.*": 5}, "candidates": [2, 4]}
    made = mixed(average_bits=4, **changes).apply(model, context(tmp_path))
    assert average(made) <= 4
    stem, residual, down, top, linear = bits_of(made).values()
    assert (stem, down, linear) == (8, 5, 8)
    assert {residual, top} == {2, 4}
    with pytest.raises(Refused, match=r"`average_bits`: must be at least \d"):
        mixed(average_bits=2, **changes).apply(model, context(tmp_path))


class Shared(nn.Module):
    """One convolution twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x))))))
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_a_weight_get_the_same_bits(kind: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Shared().eval()
    made = mixed(average_bits=3, sensitivity=kind, activation_bits=None).apply(model, context(tmp_path))
    twice = [layer for layer in made.layers() if layer.name.startswith("twice")]
    assert len(twice) == 2
    assert twice[0].weight_bits == twice[1].weight_bits
    assert torch.equal(twice[0].weight, twice[1].weight)
    assert average(made) <= 3


@pytest.mark.parametrize(("average_bits", "wanted"), [(2, 2), (4.5, 4), (16, 8)])
def test_a_model_of_one_layer_gets_what_the_budget_allows(average_bits: float, wanted: int, tmp_path: Path) -> None:
    made = mixed(average_bits=average_bits).apply(flat_linear(), context(tmp_path))
    assert list(bits_of(made).values()) == [wanted]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_a_typed_failure(kind: str, value: float, tmp_path: Path) -> None:
    model = network("mlp")
    next(model.parameters()).data[0, 0] = value
    with pytest.raises(NotFinite):
        mixed(sensitivity=kind).apply(model, context(tmp_path))


def test_inputs_that_are_not_finite_are_a_typed_failure(tmp_path: Path) -> None:
    inputs = Noise().inputs.clone()
    inputs[:, 0, 2, 2] = torch.nan
    with pytest.raises(NotFinite, match="on the calibration samples"):
        mixed(activation_bits=None).apply(network("mlp"), context(tmp_path, task=Noise(inputs=inputs)))


class Regression(Noise):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], labels.float())


def test_divergence_of_outputs_that_are_not_logits_is_refused_and_the_others_work(tmp_path: Path) -> None:
    found = replace(context(tmp_path), task=Regression())
    with pytest.raises(Refused, match="`sensitivity`: must be `output_error` or `fisher`"):
        mixed(sensitivity="kl").apply(flat_linear(1), found)
    for kind in ("output_error", "fisher"):
        assert set(bits_of(mixed(sensitivity=kind).apply(flat_linear(1), found)).values()) == {4}


class Pairs(Noise):
    """Contrastive: nothing of a sample that is alone."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.pdist(outputs).sum()


def test_a_loss_that_one_sample_alone_has_none_of_gives_no_fisher_information(tmp_path: Path) -> None:
    found = replace(context(tmp_path), task=Pairs())
    with pytest.raises(Refused, match="`sensitivity`: must be `output_error` or `kl` where the loss of a sample alone"):
        mixed(sensitivity="fisher").apply(flat_linear(3), found)
    assert bits_of(mixed(sensitivity="output_error").apply(flat_linear(3), found))


# --- bits by pattern --------------------------------------------------------------------------------------------------


def test_the_longest_pattern_that_matches_gives_a_layer_its_bits_before_edge_bits(tmp_path: Path) -> None:
    patterns = {"*.conv.weight": 2, "down*": 3, "linear*": 6, "top.conv.weight": 5}
    names = ["stem.conv.weight", "residual.conv.weight", "down.conv.weight", "top.conv.weight", "linear.weight"]
    for order in (patterns, dict(reversed(patterns.items()))):
        config = PTQ(weight_bits=4, edge_bits=8, layer_bits=order)
        assert bits_of(config.apply(network("digits_cnn"), context(tmp_path))) == dict(
            zip(names, [2, 2, 2, 5, 6], strict=True)
        )
        assert config.uid() == PTQ(weight_bits=4, edge_bits=8, layer_bits=patterns).uid()
    made = PTQ(weight_bits=4, edge_bits=8, layer_bits={"down*": 3}).apply(network("digits_cnn"), context(tmp_path))
    assert bits_of(made) == dict(zip(names, [8, 4, 3, 4, 8], strict=True))


def test_training_ends_with_the_bits_of_the_patterns_and_of_the_activations(tmp_path: Path) -> None:
    patterns = {"down*": 2, "top*": 6}
    config = QAT(weight_bits=4, activation_bits=3, layer_bits=patterns, bits_schedule=(8,), epochs=2)
    made = config.apply(network("digits_cnn"), context(tmp_path))
    assert [layer.weight_bits for layer in made.layers()] == [4, 4, 2, 6, 4]
    assert {layer.activation_bits for layer in made.layers()} == {3}


@pytest.mark.parametrize("method", [PTQ, QAT, Mixed])
def test_a_pattern_that_matches_no_layer_is_a_typed_failure(
    method: type[PTQ] | type[QAT] | type[Mixed], tmp_path: Path
) -> None:
    config = method(layer_bits={"0.weight": 4, "layer9.*": 4})
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)).eval()
    with pytest.raises(Refused, match=r"`layer9\.\*` must match the weight of a layer \(there are: 0\.weight, 3\.wei"):
        config.apply(model, context(tmp_path))


SPEC: dict[str, Any] = {
    "name": "by-layer",
    "task": {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": {"method": "digits"}},
    "target": {"engine": "reference"},
}
BY_LAYER = {"method": "ptq", "layer_bits": {"stem.*": 8, "layer1.*": {"choice": [4, 6]}, "*": {"range": [2, 4]}}}


def written(folder: Path, quantize: dict[str, Any]) -> Path:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | {"compress": {"quantize": quantize}}, sort_keys=False))
    return path


def test_bits_by_pattern_are_searched_over(tmp_path: Path) -> None:
    space = load_spec(written(tmp_path, BY_LAYER)).compress
    points = list(assignments(space.tree, "compress"))
    assert len(points) == 2 * 3
    assert all(len(point) == 2 for point in points)
    chosen = space.sample(lambda path, domain: domain.labels[-1] if isinstance(domain, Choice) else domain.low)
    assert isinstance(chosen.quantize, PTQ)
    assert chosen.quantize.layer_bits == {"stem.*": 8, "layer1.*": 6, "*": 2}
    assert fits(SPEC | {"compress": {"quantize": BY_LAYER}}, json_schema())
    wrong = BY_LAYER | {"layer_bits": {"*": {"choice": ["all"]}}}
    assert not fits(SPEC | {"compress": {"quantize": wrong}}, json_schema())


@pytest.mark.parametrize(
    ("quantize", "complaint"),
    [
        (
            {"method": "ptq", "layer_bits": {"*": {"choice": [4, 9]}}},
            r"layer_bits\.\*\.choice\.1`: must be 2 to 8, or 16 \(got 9\)",
        ),
        ({"method": "mixed", "weight_bits": 4}, r"weight_bits`: there is no such key"),
        ({"method": "mixed", "average_bits": {"choice": [2, 4]}, "candidates": [3, 4]}, r"at least the least of"),
        ({"method": "mixed", "candidates": []}, r"candidates`"),
        ({"method": "mixed", "candidates": [4, 4]}, r"candidates`: must be different widths"),
        ({"method": "mixed", "candidates": [4, 16]}, r"they take 8 bits at most"),
    ],
)
def test_bits_that_cannot_be_are_refused_when_the_spec_is_loaded(
    quantize: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=complaint):
        load_spec(written(tmp_path, quantize))


def test_budgets_are_searched_over_and_the_order_of_candidates_does_not_matter(tmp_path: Path) -> None:
    space = load_spec(written(tmp_path, {"method": "mixed", "average_bits": {"choice": [3, 4, 5]}})).compress
    labels = [config.quantize.label() for config in space.configs() if config.quantize]
    assert labels == ["mixed-w3s-a8a", "mixed-w4s-a8a", "mixed-w5s-a8a"]
    assert mixed(candidates=[8, 2, 4]).uid() == mixed(candidates=[2, 4, 8]).uid()


def test_mlflow_takes_the_names_of_every_param() -> None:
    for stage in (PTQ(layer_bits={"layer1.*": 4}), Mixed(average_bits=3.5)):
        config = {"compress": {"quantize": stage.model_dump(mode="json")}, "target": {"engine": "reference"}}
        found = params(
            Record(number=0, uid="", name="", state="complete", config=config, engine="reference", folder="trials/0000")
        )
        assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in found)
        assert found["weight_bits"] == ("3.5" if stage.method == "mixed" else "8")
        assert found["compress.quantize.layer_bits"] == ("{}" if stage.method == "mixed" else "layer1.*: 4")
