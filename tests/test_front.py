from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_sweep import small_spec

from qsweep.records import Metrics, Record
from qsweep.spec import Constraint
from qsweep.study import Places, SweepFolder, pareto
from qsweep.study.notes import notes

OBJECTIVES = ("accuracy", "size_bytes")


def record(number: int, state: str = "complete", kernels: str = "", **metrics: float) -> Record:
    config = {"compress": {"number": number}}
    content: dict[str, Any] = {"number": number, "uid": str(number), "name": "x", "config": config, "engine": "e"}
    return Record(**content, state=state, kernels=kernels, folder="f", metrics=Metrics(**metrics))  # type: ignore[arg-type]


def points(*pairs: tuple[float, float]) -> list[Record]:
    return [record(i, accuracy=accuracy, size_bytes=size) for i, (accuracy, size) in enumerate(pairs)]


grid = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(grid)
def test_the_front_is_what_no_other_record_dominates(pairs: list[tuple[int, int]]) -> None:
    records = points(*pairs)
    front = {member.number for member in pareto(records, OBJECTIVES)}
    for i, (accuracy, size) in enumerate(pairs):
        beaten = any(a >= accuracy and s <= size and (a, s) != (accuracy, size) for a, s in pairs)
        assert (i in front) == (not beaten)


def test_only_feasible_complete_records_that_were_evaluated_themselves_are_on_the_front() -> None:
    good, small = points((0.9, 10), (0.5, 1))
    failed = record(2, state="failed", accuracy=1.0, size_bytes=1)
    copy = good.model_copy(update={"number": 3, "duplicate_of": 0})
    unmeasured = record(4, accuracy=1.0)
    everything = [good, small, failed, copy, unmeasured]
    assert pareto(everything, OBJECTIVES) == [good, small]
    assert pareto(everything, OBJECTIVES, {"accuracy": Constraint(min=0.6)}) == [good]
    assert pareto([failed], OBJECTIVES) == []
    assert Places([failed], OBJECTIVES).members() == {}


def test_a_record_whose_lead_is_noise_is_probable_and_one_whose_lead_is_not_is_certain() -> None:
    random = np.random.default_rng(0)
    scores = {
        0: (random.random(2000) < 0.95).astype(np.uint8),
        1: (random.random(2000) < 0.90).astype(np.uint8),
    }
    scores[2] = scores[1].copy()
    scores[2][np.flatnonzero(scores[2] == 0)[:2]] = 1  # two samples better than 1, and larger
    records = [record(i, accuracy=float(scores[i].mean()), size_bytes=size) for i, size in enumerate((30, 10, 20))]
    assert Places(records, OBJECTIVES, scores=scores).members() == {0: "certain", 1: "certain", 2: "probable"}


def test_accuracies_are_drawn_from_the_same_samples_for_all() -> None:
    """One is right wherever the other is, and on 20 samples more: it leads in every paired draw."""
    base = (np.arange(2000) < 1000).astype(np.uint8)
    scores = {0: base, 1: (np.arange(2000) < 1020).astype(np.uint8)}
    records = [record(i, accuracy=float(scores[i].mean()), size_bytes=10 + i) for i in (0, 1)]
    assert Places(records, OBJECTIVES, scores=scores).members()[1] == "certain"


@pytest.mark.parametrize("count", [5, 6, 7, 9, 10, 11])
def test_records_that_are_equal_stand_in_each_others_way_in_no_draw(count: int) -> None:
    scores = {i: (np.random.default_rng(0).random(800) < 0.9).astype(np.float32) for i in range(count)}
    records = [record(i, accuracy=float(scores[i].mean()), size_bytes=10) for i in range(count)]
    assert Places(records, OBJECTIVES, scores=scores).shares == dict.fromkeys(range(count), 1.0)


