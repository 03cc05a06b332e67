from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Noise, context, digits, network
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from qsweep.engines.reference import Reference
from qsweep.errors import NotFinite, Refused
from qsweep.hub.convert import convert
from qsweep.hub.export import export, float_graph
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE
from qsweep.hub.nodes import constant, nodes_of, source
from qsweep.hub.norm import fold_batch_norm
from qsweep.hub.simulate import simulation
from qsweep.quantize._bias import correct_biases, mean_outputs
from qsweep.quantize._calibrate import calibrated
from qsweep.quantize._channels import input_maxima, replace_constant
from qsweep.quantize._equalize import equalize, pairs
from qsweep.quantize._smooth import channel_maxima, sites, smooth
from qsweep.quantize.ptq import PTQ

INPUTS = Noise(50).inputs
WEIGHT_ONLY: dict[str, Any] = {"weight_bits": 4, "activation_bits": None}
EVERYTHING: dict[str, Any] = {"equalize": True, "smooth": 0.5, "bias_correction": True}


def graph_of(model: nn.Module) -> QuantizedModel:
    """The folded float graph of `model`."""
    live = export(model, INPUTS[:2])
    return QuantizedModel(fold_batch_norm(live.graph), live.example)


def ranges(model: QuantizedModel) -> list[tuple[Tensor, Tensor]]:
    """Of each pair, (C,) largest absolute weight of each channel that the first makes and the second reads."""
    with torch.no_grad():
        ShapeProp(model.graph).propagate(model.example)
    found = []
    for pair in pairs(model.graph):
        first, second = (constant(model.graph, layer.args[1]) for layer in pair)
        assert first is not None
        assert second is not None
        found.append((first.abs().flatten(1).amax(1), input_maxima(pair.second, second)))
    return found


def constants(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.graph.state_dict().items()}


def chain(*widths: int, between: nn.Module | None = None, bias: bool = True) -> Any:
    """Linears over 64 inputs, with `between` between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for given, made in zip((64, *widths), (*widths, 10), strict=True):
            layers += [nn.Linear(given, made, bias=bias), between or nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Mobile(nn.Module):
    """Expansion, depthwise and grouped projection with ReLU: a chain of pairs whose scales depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 12, 1)
        self.depth = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.project = nn.Conv2d(24, 8, 3, groups=2, stride=2, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.leaky_relu(self.depth(F.relu(self.expand(x)))), 2)
        logits: Tensor = self.head(F.avg_pool2d(F.relu(self.project(x)), 2).flatten(1))
        return logits


