from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Generator
from contextlib import redirect_stdout
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from arithmetic_jobs import build
from pydantic import ValidationError
from small_sweep import REAL, calls, small_spec, start, states, sweep, told, until

from qsweep import alone
from qsweep.cli.run import Watch
from qsweep.domains import Choice, Range
from qsweep.errors import DataError, DiskFull, SpecError, SweepError, TaskChanged, TaskFailure, TrialFailure
from qsweep.records import Record
from qsweep.spec import TrialConfig
from qsweep.study import SweepFolder, baselines, plan, run
from qsweep.study.search import encode, suggested, violations
from qsweep.study.specs import differences

BASELINES = 3


def numbers_of(root: Path) -> list[tuple[int, bool]]:
    """Of each record in the order it came: its number, and whether the front was known by then."""
    records = run(small_spec(), root, jobs="arithmetic_jobs", preload=("numpy",))
    return [(record.number, record.front is not None) for record in records]


def test_every_record_comes_once_and_members_of_the_front_once_more(tmp_path: Path) -> None:
    came = numbers_of(tmp_path)
    assert [number for number, front in came if not front] == [*range(BASELINES + 6), 0]  # fp32, now tested, too
    assert came[-1][1]
    assert len({number for number, front in came if front}) == sum(front for _, front in came)


def test_the_record_of_a_trial_has_the_bits_of_every_layer(tmp_path: Path) -> None:
    found = sweep(tmp_path, small_spec())
    trials = [record for record in found.values() if record.kind == "trial"]
    assert sorted({record.layer_bits["head.weight"] for record in trials}) == [2, 4, 6]
    assert {record.layer_bits["stem.weight"] for record in trials} == {8}