@pytest.mark.parametrize(("half_width", "expected"), [(0.01, "certain"), (3.0, "probable")])
def test_latency_is_drawn_from_its_interval(half_width: float, expected: str) -> None:
    records = [
        record(i, size_bytes=size, latency_ms=ms, latency_low_ms=ms - half_width, latency_high_ms=ms + half_width)
        for i, (size, ms) in enumerate([(10, 5.0), (20, 4.5)])
    ]
    assert Places(records, ("size_bytes", "latency_ms")).members()[1] == expected


def test_a_constraint_that_is_kept_by_a_hair_makes_membership_probable() -> None:
    scores = {0: (np.arange(1000) < 900).astype(np.uint8)}
    records = [record(0, accuracy=0.9, size_bytes=1)]
    assert Places(records, OBJECTIVES, {"accuracy": Constraint(min=0.899)}, scores).members() == {0: "probable"}
    assert Places(records, OBJECTIVES, {"accuracy": Constraint(min=0.8)}, scores).members() == {0: "certain"}


@pytest.mark.parametrize(
    ("drop", "points", "place"), [(0.5, 100, "probable"), (0.5, 1, "certain"), (0.01, 1, "probable")]
)
def test_a_drop_is_drawn_in_points_of_the_metric(drop: float, points: float, place: str) -> None:
    """Accuracies are equal, and differ by 0.03 or so from draw to draw."""
    scores = {0: np.tile([0.0, 1.0], 200), 1: np.tile([1.0, 0.0], 200)}
    records = [record(i, accuracy=0.5, accuracy_drop_pp=0.0, size_bytes=10 - i) for i in (0, 1)]
    bounds = {"accuracy_drop_pp": Constraint(max=drop)}
    assert Places(records, ("size_bytes",), bounds, scores, points=points).members() == {1: place}


@pytest.mark.parametrize(
    ("latency", "batch_size", "told"), [(0.7, 1, True), (0.3, 1, True), (0.55, 1, False), (4.0, 8, False)]
)
def test_milliseconds_that_do_not_say_what_ratios_say_are_told(
    latency: float, batch_size: int, told: bool, tmp_path: Path
) -> None:
    fp32 = record(0, latency_ms=1.0, latency_ratio=1.0)
    other = record(1, latency_ms=latency, latency_ratio=0.5)
    fp32, other = (
        r.model_copy(update={"config": {"target": {"batch_size": size, "threads": 1}}})
        for r, size in ((fp32, 1), (other, batch_size))
    )
    found = list(notes(small_spec(), SweepFolder(tmp_path, "small"), [fp32, other, record(2, state="failed")]))
    begins = ["latencies are of calls of 1, 8 samples"] * (batch_size > 1) + ["milliseconds of two rows"] * told
    assert [note[: len(begin)] for note, begin in zip(found, begins, strict=True)] == begins


def test_members_that_break_the_bounds_on_the_test_split_are_told(tmp_path: Path) -> None:
    spec = small_spec(constraints={"accuracy_drop_pp": {"max": 1}, "accuracy": {"min": 0.5}})
    values = [(0.9, None), (0.895, "certain"), (0.85, "certain"), (0.4, "probable"), (0.3, None)]
    found = [
        record(number, accuracy=0.9, accuracy_test=value).model_copy(update={"front": front})
        for number, (value, front) in enumerate(values)
    ]
    assert list(notes(spec, SweepFolder(tmp_path, "small"), found)) == [
        "#2 does not keep `constraints.accuracy_drop_pp` on the test split (it is 5 there)",
        "#3 does not keep `constraints.accuracy_drop_pp` on the test split (it is 50 there)",
        "#3 does not keep `constraints.accuracy` on the test split (it is 0.4 there)",
    ]


def test_what_was_asked_and_did_nothing_is_told(tmp_path: Path) -> None:
    channels, integers = {"prune": {"method": "channels"}}, {"quantize": {"activation_bits": 8}}
    found = [
        record(number, params=params, int8_mac_fraction=share).model_copy(update={"config": {"compress": compress}})
        for number, (params, share, compress) in enumerate(
            [(9, 0, {}), (9, 0, channels), (8, 0, channels), (9, 0, integers), (9, 0.5, integers)]
        )
    ]
    assert list(notes(small_spec(), SweepFolder(tmp_path, "small"), found)) == [
        "no channel could be taken out for #1: every layer is as wide as before, fine-tuned",
        "`int8_mac_fraction` is 0 for #3, though activations were to be quantized",
    ]


