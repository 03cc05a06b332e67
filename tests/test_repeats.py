"""Near ties are run again with other seeds, and the front is that of all evaluations together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_sweep import calls, small_spec, start, states, sweep, told, until
from test_front import OBJECTIVES, record

from qsweep.executors.local import holder
from qsweep.records import Failure, Metrics, Record, Repetition
from qsweep.spec import Constraint, Spec
from qsweep.study import Places, SweepFolder, pareto
from qsweep.study.repeats import ROUNDS, budget, due, redrawn, seed_of, with_repetition

NEAR = {"accuracy": {"min": 0.869}}
"""The config of 6 bits keeps it by one sample of 1000, in half of all draws."""


def again(first: Record, *accuracies: float | None, **metrics: float) -> Record:
    """The record after repetitions with these accuracies; None: it failed."""
    for round, accuracy in enumerate(accuracies, 1):
        found: dict[str, Any] = {"metrics": Metrics(**first.metrics.model_dump() | {"accuracy": accuracy} | metrics)}
        if accuracy is None:
            found = {"failure": Failure(kind="NotFinite", message="NaN")}
        first = with_repetition(first, Repetition(round=round, seed=round, folder=f"r{round}", **found))
    return first


def test_a_config_stands_for_the_mean_of_its_evaluations() -> None:
    lucky, steady = record(0, accuracy=0.92, size_bytes=10), record(1, accuracy=0.91, size_bytes=10)
    assert pareto([lucky, steady], OBJECTIVES) == [lucky]
    lucky = again(lucky, 0.89, 0.89)
    assert pareto([lucky, steady], OBJECTIVES) == [steady]
    assert lucky.metrics.accuracy == 0.92  # of the artifact that ships
    assert lucky.metrics.accuracy_mean == pytest.approx(0.90)
    assert lucky.metrics.accuracy_spread == pytest.approx(np.std([0.92, 0.89, 0.89], ddof=1))


@pytest.mark.parametrize(("own", "other", "kept"), [(0.92, 0.90, True), (0.92, 0.86, False), (0.89, 0.95, False)])
def test_a_bound_is_kept_by_the_artifact_that_ships_and_by_the_mean(own: float, other: float, kept: bool) -> None:
    one = again(record(0, accuracy=own, size_bytes=1), other)
    assert bool(pareto([one], OBJECTIVES, {"accuracy": Constraint(min=0.9)})) == kept


def test_latencies_of_repetitions_count_in_the_median_of_their_kernels() -> None:
    slow = record(0, accuracy=0.9, latency_ms=9.0, latency_ratio=0.9)
    fast = record(1, accuracy=0.9, latency_ms=5.0, latency_ratio=0.5)
    objectives = ("accuracy", "latency_ms")
    assert pareto([slow, fast], objectives) == [fast]
    slow = again(slow, 0.9, 0.9, latency_ms=2.0, latency_ratio=0.2)
    assert pareto([slow, fast], objectives) == [slow]


def test_a_config_whose_draws_disagree_is_probable() -> None:
    """On the same 2000 samples: without the other draws its lead were certain."""
    rows = {0: np.arange(2000) < 1700, 1: np.arange(2000) < 1600}
    leads, other = (record(i, accuracy=rows[i].mean(), size_bytes=10 - i) for i in (0, 1))
    assert Places([leads, other], OBJECTIVES, scores=rows).members()[0] == "certain"
    draws = np.stack([rows[0], np.arange(2000) < 1300, np.arange(2000) < 1900])
    wavers = again(leads, *(row.mean() for row in draws[1:]))
    assert Places([wavers, other], OBJECTIVES, scores={**rows, 0: draws}).members()[0] == "probable"


def test_a_member_of_which_a_repetition_failed_is_never_certain() -> None:
    sure = record(0, accuracy=0.9, size_bytes=1)
    assert Places([again(sure, 0.9)], OBJECTIVES).members() == {0: "certain"}
    assert Places([again(sure, 0.9, None)], OBJECTIVES).members() == {0: "probable"}


def test_contested_are_probable_members_and_who_is_nearly_one() -> None:
    random = np.random.default_rng(0)
    right = (random.random(2000) < 0.9).astype(np.uint8)
    nearly, hopeless = right.copy(), right.copy()
    nearly[np.flatnonzero(right)[:1]] = 0
    nearly[np.flatnonzero(right == 0)[:1]] = 1
    hopeless[np.flatnonzero(right)[:200]] = 0
    scores = {0: right, 1: nearly, 2: hopeless, 3: np.ones(2000)}
    sizes = {0: 10, 1: 10, 2: 10, 3: 90}
    records = [record(i, accuracy=float(scores[i].mean()), size_bytes=sizes[i]) for i in scores]
    records[1] = record(1, accuracy=records[0].metrics.accuracy - 1e-9, size_bytes=10)
    assert Places(records, OBJECTIVES, scores=scores).members() == {0: "probable", 3: "certain"}
    assert {found.number for found in Places(records, OBJECTIVES, scores=scores).contested()} == {0, 1}


# --- which, and when --------------------------------------------------------------------------------------------------


def open_places(count: int) -> tuple[list[Record], dict[int, np.ndarray]]:
    """Records that only chance puts in an order; the fp32 one among them."""
    random = np.random.default_rng(1)
    scores = {i: (random.random(300) < 0.8).astype(np.uint8) for i in range(count)}
    records = [record(i, accuracy=float(row.mean()), size_bytes=10, latency_ms=1.0) for i, row in scores.items()]
    return [r.model_copy(update={"config": configured(r.number), "engine": "onnxruntime"}) for r in records], scores


def configured(number: int, engine: str = "onnxruntime") -> dict[str, Any]:
    """A config of its own for each number; fp32 for 0."""
    quantize = {"method": "ptq", "calibration_seed": number} if number else None
    return {"compress": {"quantize": quantize}, "target": {"engine": engine}}


def asked(spec: Spec, records: Sequence[Record], round: int, rows: Mapping[int, np.ndarray]) -> list[int]:
    def scores(records: Sequence[Record]) -> dict[int, np.ndarray]:
        return {r.number: np.stack([rows[r.number]] * (1 + len(r.repetitions))) for r in records}

    return [found.number for found in due(spec, records, round, scores)]


@pytest.mark.parametrize(("search", "most"), [({"trials": 60}, 6), ({"trials": 9}, 0), ({"repeats": 17}, 17)])
def test_a_sweep_has_a_repetition_for_every_ten_trials_unless_it_says_how_many(
    search: dict[str, int], most: int
) -> None:
    assert budget(small_spec(search=search)) == most


def test_a_round_takes_the_most_open_configs_that_a_seed_can_change_as_far_as_the_budget_goes() -> None:
    records, scores = open_places(8)
    everyone = asked(small_spec(search={"repeats": 99}), records, 1, scores)
    assert len(everyone) > 3
    assert 0 not in everyone  # fp32
    assert asked(small_spec(search={"repeats": 3}), records, 1, scores) == everyone[:3]
    assert asked(small_spec(search={"repeats": 0}), records, 1, scores) == []


TWO = {"target": {"engine": {"choice": ["onnxruntime", "openvino"]}}, "objectives": ["accuracy", "latency_ms"]}


def on_two_engines(*losses: int) -> tuple[list[Record], dict[int, np.ndarray]]:
    """Configs that only chance puts in an order; record 10 + i is config i on an engine that takes 9 times as long, and
    has lost so many samples more."""
    records, scores = open_places(1 + len(losses))
    slow = []
    for number, lost in enumerate(losses, 1):
        row = scores[number].copy()
        row[np.flatnonzero(row)[:lost]] = 0
        scores[10 + number] = row
        config = {"config": configured(number, "openvino"), "engine": "openvino", "kernels": "slow"}
        of = record(10 + number, accuracy=float(row.mean()), size_bytes=10, latency_ms=9.0)
        slow.append(of.model_copy(update=config))
    return [*records, *slow], scores


def test_a_config_is_repeated_on_every_engine_that_it_is_compared_on() -> None:
    """Else a place that its mean has lost on one is taken by its first evaluation on another."""
    records, scores = on_two_engines(0, 0, 0)
    one = small_spec(search={"repeats": 1}, **TWO)
    first = asked(one, records, 1, scores)
    assert [number % 10 for number in first] == [first[0] % 10] * 2
    assert {number // 10 for number in first} == {0, 1}
    half = [again(r, 0.1) if r.number == first[1] else r for r in records]
    assert asked(one, half, 1, scores) == first[:1]
    both = [again(r, 0.1) if r.number in first else r for r in records]
    assert asked(one, both, 2, scores) == []
    assert len(asked(small_spec(search={"repeats": 2}, **TWO), both, 2, scores)) == 2


def test_a_config_that_comes_on_another_engine_later_is_repeated_like_the_first() -> None:
    """Its mean has lost the one place there was; nothing is open in the round that it was repeated in."""
    records, scores = on_two_engines(0)
    records = [r if r.number in (0, 11) else again(r, 0.1) for r in records]
    records[0] = records[0].model_copy(update={"metrics": Metrics(accuracy=0.1, size_bytes=20, latency_ms=20.0)})
    one = small_spec(search={"repeats": 1}, **TWO)
    assert asked(one, [r for r in records if r.number != 11], 1, scores) == []
    assert asked(one, records, 1, scores) == [11]


def test_one_that_is_not_compared_is_not_repeated() -> None:
    records, scores = on_two_engines(0, 0, 100)
    spec: dict[str, Any] = TWO | {"search": {"repeats": 9}}
    assert sorted(asked(small_spec(**spec), records, 1, scores)) == [1, 3, 11, 13]
    bound = {"constraints": {"accuracy": {"min": 0.6}}}
    assert sorted(asked(small_spec(**spec, **bound), records, 1, scores)) == [1, 3, 11]


def test_engines_of_one_config_draw_the_same_of_its_repetitions() -> None:
    """The faster one is as accurate in each: drawn apart, each had the luckier seed in half of the draws."""
    fast, slow = (record(i, accuracy=0.9, size_bytes=10, latency_ms=1.0 + 8 * i) for i in (0, 1))
    slow = slow.model_copy(update={"config": fast.config, "kernels": "slow"})
    records = [again(each, 0.7, 0.8, 0.95) for each in (fast, slow)]
    assert Places(records, ("accuracy", "latency_ms")).shares == {0: 1.0, 1: 0.0}
    apart = [records[0], records[1].model_copy(update={"config": {"compress": {"number": 1}}})]
    assert 0.2 < Places(apart, ("accuracy", "latency_ms")).shares[1] < 0.8


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_round_that_was_cut_short_is_the_same_round_when_it_goes_on(done: int) -> None:
    records, scores = open_places(8)
    spec = small_spec(search={"repeats": 3})
    first = asked(spec, records, 1, scores)
    numbers = first[-done:] if done else []
    part = [again(r, 0.1) if r.number in numbers else r for r in records]
    assert asked(spec, part, 1, scores) == [number for number in first if number not in numbers]
    assert asked(spec, [again(r, 0.1) if r.number in first else r for r in records], 2, scores) == []


def test_what_more_trials_have_made_less_open_still_counts() -> None:
    records, scores = open_places(8)
    everyone = asked(small_spec(search={"repeats": 99}), records, 1, scores)
    before = [again(r, 0.1) if r.number in everyone[2:4] else r for r in records]
    assert asked(small_spec(search={"repeats": 2}), before, 1, scores) == []
    assert asked(small_spec(search={"repeats": 3}), before, 1, scores) == everyone[:1]


def test_a_repetition_draws_anew_even_where_the_config_fixes_its_draw() -> None:
    spec = small_spec(search={"seed": 3})
    assert len({seed_of(spec, round) for round in range(ROUNDS + 1)}) == ROUNDS + 1
    assert seed_of(spec, 0) == 3
    free: dict[str, Any] = {"compress": {"quantize": {"calibration_seed": None}, "prune": None}}
    fixed: dict[str, Any] = {"compress": {"quantize": {"calibration_seed": 7}}}
    assert redrawn(free, 1) == free
    seeds = [redrawn(fixed, round)["compress"]["quantize"]["calibration_seed"] for round in (1, 2)]
    assert len({7, *seeds}) == 3
    assert fixed["compress"]["quantize"]["calibration_seed"] == 7
    assert redrawn({"compress": {"quantize": None}}, 1) == {"compress": {"quantize": None}}


# --- in a sweep -------------------------------------------------------------------------------------------------------


def near(**search: Any) -> Spec:
    return small_spec(constraints=NEAR, search={"trials": 6} | search)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Record]]:
    """A sweep with two repetitions that nothing disturbed: its folder and its records."""
    root = tmp_path_factory.mktemp("whole")
    return root, sweep(root, near(repeats=2))


def test_near_ties_are_run_again_with_other_seeds_and_the_rest_is_not(whole: tuple[Path, dict[int, Record]]) -> None:
    root, records = whole
    repeated = {number: found for number, record in records.items() for found in record.repetitions}
    assert {number: found.round for number, found in repeated.items()} == {8: 1, 7: 2}, "7 is open once 8 has gone"
    for number, found in repeated.items():
        job = json.loads((root / "sweeps/small" / found.folder / "job.json").read_text())
        assert (job["seed"], job["draw"], job["config"]) == (0, found.seed, records[number].config)
        assert found.seed == seed_of(near(), found.round) != 0
        metrics = records[number].metrics
        accuracies = [metrics.accuracy, found.metrics.accuracy]
        assert metrics.accuracy_mean == pytest.approx(np.mean(accuracies))
        assert metrics.accuracy_spread == pytest.approx(np.std(accuracies, ddof=1))
    assert states(root) == {"COMPLETE": 6}


def test_more_repetitions_may_be_asked_of_a_finished_sweep_and_none_is_made_twice(
    tmp_path: Path, whole: tuple[Path, dict[int, Record]]
) -> None:
    """Each draw of the arithmetic jobs is right on fewer samples than the first."""
    without = sweep(tmp_path, near(repeats=0))
    assert not any(r.repetitions for r in without.values())
    assert [r.number for r in without.values() if r.front == "probable"] == [8]
    one = sweep(tmp_path, near(repeats=1))
    assert one[8].metrics.accuracy == without[8].metrics.accuracy > NEAR["accuracy"]["min"]
    assert one[8].metrics.accuracy_mean < NEAR["accuracy"]["min"]
    assert one[8].front is None
    two = sweep(tmp_path, near(repeats=2))
    assert two[8].repetitions == one[8].repetitions
    assert {n: (r.repetitions, r.front) for n, r in two.items()} == {
        n: (r.repetitions, r.front) for n, r in whole[1].items()
    }
    before = calls(tmp_path)
    assert max(before.values()) == 1
    assert sweep(tmp_path, near(repeats=2)) == two
    assert calls(tmp_path) == before


def test_a_repetition_that_fails_is_kept_with_its_reason(tmp_path: Path) -> None:
    records = sweep(tmp_path, near(repeats=1), **{"build_0008-1": "NotFinite"})
    (found,) = records[8].repetitions
    assert (found.failure.kind, records[8].front) == ("NotFinite", "probable")
    assert records[8].metrics.accuracy_mean is None
    assert records[8].state == "complete"


DRIVER = """
import sys
from pathlib import Path
from test_repeats import near
from qsweep.study import run
for record in run(near(repeats=2), Path(sys.argv[1]), jobs="arithmetic_jobs", preload=("numpy",)):
    print(record.number, flush=True)