def test_a_finished_sweep_runs_nothing_again_and_gives_the_same_records(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    before = calls(tmp_path)
    assert [number for number, _ in numbers_of(tmp_path)] == list(range(BASELINES + 6))
    assert calls(tmp_path) == before
    assert {record.number: record for record in SweepFolder(tmp_path, "small").records()} == first


def test_all_are_compared_to_fp32_which_comes_first(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(run={"workers": 3}))
    assert records[0].name == "fp32"
    assert [records[i].kind for i in range(BASELINES + 1)] == ["baseline"] * BASELINES + ["trial"]
    fp32 = str(tmp_path / "sweeps/small/trials/0000")
    for number in records:
        job = json.loads((tmp_path / f"sweeps/small/trials/{number:04d}/job.json").read_text())
        assert job["baseline"] == (fp32 if number else None)
    drops = [record.metrics.accuracy_drop_pp for record in records.values()]
    assert drops[0] == 0
    assert max(drops[BASELINES:]) == pytest.approx(24.3)


def test_what_is_built_beside_the_reference_is_measured_after_it(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(run={"workers": 2}), measure_0000="after 0001")
    ended = records[0].seconds["ended"]
    assert (tmp_path / "sweeps" / "small" / "trials" / "0001" / "build.json").stat().st_mtime < ended
    assert all(record.seconds["began"] > ended for record in records.values() if record.number)


def test_those_that_run_side_by_side_have_places_of_their_own(tmp_path: Path) -> None:
    sweep(tmp_path, small_spec(run={"workers": 3}), build="tick")
    built = {}
    for folder in (tmp_path / "sweeps/small/trials").iterdir():
        ticks = [float(tick) for tick in (folder / "ticks.txt").read_text().split()]
        place = json.loads((folder / "build.json").read_text())["place"]
        built[folder.name] = (place, ticks[0], ticks[-1])
    together = [(a[0], b[0]) for a, b in combinations(built.values(), 2) if a[1] < b[2] and b[1] < a[2]]
    assert together
    assert all(one != other for one, other in together)
    assert {place for place, *_ in built.values()} == {0, 1, 2}


def test_the_points_of_a_small_space_are_all_run_in_their_order(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec())
    points = [records[number].config["compress"]["quantize"] for number in range(BASELINES, BASELINES + 6)]
    assert [(p["weight_bits"], p["activation_scheme"]) for p in points] == [
        (bits, scheme) for bits in (2, 4, 6) for scheme in ("symmetric", "asymmetric")
    ]
    assert {record.state for record in records.values()} == {"complete"}


def test_a_config_is_evaluated_once_and_its_equals_are_told_the_same(tmp_path: Path) -> None:
    few = {"method": "ptq", "weight_bits": 8, "calibration_samples": {"range": [510, 515]}}  # 512 is a baseline
    records = sweep(tmp_path, small_spec(few, search={"trials": 5, "sampler": "random"}))
    assert max(calls(tmp_path).values()) == 1
    copies = [record for record in records.values() if record.duplicate_of is not None]
    assert any(record.duplicate_of == 2 for record in copies)
    for copy in copies:
        original = records[copy.duplicate_of]
        assert (copy.uid, copy.folder, copy.metrics.accuracy) == (
            original.uid, original.folder, original.metrics.accuracy,
        )  # fmt: skip
    evaluated = [r for r in records.values() if r.kind == "trial" and r.duplicate_of is None]
    assert len(evaluated) == 5
    assert states(tmp_path) == {"COMPLETE": 5 + len(copies)}


def test_an_artifact_is_measured_once_whatever_configs_have_it(tmp_path: Path) -> None:
    content = small_spec(target={"engine": "onnxruntime", "batch_size": {"choice": [1, 2]}}, search={"trials": 12})
    same = {f"build_{number:04d}": "files a" for number in (4, 6, 7, 12)}
    told(tmp_path, measure_0004="nan")  # of a trial that fails nothing is taken over
    records = sweep(tmp_path, content, **same, build_0008="files b")
    assert {n: r.duplicate_of for n, r in records.items() if r.duplicate_of is not None} == {12: 6}, records
    first, copy = records[6], records[12]
    assert records[7].config["target"] != first.config["target"]
    assert copy.config != first.config
    assert (copy.metrics, copy.evaluated, copy.folder) == (first.metrics, True, "trials/0012")
    assert calls(tmp_path)["build 0012"] == 1
    assert calls(tmp_path)["measure 0012"] == 0
    before = calls(tmp_path)
    assert sweep(tmp_path, content) == records
    assert calls(tmp_path) == before
    assert states(tmp_path) == {"COMPLETE": 12}


def test_what_the_engine_refuses_is_not_run_and_told_as_infeasible(tmp_path: Path) -> None:
    quantize = {"choice": [{"method": "cast"}, {"method": "ptq", "weight_bits": 4}]}
    records = sweep(tmp_path, small_spec(quantize, search={"trials": 2}))
    refused = records[BASELINES]
    assert (refused.state, refused.failure.kind) == ("refused", "Refused")
    assert "bf16" in refused.failure.message
    assert not calls(tmp_path)[f"build {BASELINES:04d}"]
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/sweeps/small/optuna.db")
    trial = study.trials[0]
    assert trial.state.name == "COMPLETE"
    assert trial.constraints["ok"] > 0
    assert trial.values == [0.95, 4000.0, 10.0]


TWO_ENGINES = {"target": {"engine": {"choice": ["onnxruntime", "executorch"]}}, "search": {"trials": 12}}


def test_an_engine_that_refuses_the_model_itself_is_given_no_trial(tmp_path: Path) -> None:
    spec = small_spec(**TWO_ENGINES)
    records = sweep(tmp_path, spec, build_0003="Refused", build_0004="Refused")
    assert [(r.name, r.state) for r in records.values() if r.kind == "baseline" and r.engine == "executorch"] == [
        ("fp32", "failed"),
        ("ptq-w8s-a8a", "failed"),
    ]
    trials = [record for record in records.values() if record.kind == "trial"]
    assert Counter((r.engine, r.state) for r in trials) == {
        ("onnxruntime", "complete"): 6,
        ("executorch", "refused"): 6,
    }
    assert {r.failure.message for r in trials if r.failure} == {"`executorch` has refused the model itself: as told"}
    assert states(tmp_path) == {"COMPLETE": 12}
    assert sweep(tmp_path, spec) == records


def test_an_engine_that_takes_some_baseline_is_given_trials(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(**TWO_ENGINES), build_0003="Refused")
    assert [r.state for r in records.values() if r.kind == "trial"] == ["complete"] * 12


@pytest.mark.parametrize("kind", ["NotFinite", "ExportFailure"])
def test_a_config_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path: Path, kind: str) -> None:
    records = sweep(tmp_path, small_spec(constraints={"accuracy": {"min": 0.5}}), build_0004=kind)
    assert (records[4].state, records[4].failure.kind, records[4].attempts) == ("failed", kind, 1)
    assert [record.state for record in records.values()].count("complete") == BASELINES + 5
    assert states(tmp_path) == {"COMPLETE": 6}


def test_a_metric_that_is_not_a_number_is_a_failure(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(), measure_0004="nan")
    assert (records[4].state, records[4].failure.kind) == ("failed", "NotFinite")
    assert "`accuracy`" in records[4].failure.message


def test_an_objective_that_was_not_measured_is_a_failure(tmp_path: Path) -> None:
    spec = small_spec(objectives=["accuracy", "macs"])
    with pytest.raises(TrialFailure, match=r"fp32 baseline.*`macs` is an objective"):
        sweep(tmp_path, spec)


