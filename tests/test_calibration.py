"""Ranges of activations: fixed by calibration, or set by each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, Noise, context, digits, network
from pydantic import ValidationError
from test_jobs import metrics, written
from torch import Tensor, nn

from qsweep.config import members
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.errors import DataError, NotFinite
from qsweep.evaluate import predict
from qsweep.hub.form import Grid, grid_of
from qsweep.hub.insert import Place
from qsweep.hub.kinds import COMPUTE, QUANTIZE
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.ops import QUANTIZE_DYNAMIC, dynamic_fake_quantize
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.quantize import Quantization
from qsweep.quantize import _calibrate as calibrate
from qsweep.quantize._arithmetic import activation_grid
from qsweep.quantize._observers import RangeObserver
from qsweep.quantize._ranges import BINS, Histogram, divergence, fitted_range, percentile_range, squared_error
from qsweep.quantize.base import Calibration, Grids, Scheme
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Compression
from qsweep.tasks.base import Samples, SplitName

CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)
FITTED = [name for name in CALIBRATIONS if name not in ("minmax", "moving_average")]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
INPUTS = Noise(50).inputs


def observer(values: list[Tensor], **fields: Any) -> RangeObserver:
    """An observer that has seen batches of one tensor, its range fitted."""
    found = RangeObserver(PTQ.model_validate(fields), Place(("w",), edge=False))
    for batch in values:
        found(batch)
    if found.counts_values:
        found.begin_counting()
        for batch in values:
            found(batch)
    found.fit()
    return found


def histogram(values: Tensor) -> Histogram:
    """What the two passes of an observer see of `values`."""
    found = RangeObserver(PTQ(calibration="mse"), Place(("w",), edge=False))
    found(values)
    found.begin_counting()
    found(values)
    return found._seen()


def grids(model: Any) -> list[Grid]:
    return [grid_of(node) for node in nodes_of(model.graph, {QUANTIZE})]


numbers = st.floats(-1e4, 1e4, width=32)
batches = st.lists(st.lists(numbers, min_size=1, max_size=40).map(torch.tensor), min_size=1, max_size=4)
tensors = st.one_of(
    st.lists(numbers, min_size=1, max_size=60).map(torch.tensor),
    st.integers(0, 100).map(lambda seed: torch.randn(500, generator=torch.Generator().manual_seed(seed)) ** 3),
    st.integers(0, 100).map(lambda seed: torch.randn(500, generator=torch.Generator().manual_seed(seed)).relu()),
)
bits = st.integers(2, 8)
schemes = st.sampled_from(SCHEMES)


@given(batches, st.sampled_from(CALIBRATIONS), schemes, bits)
def test_every_grid_holds_zero_and_has_as_many_levels_as_its_bits_say(
    values: list[Tensor], calibration: Calibration, scheme: Scheme, width: int
) -> None:
    found = observer(values, calibration=calibration, activation_scheme=scheme, activation_bits=width).grid()
    assert found.low <= found.zero_point <= found.high
    assert found.high - found.low + 1 == 2**width
    assert 0 < found.scale < float("inf")


@given(batches, st.sampled_from(CALIBRATIONS), schemes, bits)
def test_every_range_holds_zero_and_lies_within_the_extremes(
    values: list[Tensor], calibration: Calibration, scheme: Scheme, width: int
) -> None:
    found = observer(values, calibration=calibration, activation_scheme=scheme, activation_bits=width)
    low, high = (min(0.0, *(b.min().item() for b in values)), max(0.0, *(b.max().item() for b in values)))
    assert low <= found.low.item() <= 0 <= found.high.item() <= high


@given(batches)
def test_a_moving_average_lies_between_the_extremes_of_the_batches(values: list[Tensor]) -> None:
    found = observer(values, calibration="moving_average")
    lows, highs = ([min(0.0, b.min().item()) for b in values], [max(0.0, b.max().item()) for b in values])
    slack = 1e-6 * max(*map(abs, lows), *highs, 1e-30)
    assert min(lows) - slack <= found.low.item() <= max(lows) + slack
    assert min(highs) - slack <= found.high.item() <= max(highs) + slack


def test_a_moving_average_weighs_each_batch_a_tenth_less_than_the_next() -> None:
    found = observer([torch.tensor([-1.0, 8.0]), torch.tensor([0.0, 2.0])], calibration="moving_average")
    assert found.high.item() == pytest.approx((0.9 * 8 + 2) / 1.9)
    assert found.low.item() == pytest.approx(-0.9 / 1.9)


@given(tensors)
def test_every_value_is_counted_once_on_its_side_of_zero(values: Tensor) -> None:
    seen = histogram(values)
    assert seen.zeros == (values == 0).sum()
    assert seen.counts[:BINS].sum() == (values < 0).sum()
    assert seen.counts[BINS:].sum() == (values > 0).sum()


@given(tensors, schemes, bits)
def test_the_range_of_least_squared_error_has_no_more_of_it_than_the_extremes(
    values: Tensor, scheme: Scheme, width: int
) -> None:
    seen, nonnegative = histogram(values), bool((values >= 0).all())
    found = fitted_range("mse", seen, width, scheme, nonnegative=nonnegative)
    errors = [
        squared_error(seen, activation_grid(*ends, width, scheme, nonnegative=nonnegative))
        for ends in (found, (seen.low, seen.high))
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_least_squared_error_beats_the_extremes_on_the_values_themselves(scheme: Scheme) -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3

    def error(calibration: Calibration) -> float:
        grid = observer([values], calibration=calibration, activation_scheme=scheme, activation_bits=4).grid()
        return (torch.fake_quantize_per_tensor_affine(values, *grid) - values).square().mean().item()

    assert error("mse") < 0.5 * error("minmax")


@given(tensors, schemes, st.floats(0.5, 1.0))
def test_a_percentile_leaves_out_no_more_than_its_share_of_the_values(
    values: Tensor, scheme: Scheme, share: float
) -> None:
    low, high = percentile_range(histogram(values), scheme, share)
    outside = ((values.double() < low * (1 + 1e-12)) | (values.double() > high * (1 + 1e-12))).sum().item()
    assert outside <= (1 - share) * len(values) + 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_percentile_is_that_of_the_values(scheme: Scheme) -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).double()
    found = percentile_range(histogram(values.float()), scheme, 0.99)
    expected = values.abs().quantile(0.99) if scheme == "symmetric" else values.quantile(0.995)
    assert found[1] == pytest.approx(expected.item(), abs=0.01)
    assert found[0] == pytest.approx(-expected.item(), abs=0.05)


@given(tensors, schemes, bits)
def test_a_divergence_is_never_negative(values: Tensor, scheme: Scheme, width: int) -> None:
    seen = histogram(values)
    if seen.counts.any():
        grid = activation_grid(seen.low, seen.high, width, scheme, nonnegative=False)
        assert divergence(seen, grid) >= -1e-12


def test_values_spread_evenly_lose_nothing_and_keep_their_range() -> None:
    seen = Histogram(np.concatenate([np.zeros(BINS), np.ones(BINS)]), 0, 0.0, 1.0)
    assert divergence(seen, activation_grid(0.0, 1.0, 4, "asymmetric", nonnegative=True)) == pytest.approx(0, abs=1e-12)
    assert fitted_range("entropy", seen, 4, "asymmetric", nonnegative=True) == (0.0, 1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_handful_of_values_is_not_clipped_to_where_there_are_few(scheme: Scheme, width: int) -> None:
    values = torch.arange(-6, 11).repeat(100) / 7 + 0.01
    found = observer([values], calibration="entropy", activation_scheme=scheme, activation_bits=width)
    assert found.high.item() > 0.5


@pytest.mark.parametrize("calibration", FITTED)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_lone_outlier_is_clipped(calibration: Calibration, scheme: Scheme) -> None:
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    values[7] = 60.0
    found = observer([values], calibration=calibration, activation_scheme=scheme, activation_bits=4)
    assert 2 < found.high.item() < 15
    assert -6 < found.low.item() < -2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("outlier", "ends"), [(16.0, (3.5, 5)), (100.0, (6, 10))])
def test_entropy_clips_a_lone_outlier_from_eight_bits_as_far_as_the_bins_tell(
    scheme: Scheme, outlier: float, ends: tuple[float, float]
) -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    values[7] = outlier
    found = observer([values], calibration="entropy", activation_scheme=scheme, activation_bits=8)
    assert ends[0] < found.high.item() < ends[1]


@pytest.mark.parametrize("calibration", ["entropy", "mse"])
def test_levels_finer_than_the_bins_keep_the_extremes(calibration: Calibration) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = observer([values], calibration=calibration, activation_bits=16)
    assert (found.low, found.high) == (values.min(), values.max())


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-30, 1e-44, 0.0])
def test_constant_values_stay_what_they_are(calibration: Calibration, value: float) -> None:
    values = torch.full((64,), value)
    found = torch.fake_quantize_per_tensor_affine(values, *observer([values], calibration=calibration).grid())
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-28)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_range_is_settled_once_it_is_fitted(calibration: Calibration) -> None:
    found = observer([torch.linspace(-1, 2, 50)], calibration=calibration)
    before = found.grid()
    found(torch.full((4,), 1e6))
    assert found.grid() == before


def test_values_of_half_the_width_are_observed_too() -> None:
    assert observer([torch.tensor([-1.0, 2.0], dtype=torch.bfloat16)], calibration="moving_average").high.item() == 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_eight_bits_keep_the_accuracy_of_a_trained_network(calibration: Calibration, scheme: Scheme) -> None:
    model, found, _ = digits()
    quantized = PTQ(calibration=calibration, activation_scheme=scheme).apply(model, found)
    inputs, labels = found.task.samples("validation")
    scores = [found.task.score(predict(each, found.task, inputs), labels) for each in (model, simulation(quantized))]
    assert scores[1].float().mean() > scores[0].float().mean() - 0.02


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_the_same_seed_gives_the_same_ranges_and_another_seed_others(calibration: Calibration, tmp_path: Path) -> None:
    def found(root: str, **fields: Any) -> list[Grid]:
        config = PTQ(calibration=calibration, calibration_samples=40, **fields)
        return grids(config.apply(network("mlp"), context(tmp_path / root)))

    assert found("a") == found("b") == found("a", calibration_seed=0)
    assert found("a", calibration_seed=1) != found("a")


def test_both_passes_run_once_for_all_bits_schemes_and_calibrations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    run = calibrate._run

    def counted(graph: torch.fx.GraphModule, inputs: Tensor) -> None:
        runs.append(len(inputs))
        run(graph, inputs)

    monkeypatch.setattr(calibrate, "_run", counted)
    for calibration in CALIBRATIONS:
        for width, scheme in ((8, "symmetric"), (4, "asymmetric")):
            config = PTQ.model_validate(
                {"calibration": calibration, "activation_bits": width, "activation_scheme": scheme}
            )
            config.apply(network("mlp"), context(tmp_path))
    assert runs == [200, 200]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_ranges_from_the_store_are_those_of_a_run(calibration: Calibration, tmp_path: Path) -> None:
    config = PTQ(calibration=calibration, calibration_samples=150)
    found = context(tmp_path)
    first, second = (calibrate.calibrated(config, network("pools"), found).graph for _ in range(2))
    live = calibrate.calibrated(PTQ(calibration_samples=1), network("pools"), found)
    for name, module in live.graph.named_modules():
        if isinstance(module, RangeObserver):
            live.graph.set_submodule(
                name, RangeObserver(config, Place(("w",), edge=False, nonnegative=module.nonnegative))
            )
    calibrate.observe(live.graph, calibrate.calibration_inputs(config, found))
    for name, module in first.named_modules():
        if isinstance(module, RangeObserver):
            assert module.grid() == second.get_submodule(name).grid() == live.graph.get_submodule(name).grid()  # type: ignore[operator]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_fewer_samples_than_a_batch_are_enough(calibration: Calibration, tmp_path: Path) -> None:
    config = PTQ(calibration=calibration, calibration_samples=512)
    found = simulation(config.apply(network("pools"), context(tmp_path, task=Noise(3))))
    assert found(INPUTS).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_inputs_that_are_all_the_same_give_the_float_result(
    calibration: Calibration, value: float, tmp_path: Path
) -> None:
    inputs = torch.full((64, 1, 8, 8), value)
    model = network("mlp")
    config = PTQ(calibration=calibration, activation_bits=8, weight_bits=8)
    found = simulation(config.apply(model, context(tmp_path, task=Noise(inputs=inputs))))(inputs[:4])
    expected = model(inputs[:4]).detach()
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


class Rows(Noise):
    """A task with so many training samples."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def samples(self, split: SplitName) -> Samples:
        return Samples(self.inputs[: self.count], self.labels[: self.count])