def test_milliseconds_of_several_batch_sizes_are_compared_as_milliseconds_and_throughputs_as_such() -> None:
    """Half the latency of fp32 at 32 samples is more milliseconds than all of it at one, and more samples a second."""
    one = record(0, latency_ms=1.0, latency_ratio=1.0, throughput=1000.0)
    many = record(1, latency_ms=5.0, latency_ratio=0.5, throughput=6400.0)
    one, many = (
        r.model_copy(update={"config": {"target": {"batch_size": size}}}) for r, size in ((one, 1), (many, 32))
    )
    assert [pareto([one, many], [name]) for name in ("latency_ms", "latency_ratio", "throughput")] == [
        [one], [many], [many],
    ]  # fmt: skip


def test_throughputs_of_one_batch_size_are_compared_by_what_the_baseline_took_meanwhile() -> None:
    """The machine was twice as slow while the second was measured."""
    slow = record(0, latency_ms=4.0, latency_ratio=0.8, throughput=250.0)
    fast = record(1, latency_ms=5.0, latency_ratio=0.5, throughput=200.0)
    assert pareto([slow, fast], ["throughput"]) == pareto([slow, fast], ["latency_ms"]) == [fast]


@given(grid)
def test_membership_is_of_the_observed_front_and_exact_figures_are_certain(pairs: list[tuple[int, int]]) -> None:
    records = points(*pairs)
    front = {member.number for member in pareto(records, OBJECTIVES)}
    assert Places(records, OBJECTIVES, draws=20).members() == dict.fromkeys(sorted(front), "certain")


def test_latencies_of_the_same_kernels_do_not_decide_the_front() -> None:
    noisy = [
        record(0, accuracy=0.90, latency_ms=2.00, latency_ratio=0.50),
        record(1, accuracy=0.89, latency_ms=1.80, latency_ratio=0.46),
        record(2, accuracy=0.88, latency_ms=9.00, latency_ratio=0.40),
    ]
    front = pareto(noisy, ("accuracy", "latency_ms"))
    assert [member.number for member in front] == [0, 2], "0.46 is 0.50 within the resolution; 0.40 is not"


def test_the_ratio_to_the_baseline_is_compared_rather_than_milliseconds() -> None:
    disturbed = [
        record(0, accuracy=0.90, latency_ms=20.0, latency_ratio=0.2),
        record(1, accuracy=0.89, latency_ms=10.0, latency_ratio=0.4),
    ]
    assert [member.number for member in pareto(disturbed, ("accuracy", "latency_ms"))] == [0]


def test_records_of_the_same_kernels_share_the_median_of_their_latencies() -> None:
    records = [
        record(0, accuracy=0.90, latency_ms=2.0, latency_ratio=0.50, kernels="int8"),
        record(1, accuracy=0.91, latency_ms=2.6, latency_ratio=0.65, kernels="int8"),
        record(2, accuracy=0.89, latency_ms=1.6, latency_ratio=0.40, kernels="int8"),
        record(3, accuracy=0.92, latency_ms=3.2, latency_ratio=0.80, kernels="bf16"),
    ]
    assert [r.number for r in pareto(records, ("accuracy", "latency_ms"))] == [1, 3]


def test_files_that_differ_by_the_digits_of_their_scales_have_one_size() -> None:
    records = [
        record(0, accuracy=0.90, size_bytes=299_890),
        record(1, accuracy=0.91, size_bytes=299_922),
        record(2, accuracy=0.89, size_bytes=233_447),
    ]
    assert [r.number for r in pareto(records, ("accuracy", "size_bytes"))] == [1, 2]