def test_a_worker_that_dies_is_tried_again_under_the_same_number(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(), build_0003="die once", build_0004="memory once", build_0005="die")
    assert [(records[i].state, records[i].attempts) for i in (3, 4, 5)] == [
        ("complete", 2), ("complete", 2), ("failed", 2),
    ]  # fmt: skip
    assert records[5].failure.kind == "Crashed"
    assert "killed by SIGKILL" in records[5].failure.message
    assert [calls(tmp_path)[f"build {i:04d}"] for i in range(3, 7)] == [2, 2, 2, 1]


def test_a_trial_past_its_limit_is_killed(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec(run={"trial_timeout": 4}, search={"trials": 6}), build_0004="hang")
    assert (records[4].state, records[4].failure.kind) == ("failed", "TimedOut")
    assert records[5].state == "complete"


def check_alone(records: Collection[Record], folder: Path, within: float = 0.2) -> None:
    """No two were measured at once, and none was built meanwhile, from `within` seconds on."""
    spans = sorted((record.seconds["began"], record.seconds["ended"]) for record in records)
    for (_, ended), (began, _) in pairwise(spans):
        assert ended <= began
    ticks = [float(t) for path in folder.rglob("trials/*/ticks.txt") for t in path.read_text().split()]
    assert len(ticks) == 50 * len(records)
    assert not [tick for tick in ticks for began, ended in spans if began + within < tick < ended]


def test_nothing_else_of_the_sweep_runs_while_one_is_measured(tmp_path: Path) -> None:
    spec = small_spec(run={"workers": 3}, search={"trials": 2})
    check_alone(sweep(tmp_path, spec, build="tick", measure="slow").values(), tmp_path)


def test_nothing_of_another_sweep_runs_while_one_is_measured(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "other")]
    for root in roots:
        root.mkdir()
        told(root, build="tick", measure_0000="slow", measure_0004="slow")
    drivers = [start(root) for root in roots]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    check_alone([record for root in roots for record in SweepFolder(root, "small").records()], tmp_path, 0.4)


def test_a_sweep_says_that_it_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = SweepFolder(tmp_path / "one", "small"), SweepFolder(tmp_path / "other", "small")
    for folder in (one, other):
        folder.root.mkdir()
        told(folder.root, measure_0000="held")
    driver = start(one.root)
    until(lambda: "process" in (alone.elsewhere() or ""))
    assert one.waits() is None
    assert re.fullmatch(rf"`{one.path.resolve()}/trials/0000` \(process \d+\)", other.waits() or "")
    monkeypatch.setattr("qsweep.cli.run.WAIT_SECONDS", 0.02)
    log, said = io.StringIO(), f"paused while {other.waits()} measures on this machine\n"

    def records() -> Generator[Record, None, bool]:
        until(lambda: said in log.getvalue())
        time.sleep(0.2)
        yield from ()
        return True

    with redirect_stdout(log):
        assert Watch(small_spec(), other, tmp_path / "spec.yaml").follow(records())
    assert log.getvalue() == said
    told(one.root)
    assert driver.wait(timeout=60) == 0
    assert other.waits() is None


def test_another_spec_under_the_same_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    sweep(tmp_path, small_spec(search={"trials": 1}))
    with pytest.raises(
        SweepError, match=r"another spec: `measure.latency_pairs` was 50 and is 7; `search.seed` was 0 and"
    ):
        sweep(tmp_path, small_spec(search={"trials": 1, "seed": 3}, measure={"latency_pairs": 7}))


def test_what_differs_in_a_list_is_told_by_its_place() -> None:
    old, new = ({"objectives": ["accuracy", name]} for name in ("latency_ms", "size_bytes"))
    assert list(differences(old, new)) == [("objectives.1", "latency_ms", "size_bytes")]


