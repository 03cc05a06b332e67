from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Noise, context, network
from torch import Tensor, nn

from qsweep.engines.float import Float
from qsweep.errors import NotFinite
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.ops import LOOK_UP
from qsweep.hub.packing import pack, unpack
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.hub.weights import Codebook as Stored
from qsweep.hub.weights import real_weight
from qsweep.measure.files import file_sizes
from qsweep.measure.sizes import work
from qsweep.quantize._arithmetic import weight_levels
from qsweep.quantize._kmeans import errors, kmeans, starts
from qsweep.quantize._tables import apot, apot_levels, codebook
from qsweep.quantize.apot import APoT
from qsweep.quantize.cast import Cast
from qsweep.quantize.codebook import Codebook, Granularity
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.table import Table

INPUTS = Noise(20).inputs
BITS = st.integers(2, 8)
GRANULARITIES: tuple[Granularity, ...] = ("scaled", "tensor", "channel")
rows = st.integers(1, 24).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=width, max_size=width), min_size=1, max_size=5
    )
)
TABLES: tuple[Table, ...] = (*(Codebook(granularity=granularity) for granularity in GRANULARITIES), APoT())
tables = pytest.mark.parametrize("config", TABLES, ids=lambda config: config.label())


def squared(weight: Tensor, real: Tensor) -> Tensor:
    """(C,) squared errors."""
    return (weight.double() - real.double()).square().flatten(1).sum(1)


def uniform(weight: Tensor, bits: int, *, per_tensor: bool = False) -> Tensor:
    levels = weight_levels(weight, bits, per_tensor=per_tensor)
    return levels.real(levels.integers(weight))


