from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from networks import Noise, context, network
from torch import Tensor, nn

from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.errors import NotFinite, ParityFailure
from qsweep.hub.export import float_graph
from qsweep.machine import gpu_of
from qsweep.measure.deployed import outputs, parity
from qsweep.measure.files import file_sizes
from qsweep.measure.latency import latency, median_interval
from qsweep.measure.memory import PeakMemory
from qsweep.measure.sizes import work
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Measure

QUICK = Measure(latency_pairs=10, latency_seconds=0.01)


def weights_bytes(folder: Path) -> int:
    """Bytes of the packed integer weights of an artifact, without header, scales and biases."""
    from safetensors.torch import load_file

    found = load_file(folder / "weights.safetensors")
    return sum(value.numel() for value in found.values() if value.dtype in (torch.int8, torch.uint8))


@pytest.mark.parametrize("engine", [Reference(), OnnxRuntime()], ids=lambda engine: str(engine.engine))
def test_the_weights_of_a_2_bit_artifact_take_a_quarter_of_those_of_an_8_bit_one(
    engine: Reference | OnnxRuntime, tmp_path: Path
) -> None:
    found = context(tmp_path)
    stored, sizes = {}, {}
    for bits in (2, 4, 8):
        folder = tmp_path / str(bits)
        folder.mkdir()
        engine.lower(PTQ(weight_bits=bits).apply(network("digits_cnn"), found), folder, found.store)
        stored[bits], sizes[bits] = weights_bytes(folder), file_sizes(folder)["size_bytes"]
    assert stored[8] == 4 * stored[2] == 2 * stored[4] == 32 * 9 + 32 * 32 * 9 + 48 * 32 * 9 + 48 * 48 * 9 + 480
    assert sizes[2] < sizes[4] < sizes[8]


def test_sizes_are_those_of_all_files_and_never_grow_much_by_zstd(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "zeros").write_bytes(bytes(10_000))
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(1_000))
    sizes = file_sizes(tmp_path)
    assert sizes["size_bytes"] == 11_000
    assert 1_000 <= sizes["size_zstd_bytes"] < 1_100


class Tiny(nn.Module):
    """One convolution, 1 x 2 x 3 x 3 weights and 2 biases, on 8 x 8."""

    def __init__(self, zeros: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.conv.weight.data.view(-1)[:zeros] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)  # type: ignore[no-any-return]


def test_theoretical_size_and_work_of_a_tiny_model_are_those_counted_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = work(PTQ(weight_bits=4, activation_bits=6).apply(Tiny().eval(), context(tmp_path)))
    # 18 weights of 4 bits, 2 scales and 2 biases of 32, one activation grid of 64 (the output is not quantized)
    assert found["size_theoretical_bytes"] == math.ceil((18 * 4 + 4 * 32 + 64) / 8)
    assert found["macs"] == 18 * 64
    assert found["bit_operations"] == 18 * 64 * 4 * 6
    assert found["params"] == 20