class Shared(nn.Module):
    """One linear called twice, between two that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.relu(self.twice(F.relu(self.twice(F.relu(self.first(x.flatten(1))))))))
        return logits


class Attention(nn.Module):
    """Multi-head self-attention; `split` says how queries, keys and values are taken apart."""

    def __init__(self, width: int, heads: int, split: str) -> None:
        super().__init__()
        self.heads, self.split = heads, split
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        given, size = self.qkv(x), width // self.heads
        if self.split == "unbind":
            parts = given.view(batch, time, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            ways = {"chunk": lambda: given.chunk(3, -1), "split": lambda: given.split(width, -1)}
            ways["sizes"] = lambda: given.split([width, width, width], -1)
            parts = [part.view(batch, time, self.heads, size).transpose(1, 2) for part in ways[self.split]()]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, time, width)
        result: Tensor = self.out(mixed)
        return result


class Block(nn.Module):
    def __init__(self, width: int, split: str) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, 2, split)
        self.between, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        result: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return result


class Transformer(nn.Module):
    """Two blocks of a pre-norm encoder over 8 tokens of 8 numbers, the factors of its norms as outliers leave them."""

    def __init__(self, split: str = "unbind") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
            self.blocks, self.norm = nn.Sequential(Block(16, split), Block(16, split)), nn.LayerNorm(16)
            block: Any
            for block in self.blocks:
                for norm in (block.before, block.between):
                    nn.init.normal_(norm.bias)
                    norm.weight.data[3] = 60.0
                for reads in (block.attention.qkv, block.up):
                    reads.weight.data[:, 3] /= 60.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x.squeeze(1)))).mean(1))
        return logits


MODELS = NETWORKS | {"mobile": Mobile, "chain": lambda: chain(20, 1, 20), "shared": Shared, "transformer": Transformer}
COUNTS = {
    "digits_cnn": 2,
    "pools": 0,
    "depthwise": 0,
    "shortcut": 0,
    "sequence": 1,
    "computed": 0,
    "mlp": 1,
    "mobile": 3,
    "chain": 3,
    "shared": 0,
    "transformer": 0,
}


def model_of(name: str) -> nn.Module:
    if name in NETWORKS:
        return network(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: nn.Module = MODELS[name]()
        return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_equalization_keeps_the_outputs_and_finds_the_pairs(name: str) -> None:
    graph = graph_of(model_of(name))
    before = graph.graph(INPUTS)
    assert equalize(graph) == COUNTS[name]
    torch.testing.assert_close(graph.graph(INPUTS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["digits_cnn", "mobile", "chain"])
def test_after_equalization_both_layers_of_a_pair_have_one_range_in_every_live_channel(name: str) -> None:
    graph = graph_of(model_of(name))
    equalize(graph)
    for first, second in ranges(graph):
        balanced = torch.isclose(first, second, rtol=1e-3, atol=0)
        assert balanced.float().mean() >= 0.8


@settings(max_examples=10, deadline=None)
@given(exponents=st.lists(st.integers(-10, 10), min_size=6, max_size=6), dead=st.sampled_from([None, 0, 2]))
def test_equalization_finds_the_balance_of_any_scales(exponents: list[int], dead: int | None) -> None:
    model = chain(6)
    first, second = model[1], model[3]
    first.weight.data *= torch.tensor(exponents).exp2().unsqueeze(1)
    if dead is not None:
        (first.weight.data[1], second.weight.data[:, 2])[dead // 2].zero_()
    graph = graph_of(model)
    before = graph.graph(INPUTS)
    equalize(graph)
    found = graph.graph(INPUTS)
    assert (found - before).abs().max() <= 1e-5 * before.abs().max()
    assert all(value.isfinite().all() for value in constants(graph).values())


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    model = chain(6)
    model[1].weight.data[2] = 0.0
    bias = model[1].bias.data[2].item()
    graph = graph_of(model)
    equalize(graph)
    assert constants(graph)["1.bias"][2] == bias


@pytest.mark.parametrize("between", [nn.ReLU6(), nn.Hardtanh(), nn.GELU()])
def test_a_scale_does_not_pass_what_has_a_fixed_bound_or_a_curve(between: nn.Module) -> None:
    graph = graph_of(chain(6, between=between))
    before = constants(graph)
    assert equalize(graph) == 0
    assert all(torch.equal(value, before[name]) for name, value in constants(graph).items())


def test_what_two_read_and_weights_that_two_share_are_left_alone() -> None:
    for name in ("shared", "shortcut"):
        graph = graph_of(model_of(name))
        before = constants(graph)
        assert equalize(graph) == 0
        assert all(torch.equal(value, before[key]) for key, value in constants(graph).items())


def test_equalization_repairs_weights_with_one_scale_a_tensor(tmp_path: Path) -> None:
    model = chain(32, 32)
    spread = torch.logspace(-2, 2, 32).unsqueeze(1)
    model[1].weight.data *= spread
    model[1].bias.data *= spread[:, 0]
    model[3].weight.data /= spread.T
    expected, found = model(INPUTS), context(tmp_path)
    plain, equal = (
        (simulation(PTQ(weight_granularity="tensor", equalize=on).apply(model, found))(INPUTS) - expected).norm()
        for on in (False, True)
    )
    assert equal < 0.1 * plain


def test_what_is_stored_for_another_graph_is_never_used(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), *chain(12)[1:])
    used = context(tmp_path / "used")
    sets: list[dict[str, Any]] = [{}, {"equalize": True}, {"smooth": 0.5}, {"smooth": 0.8}, EVERYTHING]
    for place, options in enumerate([*sets, {"bias_correction": True}]):
        config, fresh = PTQ.model_validate(options), context(tmp_path / str(place))
        assert torch.equal(*(simulation(config.apply(model, where))(INPUTS) for where in (used, fresh)))


@pytest.mark.parametrize("name", ["depthwise", "sequence", "shared", "transformer"])
def test_with_corrected_biases_every_layer_has_the_mean_it_had_in_float(name: str, tmp_path: Path) -> None:
    found, model = context(tmp_path), model_of(name)
    inputs = found.task.samples("train").inputs
    expected = mean_outputs(graph_of(model), inputs)
    config = PTQ.model_validate(WEIGHT_ONLY | {"bias_correction": True, "edge_bits": 8})
    quantized = config.apply(model, found)
    means = mean_outputs(QuantizedModel(simulation(quantized), quantized.example), inputs)
    assert len(means) >= 2
    for mean, wanted in zip(means.values(), expected.values(), strict=True):
        torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-4)


def test_the_mean_is_that_of_the_float_weights_also_where_others_have_been_put_in_place(tmp_path: Path) -> None:
    found, model = context(tmp_path), chain(12)
    inputs = found.task.samples("train").inputs
    expected = mean_outputs(float_graph(model, found), inputs)
    observed = calibrated(PTQ.model_validate(WEIGHT_ONLY), model, found)
    layer = nodes_of(observed.graph, COMPUTE)[0]
    replace_constant(observed.graph, source(layer, 1), 0, torch.full((12, 64), 0.25))
    correct_biases(observed, expected, inputs)
    means = mean_outputs(QuantizedModel(simulation(convert(observed)), observed.example), inputs)
    torch.testing.assert_close(means[layer.name], expected[layer.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["digits_cnn", "mobile", "shared", "transformer"])
def test_corrected_biases_are_whole_steps_of_the_accumulator(name: str, tmp_path: Path) -> None:
    quantized = PTQ.model_validate(EVERYTHING).apply(model_of(name), context(tmp_path))
    layers = [node for node in nodes_of(quantized.graph, COMPUTE) if source(node).target is DEQUANTIZE]
    assert layers
    for node in layers:
        bias, scale = constant(quantized.graph, node.args[2]), constant(quantized.graph, source(node, 1).args[1])
        assert bias is not None
        assert scale is not None
        steps = bias.double() / (torch.tensor(grid_of(source(node)).scale) * scale).double()
        assert ((steps - steps.round()).abs() <= 0.01 + steps.abs() * 2**-22).all()  # float32 holds 24 bits of them
        assert steps.abs().max() < 2**31


def test_a_layer_without_bias_gets_one(tmp_path: Path) -> None:
    config = PTQ.model_validate(WEIGHT_ONLY | {"bias_correction": True})
    quantized = config.apply(chain(12, bias=False), context(tmp_path))
    biases = [constant(quantized.graph, node.args[2]) for node in nodes_of(quantized.graph, COMPUTE)]
    assert [bias.shape[0] for bias in biases if bias is not None] == [12, 10]
    assert all(bias.abs().max() > 0 for bias in biases if bias is not None)


class Made(nn.Module):
    """A depthwise convolution of each sample with weights that a linear makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.head = nn.Linear(64, 9), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x.flatten(1)).reshape(-1, 1, 3, 3)
        made = F.conv2d(x.reshape(1, -1, 8, 8), weights, groups=x.shape[0])
        return self.head(made.reshape(-1, 36))  # type: ignore[no-any-return]