def test_fields_that_a_later_version_adds_do_not_make_it_another_spec(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    path = tmp_path / "sweeps" / "small" / "spec.json"
    content = json.loads(path.read_text())
    del content["spec"]["objectives"], content["spec"]["measure"]["parity_top1"]
    path.write_text(json.dumps(content))
    assert sweep(tmp_path, small_spec()) == first


def test_more_trials_and_workers_may_be_given_to_a_sweep_that_goes_on(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(REAL, search={"trials": 1}))
    spec = small_spec(REAL, search={"trials": 3, "timeout": "1h"}, run={"workers": 2}, track={"experiment": "x"})
    second = sweep(tmp_path, spec)
    assert len(second) == len(first) + 2
    assert max(calls(tmp_path).values()) == 1
    assert SweepFolder(tmp_path, "small").spec() == spec
    threads = {json.loads(path.read_text())["threads"] for path in tmp_path.glob("sweeps/small/trials/*/job.json")}
    assert threads == {SweepFolder(tmp_path, "small").threads()}  # a training gives the same bits


def test_a_wider_space_runs_what_is_new_in_it(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    quantize = {
        "method": "ptq",
        "weight_bits": {"choice": [2, 3, 4, 6]},
        "activation_scheme": {"choice": ["symmetric", "asymmetric"]},
    }
    wider = small_spec(quantize, search={"trials": 8})
    second = sweep(tmp_path, wider)
    assert {number: second[number].uid for number in first} == {number: record.uid for number, record in first.items()}
    new = [second[number] for number in second.keys() - first.keys()]
    assert sorted(record.config["compress"]["quantize"]["weight_bits"] for record in new) == [3, 3]
    assert max(calls(tmp_path).values()) == 1
    assert states(tmp_path) == {"COMPLETE": 8}
    assert SweepFolder(tmp_path, "small").spec() == wider


def test_a_sampler_knows_what_was_found_in_the_space_before(tmp_path: Path) -> None:
    import optuna

    first = sweep(tmp_path, small_spec(REAL, search={"trials": 3}))
    wider = REAL | {"weight_bits": {"choice": [4, 6]}, "calibration_samples": {"range": [1, 200000]}}
    second = sweep(tmp_path, small_spec(wider, search={"trials": 5, "sampler": "nsga2"}))
    assert {number: second[number].uid for number in first} == {number: record.uid for number, record in first.items()}
    assert len([r for r in second.values() if r.kind == "trial" and r.duplicate_of is None]) == 5
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/sweeps/small/optuna.db")
    for trial in study.trials[:3]:
        record = second[trial.number + BASELINES]
        quantize = record.config["compress"]["quantize"]
        assert trial.params == {
            f"compress.quantize.{name}": quantize[name] for name in ("weight_bits", "calibration_samples")
        }
        assert trial.values == [getattr(record.metrics, name) for name in small_spec().objectives]


def test_a_sweep_of_an_earlier_version_of_the_code_is_not_run_again(tmp_path: Path) -> None:
    sweep(tmp_path, small_spec())
    for path in tmp_path.glob("sweeps/small/trials/*/record.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"uid": "0" * 63 + path.parent.name[-1]}))
    again = sweep(tmp_path, small_spec())
    assert len(again) == BASELINES + 6
    assert max(calls(tmp_path).values()) == 1


def test_what_is_not_in_the_space_any_more_stays_on_record(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    narrower = {"method": "ptq", "weight_bits": {"choice": [4, 8]}, "activation_scheme": "symmetric"}
    second = sweep(tmp_path, small_spec(narrower, search={"trials": 2}))  # of what is in the space
    assert {number: second[number].uid for number in first} == {number: record.uid for number, record in first.items()}
    (new,) = [record for number, record in second.items() if number not in first and record.duplicate_of is None]
    assert new.config["compress"]["quantize"]["weight_bits"] == 8
    assert states(tmp_path) == {"COMPLETE": 2, "FAIL": 5}


BOTH = {"choice": [{"engine": "onnxruntime"}, {"engine": "reference"}]}


def test_another_engine_may_be_added_when_one_has_run(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    second = sweep(tmp_path, small_spec(target=BOTH, search={"trials": 12}))
    assert {number: second[number].config for number in first} == {n: record.config for n, record in first.items()}
    new = [second[number] for number in sorted(second.keys() - first.keys()) if second[number].duplicate_of is None]
    told = [(record.kind, record.engine) for record in new]
    assert told == [("baseline", "float"), ("baseline", "reference"), *[("trial", "reference")] * 6]
    assert max(calls(tmp_path).values()) == 1
    baseline = {json.loads(path.read_text())["baseline"] for path in tmp_path.glob("sweeps/small/trials/*/job.json")}
    assert baseline == {None, str(SweepFolder(tmp_path, "small").trial(0))}
    assert sweep(tmp_path, small_spec(target=BOTH, search={"trials": 12})) == second


def test_another_engine_in_place_of_the_one_before_is_held_against_the_same_baseline(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    target = {"engine": "reference", "batch_size": 8}
    second = sweep(tmp_path, small_spec(target=target))
    assert {number: second[number].config for number in first} == {n: record.config for n, record in first.items()}
    new = [second[number] for number in second.keys() - first.keys() if second[number].duplicate_of is None]
    assert {record.config["target"]["batch_size"] for record in new} == {8}
    assert Counter(record.kind for record in new) == {"baseline": 3, "trial": 6}


def test_a_sweep_that_was_killed_at_its_baselines_forgets_those_of_another_target(tmp_path: Path) -> None:
    told(tmp_path, measure_0001="held")
    driver = start(tmp_path)
    folder = SweepFolder(tmp_path, "small")
    until(lambda: [record.number for record in folder.records()] == [0])
    os.kill(driver.pid, signal.SIGINT)  # in order: what it runs is killed
    driver.wait(timeout=60)
    second = sweep(tmp_path, small_spec(target={"engine": "reference"}))
    assert [(record.name, record.engine) for record in second.values() if record.kind == "baseline"] == [
        ("fp32", "onnxruntime"),
        ("bf16", "float"),
        ("fp32", "float"),
        ("ptq-w8s-a8a", "reference"),
    ]
    assert sorted(second) == list(range(4 + 6))


def test_bounds_and_objectives_may_change_when_a_sweep_has_run(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(search={"trials": 4, "sampler": "random"}))
    spec = small_spec(
        objectives=["accuracy", "size_bytes"],
        constraints={"size_bytes": {"max": 1e9}},
        search={"trials": 6, "sampler": "random"},
    )
    second = sweep(tmp_path, spec)
    assert {n: second[n].metrics.accuracy for n in first} == {n: record.metrics.accuracy for n, record in first.items()}
    assert len([r for r in second.values() if r.kind == "trial" and r.duplicate_of is None]) == 6
    assert max(calls(tmp_path).values()) == 1
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/sweeps/small/optuna.db")
    assert {len(trial.values) for trial in study.trials} == {2}
    assert all("size_bytes.max" in trial.constraints for trial in study.trials)


def test_a_baseline_of_ones_own_may_be_added_though_a_trial_was_it(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    trial = next(record for record in first.values() if record.kind == "trial")
    second = sweep(tmp_path, small_spec(baselines=[trial.config]))
    (added,) = [second[number] for number in second.keys() - first.keys()]
    assert (added.kind, added.duplicate_of) == ("baseline", trial.number)
    assert max(calls(tmp_path).values()) == 1


def test_baselines_of_an_earlier_version_are_known(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(search={"trials": 2}))
    path = tmp_path / "sweeps" / "small" / "spec.json"
    content = json.loads(path.read_text())
    content["baselines"] = list(content["baselines"].values())
    path.write_text(json.dumps(content))
    second = sweep(tmp_path, small_spec(search={"trials": 3}))
    assert sorted(second.keys() - first.keys()) == [BASELINES + 2]


def test_model_or_data_that_changed_since_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"one")
    task = {
        "method": "image_classification",
        "model": {"arch": "digits_cnn", "checkpoint": "weights.safetensors"},
        "data": {"method": "digits"},
    }
    spec = small_spec(task=task, search={"trials": 1})
    sweep(tmp_path, spec)
    weights.write_bytes(b"other")
    with pytest.raises(SweepError, match="`task` must be those the sweep began with"):
        sweep(tmp_path, spec)
    weights.unlink()
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        sweep(tmp_path, spec)


@pytest.mark.parametrize("trained", [True, False], ids=["the model's", "those of a teacher"])
def test_weights_of_the_users_code_that_changed_since_are_refused_whatever_file_they_are_in(
    trained: bool, tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text("")
    task: dict[str, Any] = {"method": "python", "file": "task.py:Task", "trained": trained}
    whose = {} if trained else {"teacher": "own"}
    sweep(tmp_path, small_spec(task=task, search={"trials": 1}), weights="one", **whose)
    more = small_spec(task=task, search={"trials": 2})
    assert len(sweep(tmp_path, more, weights="one", **whose)) == 5
    for _ in range(2):
        with pytest.raises(SweepError, match="the weights have changed since"):
            sweep(tmp_path, more, weights="other", **whose)
    assert len(sweep(tmp_path, more, weights="one", **whose)) == 5


def test_samples_that_changed_since_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("")
    task: dict[str, Any] = {"method": "python", "file": "task.py:Task", "trained": True}
    first, more = (small_spec(task=task, search={"trials": trials}) for trials in (1, 2))
    sweep(tmp_path, first, weights="one", samples="5")
    for _ in range(2):
        with pytest.raises(SweepError, match="model and data of `task` must be those the sweep began with"):
            sweep(tmp_path, more, weights="one", samples="6")
    assert len(sweep(tmp_path, more, weights="one", samples="5.0000001")) == 5


def test_what_is_unfinished_of_other_weights_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("")
    task: dict[str, Any] = {"method": "python", "file": "task.py:Task", "trained": True}
    spec = small_spec(task=task, search={"trials": 1})
    with pytest.raises(TrialFailure, match="fp32 baseline, to which all is compared, failed"):
        sweep(tmp_path, spec, weights="one", measure_0000="nan")
    built = tmp_path / "sweeps/small/trials/0000/build.json"  # as a driver that was killed leaves it
    built.write_text(json.dumps({"metrics": {"size_bytes": 1.0}, "seconds": {}}))
    assert sweep(tmp_path, spec, weights="other")[0].metrics.size_bytes == 4000.0


def test_a_folder_of_sweeps_may_be_a_link_and_its_root_is_beside_the_link(tmp_path: Path) -> None:
    root, disk = tmp_path / "project", tmp_path / "disk"
    (disk / "small").mkdir(parents=True)
    root.mkdir()
    (root / "sweeps").symlink_to(disk)
    for named in (root / "sweeps" / "small", root / "sweeps" / "other" / ".." / "small"):
        assert SweepFolder.at(named).root == root
    (tmp_path / "plain" / "sweeps" / "small").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "plain" / "sweeps" / "small")
    assert SweepFolder.at(tmp_path / "short").path == tmp_path / "plain" / "sweeps" / "small"


def test_a_sweep_has_one_driver(tmp_path: Path) -> None:
    with SweepFolder(tmp_path, "small").lock(), pytest.raises(SweepError, match=f"process {os.getpid()} drives it"):
        sweep(tmp_path, small_spec())


def test_the_same_seed_asks_for_the_same_configs(tmp_path: Path) -> None:
    spec = small_spec(REAL, search={"trials": 12, "seed": 7})
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        runs.append([record.uid for record in sweep(tmp_path / name, spec).values()])
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == BASELINES + 12


@pytest.mark.parametrize("sampler", ["nsga2", "gp", "random"])
def test_every_sampler_searches(tmp_path: Path, sampler: str) -> None:
    assert len(sweep(tmp_path, small_spec(REAL, search={"trials": 2, "sampler": sampler}))) == BASELINES + 2


class Stubborn(optuna.samplers.RandomSampler):
    """Proposes the same point again and again."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, distribution: Any) -> Any:
        return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low


@pytest.mark.parametrize("samples", [{"choice": [8, 16, 32]}, {"range": [1, 100000]}])
def test_a_sampler_that_repeats_itself_spends_its_budget_on_other_points(
    tmp_path: Path, samples: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsweep.study.search.sampler", lambda spec, told: Stubborn())
    bits = {"choice": [2, 4, 6]}
    quantize = {"method": "ptq", "weight_bits": bits, "calibration_samples": samples}
    found = sweep(tmp_path, small_spec(quantize, search={"trials": 8, "repeats": 0}))
    assert sum(r.kind == "trial" and r.duplicate_of is None for r in found.values()) == 8


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "random"])
def test_a_sweep_with_the_highest_seed_goes_on(tmp_path: Path, sampler: str) -> None:
    for trials in (2, 3):
        search = {"sampler": sampler, "trials": trials, "seed": 2**32 - 1}
        found = sweep(tmp_path, small_spec(quantize=REAL, search=search))
        assert sum(record.kind == "trial" for record in found.values()) == trials


def test_an_interrupted_sweep_ends_in_order_and_goes_on_where_it_was(tmp_path: Path) -> None:
    records = run(small_spec(), tmp_path, jobs="arithmetic_jobs", preload=("numpy",))
    before = signal.getsignal(signal.SIGINT)
    for record in records:
        if record.number == 4:
            told(tmp_path, build="hang")
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    assert not SweepFolder(tmp_path, "small").live()
    assert len(SweepFolder(tmp_path, "small").records()) < BASELINES + 6
    assert len(sweep(tmp_path, small_spec())) == BASELINES + 6
    assert states(tmp_path) == {"COMPLETE": 6}


def test_a_full_disk_stops_the_driver_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps/small/trials/0004"
    folder.mkdir(parents=True)
    (folder / "record.json.tmp").symlink_to("/dev/full")  # the driver's write there meets a real ENOSPC
    with pytest.raises(DiskFull, match="make room and run the same command again"):
        sweep(tmp_path, small_spec())
    (folder / "record.json.tmp").unlink()
    assert len(SweepFolder(tmp_path, "small").records()) == 4
    records = sweep(tmp_path, small_spec())
    assert len(records) == BASELINES + 6
    assert calls(tmp_path)["build 0004"] == 1
    assert states(tmp_path) == {"COMPLETE": 6}


@pytest.mark.parametrize(
    ("kind", "advice"),
    [(DiskFull, "Make room and run the same command again"), (TaskChanged, "Put them back and run the same command")],
)
def test_what_is_no_configs_fault_stops_the_sweep_and_is_not_held_against_it(
    kind: type[TrialFailure], advice: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=rf"as told\. {advice}"):
        sweep(tmp_path, small_spec(), build_0004=kind.__name__)
    assert sweep(tmp_path, small_spec())[4].state == "complete"


def test_a_full_disk_that_an_earlier_run_met_is_not_met_again(tmp_path: Path) -> None:
    with pytest.raises(DiskFull):
        sweep(tmp_path, small_spec(), build_0004="DiskFull")
    result = {"failure": {"kind": "DiskFull", "message": "of a worker that was not the first to tell"}}
    (tmp_path / "sweeps/small/trials/0004/build.json").write_text(json.dumps(result))
    assert sweep(tmp_path, small_spec())[4].state == "complete"


def test_a_task_that_cannot_be_prepared_is_an_error_until_it_is_mended(tmp_path: Path) -> None:
    with pytest.raises(TaskFailure, match="the task raised"):
        sweep(tmp_path, small_spec(), prepare="fail")
    assert len(sweep(tmp_path, small_spec(search={"trials": 1}))) == BASELINES + 1


def test_an_fp32_baseline_that_fails_is_an_error_until_it_is_mended(tmp_path: Path) -> None:
    with pytest.raises(TrialFailure, match="fp32 baseline, to which all is compared, failed: the worker"):
        sweep(tmp_path, small_spec(), build_0000="die")
    assert sweep(tmp_path, small_spec(), build_0000="die once")[0].attempts == 2


def test_points_that_are_written_in_short_are_known_again(tmp_path: Path) -> None:
    short = REAL | {"rounding": {"choice": ["nearest", "gptq", {"method": "adaround", "iterations": 100}]}}
    spec = small_spec(short, search={"trials": 3, "sampler": "random"})
    first = sweep(tmp_path, spec)
    assert sweep(tmp_path, spec).keys() == first.keys()
    for path in tmp_path.glob("sweeps/small/optuna.db*"):
        path.unlink()
    more = sweep(tmp_path, small_spec(short, search={"trials": 4, "sampler": "random"}))
    assert len([record for record in more.values() if record.duplicate_of is None]) == len(first) + 1
    assert max(calls(tmp_path).values()) == 1


def test_a_lost_database_costs_no_trial_and_no_number_is_given_twice(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(REAL, search={"trials": 2}))
    for path in tmp_path.glob("sweeps/small/optuna.db*"):
        path.unlink()
    second = sweep(tmp_path, small_spec(REAL, search={"trials": 3}))
    assert {number: second[number].uid for number in first} == {number: record.uid for number, record in first.items()}
    assert len([r for r in second.values() if r.kind == "trial" and r.duplicate_of is None]) == 3
    assert max(calls(tmp_path).values()) == 1


@pytest.mark.parametrize("content", ["", "[1]"])
@pytest.mark.parametrize("name", ["build", "measure", "test", "job"])
def test_a_result_that_a_power_cut_has_damaged_is_made_again(tmp_path: Path, name: str, content: str) -> None:
    first = sweep(tmp_path, small_spec())
    (tmp_path / "sweeps/small/trials/0000/record.json").unlink()
    for path in (f"trials/0000/{name}.json", "prepare/prepare.json"):
        (tmp_path / "sweeps/small" / path).write_text(content)
    again = sweep(tmp_path, small_spec())[0]
    assert (again.state, again.metrics, again.front) == ("complete", first[0].metrics, first[0].front)


def test_without_the_artifact_of_the_first_baseline_no_trial_fails_for_want_of_it(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(REAL, search={"trials": 1}))
    built = tmp_path / "sweeps/small/trials/0000/build.json"
    built.write_text(json.dumps(json.loads(built.read_text()) | {"files": {"weights.bin": "of an artifact"}}))
    more = small_spec(REAL, search={"trials": 2})
    with pytest.raises(SweepError, match=re.escape(f"remove `{built.parent}` to have it built again")):
        sweep(tmp_path, more)
    assert len(SweepFolder(tmp_path, "small").records()) == len(first)
    shutil.rmtree(built.parent)
    assert sum(record.state == "complete" for record in sweep(tmp_path, more).values()) == len(first) + 1


def test_scores_that_are_damaged_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec())
    (tmp_path / "sweeps/small/trials/0003/scores.npy").write_bytes(b"")
    assert sweep(tmp_path, small_spec()).keys() == first.keys()


def test_a_damaged_database_is_set_aside_and_costs_no_trial(tmp_path: Path) -> None:
    first = sweep(tmp_path, small_spec(REAL, search={"trials": 2}))
    (tmp_path / "sweeps/small/optuna.db").write_bytes(b"no database" * 1000)
    more = sweep(tmp_path, small_spec(REAL, search={"trials": 4}))
    assert [more[number].uid for number in first] == [record.uid for record in first.values()]
    assert sum(record.duplicate_of is None for record in more.values()) == len(first) + 2
    assert (tmp_path / "sweeps/small/damaged-optuna.db").read_bytes().startswith(b"no database")


def test_the_final_front_and_fp32_alone_are_scored_on_the_test_split(tmp_path: Path) -> None:
    records = sweep(tmp_path, small_spec())
    members = {number for number, record in records.items() if record.front}
    assert members - {0}
    assert {number for number, record in records.items() if record.metrics.accuracy_test is not None} == members | {0}
    assert sum(count for call, count in calls(tmp_path).items() if call.startswith("test")) == len(members | {0})


def test_neither_the_driver_nor_what_shows_its_records_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from small_sweep import *;"
        f"sweep(Path({str(tmp_path)!r}), small_spec(search={{'trials': 1}}));"
        "import qsweep.cli.run, qsweep.cli.results, qsweep.ship, qsweep.track; print('torch' in sys.modules)"
    )
    path = os.pathsep.join((str(Path(build.__code__.co_filename).parent), *sys.path))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.stdout.split() == [b"False"], done.stderr.decode()


def test_numbers_are_suggested_as_numbers() -> None:
    study = optuna.create_study()
    trial = study.ask({})
    uneven, mixed = Choice((8, 2, 16), (8, 2, 16)), Choice((None, 4), (None, 4))
    even, real = Choice((6, 4, 8), (6, 4, 8)), Range(0.1, 0.9, step=0.2)
    assert suggested(trial, "even", even) in (4, 6, 8)
    assert suggested(trial, "uneven", uneven) in (2, 8, 16)
    assert suggested(trial, "mixed", mixed) in (None, 4)
    assert 0.1 <= suggested(trial, "real", real) <= 0.9
    assert trial.distributions["even"] == optuna.distributions.IntDistribution(4, 8, step=2)
    assert trial.distributions["uneven"] == optuna.distributions.IntDistribution(0, 2)
    assert trial.distributions["mixed"] == optuna.distributions.CategoricalDistribution((None, 4))


@pytest.mark.parametrize("values", [(2, 4, 6), (8, 2, 16), ("a", None, 3), (0.5, 0.1), (True, False)])
def test_an_enqueued_value_is_the_one_suggested(values: tuple[object, ...]) -> None:
    domain = Choice(values, values)  # type: ignore[arg-type]
    study = optuna.create_study()
    for value in values:
        study.enqueue_trial({"x": encode(domain, value)})
        assert suggested(study.ask(), "x", domain) == value


def test_constraints_are_at_most_zero_exactly_where_they_are_kept() -> None:
    spec = small_spec(constraints={"accuracy": {"min": 0.9}, "latency_ms": {"min": 1, "max": 2}})
    metrics = spec_metrics(accuracy=0.8, latency_ms=2.0)
    assert violations(spec, metrics) == pytest.approx({"accuracy.min": 0.1, "latency_ms.max": 0, "latency_ms.min": -1})
    assert violations(spec, None) == {"accuracy.min": 1, "latency_ms.max": 1, "latency_ms.min": 1}


def spec_metrics(**values: float):  # type: ignore[no-untyped-def]
    from qsweep.records import Metrics

    return Metrics(**values)


def test_what_an_engine_refuses_as_a_baseline_runs_on_float() -> None:
    assert [(config.name, config.target.engine) for config in baselines(small_spec())] == [
        ("fp32", "onnxruntime"), ("bf16", "float"), ("ptq-w8s-a8a", "onnxruntime"),
    ]  # fmt: skip
    reference = baselines(small_spec(target={"engine": "reference"}))
    assert (reference[0].name, reference[0].target.engine) == ("fp32", "float")


def test_standard_baselines_may_be_left_out_but_for_the_model_as_it_is() -> None:
    assert [config.name for config in baselines(small_spec(standard_baselines=["int8"]))] == ["fp32", "ptq-w8s-a8a"]
    assert [config.name for config in baselines(small_spec(standard_baselines=[]))] == ["fp32"]
    with pytest.raises(ValidationError, match="standard_baselines"):
        small_spec(standard_baselines=["fp32"])


def test_configs_of_the_users_own_stand_beside_the_trials() -> None:
    eager = {"target": {"engine": "float", "compile": False}}
    assert baselines(small_spec(baselines=[eager, eager]))[3:] == [TrialConfig.model_validate(eager)]


def test_a_baseline_that_its_engine_refuses_is_refused_with_the_spec() -> None:
    integers = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "float"}}
    with pytest.raises(ValidationError, match="number 0 must be one that its engine takes"):
        small_spec(baselines=[integers])


def test_the_plan_counts_configs_shared_stages_and_refusals() -> None:
    compress = {
        "prune": {"choice": [None, {"method": "magnitude"}]},
        "quantize": {"choice": [{"method": "cast"}, {"method": "ptq", "weight_bits": {"choice": [4, 6]}}]},
    }
    told_plan = plan(small_spec(compress=compress))
    assert (told_plan.configs, told_plan.trials, told_plan.every_point) == (6, 4, True)
    assert [(s.stage, s.distinct, s.trials) for s in told_plan.shared] == [("prune", 1, 2), ("quantize", 4, 4)]
    assert [refusal.configs for refusal in told_plan.refused] == [2]


def test_the_plan_of_an_infinite_space_says_so() -> None:
    prune = {"method": "magnitude", "sparsity": {"range": [0.1, 0.9]}}
    spec = small_spec(compress={"prune": prune})
    assert (plan(spec).configs, plan(spec).every_point) == (None, False)
    with pytest.raises(SpecError, match=r"`search\.sampler`"):
        plan(small_spec(compress={"prune": prune}, search={"sampler": "grid"}))