"""


@pytest.mark.parametrize("moment", ["build", "measure"])
def test_a_driver_that_is_killed_in_a_repetition_loses_nothing_and_repeats_nothing(
    tmp_path: Path, moment: str, whole: tuple[Path, dict[int, Record]]
) -> None:
    told(tmp_path, **{f"{moment}_0008-1": "held"})
    driver = start(tmp_path, DRIVER)
    folder = tmp_path / "sweeps/small/repeats/0008-1"
    until(lambda: folder.exists() and (holder(folder) or ("", ""))[1] == moment)
    driver.kill()
    driver.wait()
    told(tmp_path)
    assert not SweepFolder(tmp_path, "small").records()[8].repetitions
    after = sweep(tmp_path, near(repeats=2))
    assert set(calls(tmp_path).values()) == {1}
    assert {n: content(r) for n, r in after.items()} == {n: content(r) for n, r in whole[1].items()}


def content(record: Record) -> Record:
    """All of a record but its times."""
    return record.model_copy(update={"seconds": {}})


def test_a_disk_that_lost_the_repetitions_leaves_their_figures(
    tmp_path: Path, whole: tuple[Path, dict[int, Record]]
) -> None:
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "sweeps/small/repeats")
    after = sweep(tmp_path, near(repeats=2))
    assert {n: r.metrics for n, r in after.items()} == {n: r.metrics for n, r in whole[1].items()}