def drawn(channels: int, width: int, seed: int = 0) -> Tensor:
    """Normal weights, channels of unlike scales."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(channels, width, generator=generator) * torch.rand(channels, 1, generator=generator).exp()


@settings(deadline=None, max_examples=40)
@given(content=rows, bits=BITS, granularity=st.sampled_from(GRANULARITIES))
def test_every_weight_is_its_scale_times_a_value_of_its_table(
    content: list[list[float]], bits: int, granularity: Granularity
) -> None:
    weight = torch.tensor(content)
    found = codebook(weight, bits, granularity)
    assert found.integers.shape == weight.shape
    assert found.table.shape == (len(weight) if granularity == "channel" else 1, 2**bits)
    assert found.scale.shape == (1 if granularity == "tensor" else len(weight),)
    values = (found.table.float() * found.scale[:, None]).expand(len(weight), -1)
    assert all(set(real.tolist()) <= set(of.tolist()) for real, of in zip(found.real(), values, strict=True))


@settings(deadline=None, max_examples=40)
@given(content=rows, bits=BITS)
def test_the_squared_error_is_never_above_that_of_uniform_levels(content: list[list[float]], bits: int) -> None:
    weight = torch.tensor(content)
    slack = 1e-10 * weight.double().square().sum()  # of float32 products
    assert squared(weight, codebook(weight, bits, "scaled").real()).sum() <= (
        squared(weight, uniform(weight, bits)).sum() + slack
    )
    assert squared(weight, codebook(weight, bits, "tensor").real()).sum() <= (
        squared(weight, uniform(weight, bits, per_tensor=True)).sum() + slack
    )
    by_channel = squared(weight, codebook(weight, bits, "channel").real())
    assert (by_channel <= squared(weight, uniform(weight, bits)) + slack).all()


@settings(deadline=None, max_examples=40)
@given(content=rows, bits=BITS, granularity=st.sampled_from(GRANULARITIES), seed=st.integers(0, 99))
def test_weights_that_are_zero_are_zero_in_a_table_and_a_sum_of_powers(
    content: list[list[float]], bits: int, granularity: Granularity, seed: int
) -> None:
    weight = torch.tensor(content)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    weight = weight * keep
    assert (codebook(weight, bits, granularity).real()[weight == 0] == 0).all()
    assert (apot(weight, bits).real()[weight == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(-10, 10), min_size=3, max_size=9), bits=st.just(2))
def test_two_bit_centres_are_within_a_fifth_of_the_best_partition(values: list[float], bits: int) -> None:
    """The best of all partitions of sorted values into four runs, by enumeration."""
    ranked = sorted(values)
    best = min(
        sum(
            sum((value - sum(run) / len(run)) ** 2 for value in run)
            for run in (ranked[left:right] for left, right in zip((0, *cuts), (*cuts, len(ranked)), strict=True))
            if run
        )
        for cuts in combinations(range(len(ranked) + 1), 2**bits - 1)
    )
    row = torch.tensor([values], dtype=torch.float64)
    centres = kmeans(row, starts(row, torch.arange(4.0) - 2), torch.tensor([False]))
    spread = (row - row.mean()).square().sum().item()
    assert errors(row, centres, torch.ones_like(row)).min().item() <= best + 0.2 * spread + 1e-9


def test_kmeans_finds_groups_that_lie_apart() -> None:
    groups = torch.tensor([-9.0, -2.0, 1.0, 30.0], dtype=torch.float64)
    row = (groups[:, None] + torch.linspace(-0.1, 0.1, 25, dtype=torch.float64)).reshape(1, -1)
    centres = kmeans(row, starts(row, torch.arange(4.0) - 2), torch.tensor([False]))
    torch.testing.assert_close(centres[0, 1], groups)


def test_kmeans_on_normal_weights_has_the_error_of_the_best_four_bit_quantizer() -> None:
    weight = drawn(1, 100_000)
    share = squared(weight, codebook(weight, 4, "tensor").real()).sum() / weight.double().square().sum()
    assert share.item() == pytest.approx(0.009497, rel=0.03)  # Max, "Quantizing for Minimum Distortion" (1960), table I


def test_centres_without_values_stay_where_they_are() -> None:
    row = torch.tensor([[0.0, 1.0, 10.0, 12.0]], dtype=torch.float64)
    begin = torch.tensor([[[-50.0, 1.0, 9.0, 70.0]]], dtype=torch.float64)
    assert kmeans(row, begin, torch.tensor([False])).tolist() == [[[-50.0, 0.5, 11.0, 70.0]]]
    assert kmeans(row, begin, torch.tensor([True])).tolist() == [[[-50.0, 0.0, 11.0, 70.0]]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3, 3, 3), (3, 1, 3)])
def test_indices_of_a_table_pack_exactly(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    for found in (codebook(weight, bits, "scaled"), apot(weight, bits)):
        assert torch.equal(unpack(pack(found.integers, bits), bits, shape), found.integers)


@settings(deadline=None, max_examples=40)
@given(bits=BITS, count=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_indices_pack_exactly(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (count,), generator=generator).to(torch.int8)
    assert torch.equal(unpack(pack(integers, bits), bits, (count,)), integers)


def powers(bits: int) -> list[tuple[float, ...]]:
    """What each term of a magnitude may be: equations 5 (k = 2) and 6 of the paper, written out."""
    terms: dict[int, list[tuple[float, ...]]] = {
        2: [(0, 1)],
        3: [(0, 1, 1 / 2, 1 / 4)],
        4: [(0, 1, 1 / 2, 1 / 8), (0, 1 / 4)],
        5: [(0, 1, 1 / 4, 1 / 16), (0, 1 / 2, 1 / 8, 1 / 32)],
        6: [(0, 1, 1 / 4, 1 / 32), (0, 1 / 2, 1 / 8, 1 / 64), (0, 1 / 16)],
        7: [(0, 1, 1 / 8, 1 / 64), (0, 1 / 2, 1 / 16, 1 / 128), (0, 1 / 4, 1 / 32, 1 / 256)],
        8: [(0, 1, 1 / 8, 1 / 128), (0, 1 / 2, 1 / 16, 1 / 256), (0, 1 / 4, 1 / 32, 1 / 512), (0, 1 / 64)],
    }
    return terms[bits]


@pytest.mark.parametrize("bits", range(2, 9))
def test_apot_levels_are_all_the_sums_of_the_powers_the_paper_allows(bits: int) -> None:
    sums = [0.0]
    for term in powers(bits):
        sums = [value + power for value in sums for power in term]
    assert sorted(sums) == sorted(set(sums))
    levels = apot_levels(bits)
    assert torch.equal(levels, torch.tensor(sorted([*sums, *(-value for value in sums)])))
    assert torch.equal(levels, -levels.flip(0))
    assert (levels == 0).sum() == 2
    assert torch.equal(levels.half().float(), levels)


@settings(deadline=None, max_examples=40)
@given(content=rows, bits=BITS)
def test_apot_weights_lie_on_scaled_levels_nearer_than_with_the_largest_weight_on_the_last(
    content: list[list[float]], bits: int
) -> None:
    weight = torch.tensor(content)
    found = apot(weight, bits)
    levels = apot_levels(bits)
    assert torch.equal(found.table[0].float(), levels)
    floor = weight_levels(weight, 2).scale / levels.max()
    plain = floor * levels[(weight[:, :, None] - floor[:, :, None] * levels).abs().argmin(2)]
    slack = 1e-8 * weight.double().square().sum()
    assert (squared(weight, found.real()) <= squared(weight, plain) + slack).all()


@tables
def test_constant_and_zero_channels_come_back(config: Table, tmp_path: Path) -> None:
    model = network("mlp")
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[4], nn.Linear)
    model[4].weight.data[2], model[4].weight.data[5] = 0.0, 0.25
    found = reals(config.apply(model, context(tmp_path)))["4.weight"]
    assert (found[2] == 0).all()
    assert (found[5] == found[5, 0]).all()
    torch.testing.assert_close(found[5], torch.full((32,), 0.25), atol=0.04, rtol=0)


def reals(model: QuantizedModel) -> dict[str, Tensor]:
    """Real weights by name."""
    return {str(source(node).target): real_weight(model.graph, node) for node in nodes_of(model.graph, {LOOK_UP})}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@tables
def test_weights_that_are_not_finite_are_a_typed_failure(config: Table, value: float, tmp_path: Path) -> None:
    model = network("mlp")
    next(model.parameters()).data[0, 0] = value
    with pytest.raises(NotFinite, match=r"must hold finite numbers"):
        config.apply(model, context(tmp_path))


class Twice(nn.Module):
    """One linear applied twice, its weights shared, then a head of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x.flatten(1)).relu())
        outputs: Tensor = self.head(x.relu())
        return outputs


