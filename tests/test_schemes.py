"""Ways of storing uniform weights, and where each may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Noise, context, network
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.hub.form import weight_bits_of
from qsweep.hub.nodes import nodes_of
from qsweep.hub.ops import DEQUANTIZE_GROUPS, STORED
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.hub.weights import real_weight
from qsweep.measure.sizes import work
from qsweep.quantize._arithmetic import WeightLevels, weight_levels
from qsweep.quantize.base import Scheme
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.ptq import PTQ
from qsweep.records import Record
from qsweep.spec import Compression, TrialConfig
from qsweep.study.points import accepted
from qsweep.track.table import engine_text

INPUTS = Noise(20).inputs
OTHER = (
    {"weight_scheme": "asymmetric", "weight_bits": 3},
    {"group_size": 4, "weight_bits": 4},
    {"weight_bits": 16, "activation_bits": 16},
    {"activation_bits": None, "weight_bits": 2, "edge_bits": 8},
    {"activation_mode": "dynamic"},
)
"""What integer kernels do not take."""

sizes = st.tuples(st.integers(1, 4), st.sampled_from([1, 4, 6, 8, 12]))
schemes = st.sampled_from(["symmetric", "asymmetric"])


@given(
    shape=sizes, bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]), scheme=schemes, per_tensor=st.booleans(),
    group=st.sampled_from([None, 2, 4, 5]), mse=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_are_integers_between_the_ends_of_their_levels(
    shape: tuple[int, int], bits: int, scheme: Scheme, per_tensor: bool, group: int | None, mse: bool, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    levels = fitted(weight, bits, scheme, per_tensor, group, mse)
    integers = levels.integers(weight)
    assert torch.equal(integers, integers.round())
    assert levels.low <= integers.min()
    assert integers.max() <= levels.high
    assert levels.high - levels.low == 2**bits - (2 if scheme == "symmetric" else 1)
    assert torch.equal(levels.integers(levels.real(integers)), integers)


def fitted(weight: Tensor, bits: int, scheme: Scheme, per_tensor: bool, group: int | None, mse: bool) -> WeightLevels:
    groups = None if per_tensor else group
    return weight_levels(weight, bits, scheme=scheme, per_tensor=per_tensor, group_size=groups, mse=mse)


@given(shape=sizes, bits=st.integers(2, 8), scheme=schemes, seed=st.integers(0, 99))
def test_the_least_squared_error_is_no_more_than_that_of_the_largest_weight(
    shape: tuple[int, int], bits: int, scheme: Scheme, seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    errors = []
    for mse in (True, False):
        levels = weight_levels(weight, bits, scheme=scheme, mse=mse)
        errors.append((levels.real(levels.integers(weight)) - weight).square().sum(1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


def test_a_group_size_that_does_not_divide_leaves_one_scale_a_channel() -> None:
    weight = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    assert weight_levels(weight, 4, group_size=4).scale.shape == (3, 1)
    assert weight_levels(weight, 4, group_size=3).scale.shape == (3, 2)


@settings(deadline=None)  # fitting to the least error is slow beside other work
@given(
    rows=st.integers(1, 4), bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]), scheme=schemes, mse=st.booleans(),
    exponent=st.integers(-40, 30), empty=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_groups_keep_their_precision_whatever_their_size(
    rows: int, bits: int, scheme: Scheme, mse: bool, exponent: int, empty: bool, seed: int
) -> None:
    weight = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight[:, :4] *= 0.0 if empty else 2.0**-20  # beside groups that are larger
    levels = weight_levels(weight, bits, scheme=scheme, group_size=4, mse=mse)
    real, groups = levels.real(levels.integers(weight)), weight.reshape(rows, 3, 4)
    assert levels.scale.isfinite().all()
    assert (levels.scale > 0).all()
    ends = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    finest = (groups.abs().amax(2) * 2 if scheme == "symmetric" else ends) / (levels.high - levels.low)
    assert (real[weight == 0] == 0).all()
    if not mse:  # within half a step, and what its rounding takes from the ends of the range
        assert ((real - weight).reshape(rows, 3, 4).abs() <= (1.01 * finest).unsqueeze(2)).all()
        assert ((levels.scale - finest).abs() * (levels.high - levels.low) <= 0.501 * finest)[finest > 0].all()


@settings(deadline=None)
@given(bits=st.integers(2, 8), scheme=schemes, mse=st.booleans(), size=st.floats(0.01, 1e4), seed=st.integers(0, 99))
def test_scales_of_groups_are_16_bit_floats_and_those_of_channels_are_not(
    bits: int, scheme: Scheme, mse: bool, size: float, seed: int
) -> None:
    weight = size * torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
    weight[:, 0], weight[0, 4:] = size, 0.0
    found = weight_levels(weight, bits, scheme=scheme, mse=mse, group_size=4)
    assert torch.equal(found.scale.half().float(), found.scale)
    channels = weight_levels(weight, bits)
    torch.testing.assert_close(channels.scale[:, 0], weight.amax(1) / channels.high, atol=0, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # the compiler's own
def test_levels_of_groups_are_the_same_compiled() -> None:
    def real(weight: Tensor) -> Tensor:
        levels = weight_levels(weight, 4, group_size=4)
        return levels.real(levels.integers(weight))

    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.compile(real, fullgraph=True)(weight), real(weight))
    torch.compiler.reset()


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("size", "small", "stored"),
    [
        (1.0, 1.0, torch.float16),
        (1.0, 0.0, torch.float16),
        (1.0, 1e-8, torch.float32),
        (0.0, 1.0, torch.float16),
        (1e-8, 1.0, torch.float32),
        (1e4, 1.0, torch.float16),
        (1e6, 1.0, torch.float32),
        (1e-33, 1.0, torch.float16),  # next to nothing: zeros
    ],
)
def test_scales_of_groups_take_16_bits_where_these_hold_all_of_a_weight(
    scheme: Scheme, size: float, small: float, stored: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    weight = model.get_parameter("1.weight").data
    weight *= 8 * size
    weight[3, 16:32] *= small
    config = PTQ(weight_bits=4, weight_scheme=scheme, group_size=16, activation_bits=None)
    found = config.apply(model, context(tmp_path, key=f"{size} {small}"))
    (folder := tmp_path / "saved").mkdir()
    save(found, folder)
    assert load_file(folder / "weights.safetensors")["1.weight_scale"].dtype == stored
    (node,) = nodes_of(load(folder).graph, STORED)
    levels = weight_levels(weight, 4, scheme=scheme, group_size=16)
    assert torch.equal(real_weight(load(folder).graph, node), levels.real(levels.integers(weight)))
    assert torch.equal(simulation(load(folder))(INPUTS), simulation(found)(INPUTS))
    assert simulation(found)(INPUTS).isfinite().all()


def test_a_scale_of_a_group_takes_two_bytes(tmp_path: Path) -> None:
    found = PTQ(weight_bits=4, group_size=16, activation_bits=None).apply(network("mlp"), context(tmp_path))
    save(found, tmp_path)
    stored = load_file(tmp_path / "weights.safetensors")
    scales = {name: value for name, value in stored.items() if name.endswith("_scale")}
    assert {value.element_size() for value in scales.values()} == {2}
    groups = 64 // 16 * 32 + 32 // 16 * 10
    assert sum(value.numel() for value in scales.values()) == groups
    bytes_ = (64 * 32 + 32 * 10) // 2 + 2 * groups + 4 * 42  # weights, scales, biases
    assert sum(value.nbytes for value in stored.values()) == work(found)["size_theoretical_bytes"] == bytes_


@pytest.mark.parametrize("name", ["digits_cnn", "depthwise", "sequence"])
@pytest.mark.parametrize("fields", OTHER, ids=str)
def test_every_form_is_read_back_as_it_was_written(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    found = PTQ.model_validate(fields | {"calibration_samples": 60}).apply(network(name), context(tmp_path, name))
    folder = tmp_path / "saved"
    folder.mkdir()
    save(found, folder)
    again = load(folder)
    assert torch.equal(simulation(again)(INPUTS), simulation(found)(INPUTS))
    widths = [[weight_bits_of(node) for node in nodes_of(model.graph, STORED)] for model in (found, again)]
    assert widths[0] == widths[1]
    assert widths[0]


def test_groups_are_nearer_to_the_weights_than_channels(tmp_path: Path) -> None:
    model = network("digits_cnn")
    outputs = [
        simulation(PTQ(weight_bits=3, activation_bits=None, group_size=size).apply(model, context(tmp_path)))(INPUTS)
        for size in (None, 3)
    ]
    errors = [(found - model(INPUTS)).square().mean() for found in outputs]
    assert errors[1] < errors[0]


def test_groups_have_an_op_of_their_own(tmp_path: Path) -> None:
    found = PTQ(weight_bits=3, activation_bits=None, group_size=3).apply(network("digits_cnn"), context(tmp_path))
    assert nodes_of(found.graph, {DEQUANTIZE_GROUPS})


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        *((engine, fields) for engine in (Inductor(), Reference()) for fields in OTHER),
        *((OnnxRuntime(), fields) for fields in OTHER if "activation_bits" not in fields or fields["activation_bits"]),
    ],
    ids=lambda value: str(getattr(value, "engine", value)),
)
def test_integer_engines_refuse_it_and_say_what_runs_it(engine: Any, fields: dict[str, Any]) -> None:
    config = Compression.model_validate({"quantize": {"method": "ptq"} | fields})
    assert "`float`" in str(engine.refuses(config))
    assert Float(simulate=True).refuses(config) is None


def test_weights_alone_need_no_simulation() -> None:
    alone = Compression.model_validate({"quantize": {"method": "ptq", "activation_bits": None}})
    both = Compression.model_validate({"quantize": {"method": "ptq"}})
    assert Float().refuses(alone) is None
    assert "`simulate: true`" in str(Float().refuses(both))


@pytest.mark.parametrize(
    ("quantize", "simulate", "shown"),
    [
        ({"method": "ptq", "activation_bits": 4}, True, "float (simulated)"),
        ({"method": "ptq", "activation_bits": None}, True, "float"),
        ({"method": "cast"}, False, "float"),
        (None, True, "float"),
    ],
)
def test_what_was_simulated_is_shown_as_such(quantize: Any, simulate: bool, shown: str) -> None:
    target = {"engine": "float", "simulate": simulate}
    candidate = accepted(TrialConfig.model_validate({"compress": {"quantize": quantize}, "target": target}))
    known: dict[str, Any] = {"number": 1, "uid": "u", "name": "n", "state": "complete", "folder": "f"}
    record = Record(**known, config=candidate.plain, engine=candidate.engine, simulated=candidate.simulated)
    assert engine_text(record) == shown


@pytest.mark.parametrize(
    "fields", [{"weight_bits": 9}, {"activation_bits": 12}, {"group_size": 8, "weight_granularity": "tensor"}], ids=str
)
def test_widths_and_scales_that_there_are_not_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PTQ.model_validate(fields)


def test_the_label_tells_what_is_not_the_default() -> None:
    assert PTQ(weight_bits=4).label() == "ptq-w4s-a8a"
    scheme = PTQ(weight_bits=4, weight_scheme="asymmetric", group_size=32, activation_bits=None)
    assert scheme.label() == "ptq-w4a-g32"
    assert PTQ(weight_granularity="tensor", calibration="mse", calibration_samples=128).label() == (
        "ptq-w8s-a8a-tensor-mse-n128"
    )
    assert PTQ(weight_bits=4, edge_bits=8, weight_range="mse").label() == "ptq-w4s-a8a-wmse-edge8"
    assert Codebook(weight_bits=3, edge_bits=8).label() == "codebook-w3-edge8"