@pytest.mark.parametrize(("dtype", "bits"), [(None, 32), ("bf16", 16)])
def test_a_float_model_is_counted_at_the_bits_of_its_type(
    dtype: Literal["bf16"] | None, bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = float_graph(Tiny().eval(), context(tmp_path))
    found = work(model.cast_to(dtype) if dtype else model)
    assert found["size_theoretical_bytes"] == 20 * bits / 8
    assert found["bit_operations"] == 18 * 64 * bits * bits


def test_a_sparse_weight_is_counted_as_a_mask_and_the_values_that_are_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = work(float_graph(Tiny(zeros=9).eval(), context(tmp_path)))
    assert found["sparsity"] == 0.5
    assert found["size_theoretical_bytes"] == math.ceil((18 + 9 * 32 + 2 * 32) / 8)


def test_outputs_of_a_ragged_last_batch_are_those_of_each_sample_alone() -> None:
    task, seen = Noise(7), []

    def run(inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return inputs.flatten(1).cumsum(1)

    found = outputs(run, task, "validation", 3)
    assert seen == [3, 3, 3]
    assert torch.equal(found, task.inputs.flatten(1).cumsum(1))


def test_outputs_that_share_one_buffer_are_copied() -> None:
    task, buffer = Noise(6), torch.empty(2, 64)
    found = outputs(lambda inputs: buffer.copy_(inputs.flatten(1)), task, "validation", 2)
    assert torch.equal(found, task.inputs.flatten(1))


def test_outputs_that_are_not_finite_are_a_typed_failure() -> None:
    with pytest.raises(NotFinite, match="outputs must be finite"):
        outputs(lambda inputs: inputs.flatten(1) / 0, Noise(4), "validation", 2)


def test_parity_below_its_bound_is_a_typed_failure() -> None:
    simulated = torch.eye(10)
    deployed = simulated.clone()
    deployed[0] = deployed[1]
    labels = torch.arange(10)
    with pytest.raises(ParityFailure, match=r"must agree on 95\.0% of the top classes \(got 90\.0%; "):
        parity(deployed, simulated, labels, Measure(parity_top1=0.95))
    assert parity(deployed, simulated, labels, Measure(parity_top1=0.9)) == {
        "parity_top1": pytest.approx(0.9),
        "parity_max_abs": 1.0,
    }


@pytest.mark.parametrize("shape", [(100,), (100, 1)])
def test_outputs_of_one_number_agree_where_they_differ_little(shape: tuple[int, ...]) -> None:
    simulated, labels = torch.linspace(0, 10, 100).reshape(shape), torch.zeros(100, dtype=torch.long)
    assert parity(simulated + 0.19, simulated, labels, Measure())["parity_top1"] == 1.0
    with pytest.raises(ParityFailure, match=r"must agree on 95\.0% of the outputs \(got 0\.0%; "):
        parity(simulated + 0.21, simulated, labels, Measure())


@pytest.mark.parametrize(
    "labels",
    [torch.rand(100, 3), torch.randint(0, 256, (100, 3, 2), dtype=torch.uint8), torch.rand(100)],
    ids=["several numbers", "images", "one number of several"],
)
def test_outputs_that_are_no_classes_agree_where_they_differ_little_by_what_each_reaches(labels: Tensor) -> None:
    """Their largest is the third by far, whatever an artifact makes of the others."""
    simulated = torch.linspace(0, 10, 200).reshape(100, 1, 2) * torch.tensor([0.01, 1.0, 100.0]).reshape(3, 1)
    near, far = simulated * 1.01, simulated.clone()
    far[:, 0] += 0.01
    assert parity(near, simulated, labels, Measure())["parity_top1"] == 1.0
    with pytest.raises(ParityFailure, match=r"must agree on 95\.0% of the outputs \(got 66\.7%; "):
        parity(far, simulated, labels, Measure())


def test_outputs_that_are_the_same_for_all_samples_agree_but_for_rounding() -> None:
    labels, one = torch.zeros(4, 2), torch.tensor([[1.35, 2.0], [1.35, 3.0], [1.35, 4.0], [1.35, 5.0]])
    rounded = one + torch.tensor([1e-7, 0.0])
    assert parity(rounded, one, labels, Measure())["parity_top1"] == 1.0
    with pytest.raises(ParityFailure):
        parity(one + torch.tensor([1e-3, 0.0]), one, labels, Measure())


def test_of_one_sample_all_outputs_tell_the_range() -> None:
    one = torch.tensor([[1.0, 2.0, 3.0]])
    assert parity(one + 0.03, one, torch.zeros(1, 3), Measure())["parity_top1"] == 1.0
    with pytest.raises(ParityFailure):
        parity(one + 0.05, one, torch.zeros(1, 3), Measure())


def test_outputs_by_token_agree_in_the_class_of_each_token() -> None:
    simulated = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))  # (2, tokens, classes)
    deployed = simulated * torch.linspace(1, 3, 5).reshape(5, 1)  # no class of a token gets past another
    labels = torch.tensor([[0, 1, 2, 3, -100]] * 2)
    assert parity(deployed, simulated, labels, Measure())["parity_top1"] == 1.0
    deployed[0, 0] = deployed[0, 0].flip(0)
    assert parity(deployed, simulated, labels, Measure(parity_top1=0))["parity_top1"] == 0.9


def test_outputs_by_place_agree_in_the_class_of_each_place() -> None:
    simulated = torch.eye(4).repeat(2, 1, 1)  # (2, classes, places)
    deployed = simulated.clone()
    deployed[0] = deployed[0].flip(0)
    labels = torch.zeros(2, 4, dtype=torch.long)
    assert parity(deployed, simulated, labels, Measure(parity_top1=0))["parity_top1"] == 0.5


def test_the_interval_covers_the_true_median_in_about_19_of_20_draws() -> None:
    drawn = np.random.default_rng(1).lognormal(0.0, 0.5, (200, 50))  # the true median is 1
    intervals = [median_interval(times) for times in drawn]
    assert sum(low <= 1 <= high for low, high in intervals) >= 180
    assert all(low <= np.median(times) <= high for times, (low, high) in zip(drawn, intervals, strict=True))


def test_an_artifact_without_a_baseline_is_its_own() -> None:
    found = latency(lambda inputs: inputs, None, torch.zeros(1), QUICK)
    assert found["latency_ratio"] == 1.0
    assert 0 <= found["latency_low_ms"] <= found["latency_ms"] <= found["latency_high_ms"]
    assert found["latency_ms"] <= found["latency_p95_ms"]


def test_artifact_and_baseline_are_called_in_turns() -> None:
    calls: list[str] = []

    def named(name: str, inputs: Tensor) -> Tensor:
        calls.append(name)
        return inputs

    found = latency(lambda x: named("a", x), lambda x: named("b", x), torch.zeros(1), QUICK)
    timed = "".join(calls)[-24:]
    assert timed == "aaaaaabbbbbb" * 2
    assert found["latency_ratio"] > 0


def test_peak_memory_sees_an_allocation_that_is_freed_again() -> None:
    memory = PeakMemory()
    before = memory.bytes()
    if before is None:
        pytest.skip("this system does not tell")
    block = bytearray(100 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    del block
    after = memory.bytes()
    assert after is not None
    assert before < 50 * 2**20
    assert 95 * 2**20 <= after <= 150 * 2**20


@pytest.mark.parametrize(
    ("place", "count", "visible", "found"),
    [
        (0, 2, None, "0"),
        (3, 2, None, "1"),
        (1, 3, "2, 5,7", "5"),
        (2, 2, "GPU-1f,GPU-2e,-1", "GPU-1f"),
        (1, 2, "", "1"),
    ],
)
def test_each_place_has_one_of_the_gpus_that_may_be_seen(
    place: int, count: int, visible: str | None, found: str
) -> None:
    assert gpu_of(place, count, visible) == found