def test_a_layer_whose_weights_follow_from_the_input_gets_no_bias(tmp_path: Path) -> None:
    config = PTQ.model_validate(WEIGHT_ONLY | {"bias_correction": True})
    quantized = config.apply(Made().eval(), context(tmp_path))
    assert [len(node.args) > 2 and node.args[2] is not None for node in nodes_of(quantized.graph, COMPUTE)] == [1, 0, 1]
    assert len(simulation(quantized)(INPUTS[:3])) == 3


def test_layers_that_share_weight_and_bias_get_biases_of_their_own(tmp_path: Path) -> None:
    config = PTQ.model_validate(WEIGHT_ONLY | {"bias_correction": True})
    quantized = config.apply(model_of("shared"), context(tmp_path))
    biases = [constant(quantized.graph, node.args[2]) for node in nodes_of(quantized.graph, COMPUTE)[1:3]]
    assert biases[0] is not None
    assert biases[1] is not None
    assert not torch.equal(biases[0], biases[1])


def test_bias_correction_brings_a_trained_network_nearer_to_its_float_outputs() -> None:
    model, found, _ = digits()
    samples = found.task.samples("validation")
    inputs = found.task.transform(samples.inputs)
    with torch.no_grad():
        errors = [
            (simulation(PTQ(weight_bits=3, bias_correction=on).apply(model, found))(inputs) - model(inputs)).norm()
            for on in (False, True)
        ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_smoothing_keeps_the_outputs(alpha: float) -> None:
    graph = graph_of(Transformer())
    before = graph.graph(INPUTS)
    maxima = channel_maxima(graph, INPUTS)
    assert smooth(graph, maxima, alpha) == 4
    torch.testing.assert_close(graph.graph(INPUTS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_the_scale_of_a_channel_is_that_of_equation_4(alpha: float) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.parts = nn.ModuleList(nn.Linear(8, 10) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.squeeze(1))
            logits: Tensor = torch.stack([part(x) for part in self.parts]).sum(0).mean(1)
            return logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Three()
    weights = [part.weight.detach() for part in model.parts]
    given = model.norm(INPUTS.squeeze(1)).detach().abs().amax((0, 1))
    taken = torch.stack(weights).abs().amax((0, 1))
    expected = given**alpha / taken ** (1 - alpha)
    graph = graph_of(model)
    assert smooth(graph, channel_maxima(graph, INPUTS), alpha) == 1
    found = constants(graph)
    torch.testing.assert_close(1 / found["norm.weight"], expected, rtol=1e-5, atol=0)
    for place, weight in enumerate(weights):
        torch.testing.assert_close(found[f"parts.{place}.weight"], weight * expected)


def test_a_norm_that_something_else_reads_too_is_left_alone() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            logits: Tensor = (x + self.layer(x)).flatten(1)
            return logits

    assert sites(graph_of(Post())) == []


def test_a_batch_norm_in_front_of_a_rectifier_and_a_convolution_is_smoothed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)).eval()
    graph = graph_of(model)
    before = graph.graph(INPUTS)
    assert smooth(graph, channel_maxima(graph, INPUTS), 0.5) == 1
    torch.testing.assert_close(graph.graph(INPUTS), before, rtol=1e-4, atol=1e-5)


def test_smoothing_lowers_the_error_that_outlier_channels_make(tmp_path: Path) -> None:
    model, found = Transformer(), context(tmp_path)
    expected = model(INPUTS)
    plain, smoothed = (
        (simulation(PTQ(smooth=alpha).apply(model, found))(INPUTS) - expected).norm() for alpha in (None, 0.5)
    )
    assert smoothed < 0.5 * plain


@pytest.mark.parametrize("split", ["unbind", "chunk", "split", "sizes"])
def test_a_transformer_runs_on_integers_and_agrees_with_its_simulation(split: str, tmp_path: Path) -> None:
    found, engine = context(tmp_path), Reference(batch_size=50)
    model = Transformer(split)
    quantized = PTQ.model_validate(EVERYTHING).apply(model, found)
    assert {layer.activation_bits for layer in quantized.layers()} == {8}
    engine.lower(quantized, tmp_path, found.store)
    runner = engine.load(tmp_path)
    simulated = simulation(quantized)(INPUTS)
    torch.testing.assert_close(runner(INPUTS), simulated, atol=0.02, rtol=0)
    assert (simulated - model(INPUTS)).abs().max() < 0.1 * model(INPUTS).abs().max()
    linears, attention = sum(layer.macs for layer in quantized.layers()), 2 * 2 * 8 * 8 * 16
    assert engine.integer_macs(tmp_path, runner, INPUTS) == len(INPUTS) * linears
    assert quantized.macs == linears + attention


@pytest.mark.parametrize("name", ["digits_cnn", "mobile", "shared"])
def test_the_reference_agrees_with_the_simulation_of_everything_at_once(name: str, tmp_path: Path) -> None:
    found, engine = context(tmp_path), Reference(batch_size=50)
    quantized = PTQ.model_validate(EVERYTHING).apply(model_of(name), found)
    engine.lower(quantized, tmp_path, found.store)
    simulated = simulation(quantized)(INPUTS)
    near = (engine.load(tmp_path)(INPUTS) - simulated).abs() <= 0.02 * simulated.abs().max()
    assert near.float().mean() > 0.99


@pytest.mark.parametrize("options", [{"equalize": True}, {"smooth": 0.5}, {"bias_correction": True}, EVERYTHING])
@pytest.mark.parametrize(("bits", "value"), [(8, torch.nan), (None, torch.inf)])
def test_weights_that_are_not_finite_are_a_typed_failure(
    options: dict[str, Any], bits: int | None, value: float, tmp_path: Path
) -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), *chain(12)[1:])
    model[2].weight.data[0, 0] = value
    with pytest.raises(NotFinite):
        PTQ.model_validate(options | {"activation_bits": bits}).apply(model, context(tmp_path))


@pytest.mark.parametrize("bits", [8, None])
def test_a_model_without_a_layer_to_quantize_is_refused(bits: int | None, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.ReLU())
    with pytest.raises(Refused, match="must have a convolution or a linear"):
        PTQ.model_validate(EVERYTHING | {"activation_bits": bits}).apply(model, context(tmp_path))


def test_a_layer_of_one_channel_and_one_sample_to_calibrate_on_are_no_trouble(tmp_path: Path) -> None:
    model = chain(1)
    config = PTQ.model_validate(EVERYTHING | {"calibration_samples": 1})
    assert simulation(config.apply(model, context(tmp_path)))(INPUTS).isfinite().all()


def test_the_label_says_what_is_on() -> None:
    assert PTQ.model_validate(EVERYTHING).label() == "ptq-w8s-a8a-cle-smooth0.5-bc"