@tables
def test_weights_shared_between_layers_and_a_single_channel(config: Table, tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = config.model_copy(update={"weight_bits": 8}).apply(Twice(), context(tmp_path))
    shared, head = reals(found).values()
    assert shared.shape == (64, 64)
    assert head.shape == (1, 64)
    torch.manual_seed(0)
    torch.testing.assert_close(simulation(found)(INPUTS), Twice()(INPUTS), atol=0.05, rtol=0)


@tables
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_saved_model_is_the_model(config: Table, bits: int, tmp_path: Path) -> None:
    found = config.model_copy(update={"weight_bits": bits}).apply(network("depthwise"), context(tmp_path))
    save(found, tmp_path)
    back = load(tmp_path)
    assert {layer.weight_bits for layer in back.layers()} == {bits}
    assert torch.equal(simulation(back)(INPUTS), simulation(found)(INPUTS))
    assert torch.equal(back.graph(INPUTS), simulation(found)(INPUTS))
    assert {layer.name: layer.activation_bits for layer in back.layers()} == dict.fromkeys(reals(found), 32)


@tables
def test_the_first_and_the_last_layer_may_have_8_bits(config: Table, tmp_path: Path) -> None:
    found = config.model_copy(update={"edge_bits": 8}).apply(network("digits_cnn"), context(tmp_path))
    bits = [layer.weight_bits for layer in found.layers()]
    assert bits[0] == bits[-1] == 8
    assert set(bits[1:-1]) == {4}


def test_tables_scales_and_indices_are_counted(tmp_path: Path) -> None:
    model, where = network("mlp"), context(tmp_path)
    indices = (64 * 32 + 32 * 10) * 4
    biases, scales, table = 42 * 32, 42 * 32, 16 * 16
    stored = {granularity: work(Codebook(granularity=granularity).apply(model, where)) for granularity in GRANULARITIES}
    sizes = {name: found["size_theoretical_bytes"] * 8 for name, found in stored.items()}
    assert sizes == {
        "scaled": indices + biases + scales + 2 * table,
        "tensor": indices + biases + 2 * 32 + 2 * table,
        "channel": indices + biases + scales + 42 * table,
    }
    assert {found["params"] for found in stored.values()} == {64 * 32 + 32 * 10 + 42}


def test_sparsity_is_that_of_the_weights_not_of_the_indices(tmp_path: Path) -> None:
    model = _Wide()
    dense = work(Codebook(weight_bits=8).apply(model, context(tmp_path)))
    for parameter in model.parameters():
        parameter.data[..., ::2] = 0.0  # rows of zeros would be left out
    pruned = work(Codebook(weight_bits=8).apply(model, context(tmp_path, key="pruned")))
    assert dense["sparsity"] == 0.0
    assert 0.5 <= pruned["sparsity"] < 0.51  # the smallest weights join the zeros
    weights = 256 * (64 + 256)
    assert dense["size_theoretical_bytes"] - pruned["size_theoretical_bytes"] == pytest.approx(
        weights * 3 / 8, rel=0.05
    )


def test_four_bits_take_the_bytes_of_uniform_four_bits(tmp_path: Path) -> None:
    sizes = {}
    uniform4 = PTQ(weight_bits=4, activation_bits=None)
    for name, config in {"codebook": Codebook(), "apot": APoT(), "uniform": uniform4}.items():
        (tmp_path / name).mkdir()
        save(config.apply(_Wide(), context(tmp_path, key="wide")), tmp_path / name)
        sizes[name] = file_sizes(tmp_path / name)["size_bytes"]
    assert sizes["codebook"] == sizes["apot"]
    assert sizes["codebook"] == pytest.approx(sizes["uniform"], rel=0.03)


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layers(x.flatten(1))
        return outputs


def test_a_table_of_shared_steps_has_less_error_than_one_of_the_whole_tensor() -> None:
    weight = drawn(32, 144)
    found = {name: squared(weight, codebook(weight, 4, name).real()).sum().item() for name in GRANULARITIES}
    assert found["channel"] < found["scaled"] < found["tensor"]
    assert found["scaled"] < 0.8 * squared(weight, uniform(weight, 4)).sum().item()


def test_fp16_is_half_the_bytes_and_gives_the_same_within_its_precision(tmp_path: Path) -> None:
    model, where = _Wide(), context(tmp_path)
    made = {"fp32": float_graph(model, where), "fp16": Cast(dtype="fp16").apply(model, where)}
    engine, found, sizes = Float(batch_size=len(INPUTS), compile=False), {}, {}
    for name, each in made.items():
        (tmp_path / name).mkdir()
        engine.lower(each, tmp_path / name, where.store)
        found[name], sizes[name] = engine.load(tmp_path / name)(INPUTS), file_sizes(tmp_path / name)["size_bytes"]
    assert sizes["fp16"] == pytest.approx(sizes["fp32"] / 2, rel=0.03)
    assert found["fp16"].dtype is torch.float32
    assert not torch.equal(found["fp16"], found["fp32"])
    torch.testing.assert_close(found["fp16"], found["fp32"], atol=2e-3, rtol=0)
    assert torch.equal(found["fp16"], simulation(made["fp16"])(INPUTS))


@pytest.mark.parametrize("value", [1e5, -7e4, torch.nan, torch.inf])
def test_weights_beyond_fp16_are_a_typed_failure_and_bf16_takes_those_that_are_finite(
    value: float, tmp_path: Path
) -> None:
    model = _Wide()
    next(model.parameters()).data[3, 3] = value
    with pytest.raises(NotFinite, match=r"`layers.0.weight`: must be finite in torch.float16, at most 65504"):
        Cast(dtype="fp16").apply(model, context(tmp_path))
    if abs(value) < torch.inf:
        assert simulation(Cast().apply(model, context(tmp_path)))(INPUTS).isfinite().all()


class _Bounded(nn.Module):
    """Its middle is large, its outputs are not."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.wide, self.head, self.factor = nn.Linear(64, 8), nn.Linear(8, 10), factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((self.wide(x.flatten(1)) * self.factor).tanh())
        return logits


def test_activations_beyond_fp16_are_a_typed_failure_though_the_outputs_are_finite(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Bounded(1e5).eval()
    made = float_graph(model, context(tmp_path)).cast_to("fp16")
    assert simulation(made)(INPUTS).isfinite().all()
    with pytest.raises(
        NotFinite, match=r"`linear_default`, an activation .* must be finite in torch.float16, at most 65504 \(got"
    ):
        Cast(dtype="fp16").apply(model, context(tmp_path))
    assert simulation(Cast().apply(model, context(tmp_path)))(INPUTS).isfinite().all()
    model.factor = 1e4
    Cast(dtype="fp16").apply(model, context(tmp_path, key="smaller"))


def test_inputs_beyond_fp16_are_a_typed_failure(tmp_path: Path) -> None:
    where = context(tmp_path, task=Noise(inputs=INPUTS * 1e5))
    with pytest.raises(
        NotFinite, match=r"`\w+`, an activation on the training samples, must be finite in torch.float16"
    ):
        Cast(dtype="fp16").apply(_Wide(), where)


@pytest.mark.parametrize("fields", [{"weight_bits": 1}, {"weight_bits": 9}, {"edge_bits": 4}, {"granularity": "group"}])
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Codebook.model_validate(fields)


def test_a_stored_form_gives_the_values_it_was_given() -> None:
    table = torch.tensor([[-1.5, 0.0, 0.25, 4.0]], dtype=torch.float16)
    stored = Stored(torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8), table, torch.tensor([2.0, 10.0]), 2)
    assert stored.real().tolist() == [[-3.0, 8.0], [2.5, 0.0]]


class Islands(nn.Module):
    """A norm and a softmax computed in float32, numbers that are made anew, as transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.squeeze(1)) + torch.arange(8, dtype=torch.float32).reshape(8, 1) / 10
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x)
        mask = torch.full((8, 8), -torch.inf).triu(1)
        x = torch.softmax(x @ x.transpose(1, 2) + mask, -1, dtype=torch.float32) @ x
        logits: Tensor = self.second(x.mean(1))
        return logits


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_that_compute_parts_in_float32_are_cast_all_the_same(dtype: str, tmp_path: Path) -> None:
    model = Islands().eval()
    made = Cast.model_validate({"dtype": dtype}).apply(model, context(tmp_path))
    torch.testing.assert_close(simulation(made)(INPUTS), model(INPUTS), atol=0.03, rtol=0)