def test_no_samples_at_all_are_a_typed_failure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`train`: must hold samples"):
        PTQ().apply(network("mlp"), context(tmp_path, task=Rows(0)))
    with pytest.raises(DataError, match="`train`: must hold samples to calibrate on"):
        calibrate.calibration_inputs(PTQ(), context(tmp_path, task=Rows(0)))


def test_one_sample_is_enough(tmp_path: Path) -> None:
    found = PTQ(calibration="entropy").apply(network("digits_cnn"), context(tmp_path, task=Rows(1)))
    assert simulation(found)(INPUTS).shape == (50, 10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_a_failure_names_the_first_activation_that_is_not_finite(
    calibration: Calibration, value: float, tmp_path: Path
) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(torch.relu(self.first(x.flatten(1))) + value)
            return out

    with pytest.raises(NotFinite, match=r"read by `second\.weight`.* NaN or infinite on the calibration samples"):
        PTQ(calibration=calibration).apply(Late().eval(), context(tmp_path))


# dynamic


def dynamic(tmp_path: Path, name: str = "digits_cnn", **fields: Any) -> Any:
    config = PTQ.model_validate({"activation_mode": "dynamic", "calibration_samples": 60} | fields)
    return config.apply(network(name), context(tmp_path, name))


@given(tensors, bits, st.booleans())
def test_a_batch_is_rounded_within_half_a_step_on_levels_that_hold_zero(
    values: Tensor, width: int, symmetric: bool
) -> None:
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    found = dynamic_fake_quantize(values, low, high, symmetric)
    span = values.abs().max() / high if symmetric else values.clamp(min=0).max() - values.clamp(max=0).min()
    step = span if symmetric else span / (high - low)
    assert (found[values == 0] == 0).all()
    assert len(found.unique()) <= 2**width
    if step > 1e-30:  # the zero point is rounded, so an end may lie half a step outside and half a step off
        assert ((found - values).abs() <= step * (1 + 1e-5)).all()


@given(st.floats(-100, 0), st.floats(0, 100), bits, schemes)
def test_a_batch_has_the_grid_that_calibration_on_it_gives(low: float, high: float, width: int, scheme: Scheme) -> None:
    values = torch.linspace(low, high, 50)
    fixed = observer([values], activation_bits=width, activation_scheme=scheme).grid()
    found = dynamic_fake_quantize(values, fixed.low, fixed.high, scheme == "symmetric")
    expected = torch.fake_quantize_per_tensor_affine(values, *fixed)
    off = (found - expected).abs()
    assert (off <= fixed.scale * (1 + 1e-4) + 1e-30).all()  # a tie may turn with the last bit of the scale
    assert (off <= 1e-4 * fixed.scale).double().mean() > 0.5 or low == -high or width < 4


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_batch_of_zeros_stays_zero(symmetric: bool) -> None:
    assert not dynamic_fake_quantize(torch.zeros(3, 4), -128, 127, symmetric).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_is_not_finite_afterwards(value: float) -> None:
    assert not dynamic_fake_quantize(torch.tensor([1.0, value, -2.0]), -128, 127, False).isfinite().any()


def test_gradients_pass_through_a_batch() -> None:
    values = torch.linspace(-1, 2, 40, requires_grad=True)
    dynamic_fake_quantize(values, -128, 127, True).sum().backward()
    assert values.grad is not None
    assert values.grad.unique().tolist() == [1.0]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_every_layer_reads_is_quantized_once_and_nothing_else(name: str, tmp_path: Path) -> None:
    model = dynamic(tmp_path, name)
    for node in nodes_of(model.graph, COMPUTE):
        assert source(node).target is QUANTIZE_DYNAMIC
        assert source(source(node)).target is not QUANTIZE_DYNAMIC
    assert not nodes_of(model.graph, {QUANTIZE})
    assert all(user.target in COMPUTE for node in nodes_of(model.graph, {QUANTIZE_DYNAMIC}) for user in node.users)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_dynamic_model_gives_the_same_bits_simulated_and_loaded_again(
    name: str, scheme: Scheme, tmp_path: Path
) -> None:
    model = dynamic(tmp_path, name, activation_scheme=scheme, activation_bits=5)
    (tmp_path / "saved").mkdir()
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    found = simulation(model)(INPUTS)
    assert torch.equal(found, model.graph(INPUTS))
    assert torch.equal(found, simulation(again)(INPUTS))
    assert [layer.activation_bits for layer in again.layers()] == [5] * len(model.layers())


def test_eight_dynamic_bits_keep_the_accuracy_of_a_trained_network() -> None:
    model, found, _ = digits()
    quantized = PTQ(activation_mode="dynamic").apply(model, found)
    inputs, labels = found.task.samples("validation")
    scores = [found.task.score(predict(each, found.task, inputs), labels) for each in (model, simulation(quantized))]
    assert scores[1].float().mean() > scores[0].float().mean() - 0.02


def test_samples_of_a_batch_share_a_range(tmp_path: Path) -> None:
    model = simulation(dynamic(tmp_path, activation_bits=3))
    alone, together = model(INPUTS[:1]), model(torch.cat([INPUTS[:1], 40 * INPUTS[1:2]]))[:1]
    assert not torch.allclose(alone, together, atol=1e-3)
    twins = model(torch.cat([INPUTS[:1], INPUTS[1:3], INPUTS[:1]]))
    assert torch.equal(twins[0], twins[3])


def test_no_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = context(tmp_path)
    PTQ(activation_bits=None).apply(network("mlp"), found)  # the float graph is in the store now
    monkeypatch.setattr(Noise, "samples", lambda *_: pytest.fail("looked at samples"))
    PTQ(activation_mode="dynamic").apply(network("mlp"), found)


def test_edge_layers_have_their_bits(tmp_path: Path) -> None:
    widths = [layer.activation_bits for layer in dynamic(tmp_path, activation_bits=4, edge_bits=8).layers()]
    assert widths[0] == widths[-1] == 8
    assert set(widths[1:-1]) == {4}


def test_integer_engines_refuse_it_by_name_and_float_takes_it_to_simulate() -> None:
    config = Compression(quantize=PTQ(activation_mode="dynamic"))
    for engine in (Inductor(), OnnxRuntime(), Reference()):
        assert "`activation_mode: static`" in (engine.refuses(config) or "")
    assert Float().refuses(config)
    assert Float(simulate=True).refuses(config) is None


def test_the_label_says_it() -> None:
    assert PTQ(activation_mode="dynamic").label() == "ptq-w8s-a8a-dynamic"
    assert PTQ(activation_mode="dynamic", activation_bits=None).label() == "ptq-w8s"
    assert PTQ(calibration="entropy").label() == "ptq-w8s-a8a-entropy"


@pytest.mark.parametrize(
    "method",
    [found for found in members(Quantization, "qsweep.quantize") if issubclass(found, Grids)],
    ids=lambda found: found.__name__,
)
@pytest.mark.parametrize("mode", ["dynamic", "token"])
def test_a_mode_that_a_method_does_not_have_is_refused(mode: str, method: type[Grids]) -> None:
    if mode in method.modes:
        assert f"-{mode}" in method.model_validate({"activation_mode": mode}).label()
    else:
        with pytest.raises(ValidationError, match="`activation_mode` must be `static`"):
            method.model_validate({"activation_mode": mode})


def test_a_deployed_dynamic_model_agrees_with_its_simulation_at_the_batch_size_of_the_target(tmp_path: Path) -> None:
    _, _, root = digits()
    target = {"engine": "float", "simulate": True, "compile": False, "batch_size": 7}
    compress = {"quantize": {"method": "ptq", "activation_mode": "dynamic", "activation_bits": 3}}
    found = metrics(written(tmp_path / "job", root, compress, target), "build", "measure")
    assert found["parity_top1"] == 1.0  # 0.94 where the simulation has batches of its own


def test_compiled_batches_set_their_ranges_too(tmp_path: Path) -> None:
    found, engine = context(tmp_path, "mlp"), Float(simulate=True, batch_size=4)
    model = dynamic(tmp_path, "mlp")
    (tmp_path / "artifact").mkdir()
    engine.lower(model, tmp_path / "artifact", found.store)
    run = engine.load(tmp_path / "artifact")
    for batch in (INPUTS[:4], 100 * INPUTS[4:8], torch.zeros(4, 1, 8, 8)):
        expected = simulation(model)(batch)
        torch.testing.assert_close(run(batch), expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_sums_of_sixteen_bits_are_converted(tmp_path: Path) -> None:
    config = PTQ(activation_bits=16, calibration_samples=60)
    for name in ("shortcut", "depthwise"):
        model = network(name)
        found = simulation(config.apply(model, context(tmp_path, name)))(INPUTS)
        assert (found - model(INPUTS)).abs().mean() < 0.02 * model(INPUTS).abs().mean()
