from __future__ import annotations

import itertools
import json
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from realistic import TARGET, drive, finished, record, records, spec, write
from small_sweep import small_spec

from qsweep.errors import SpecError, TrackError
from qsweep.records import Metrics
from qsweep.study import run as run_sweep
from qsweep.track import front, hypervolume, pareto_url, publish, report_url, tracking_uri, ui
from qsweep.track.flat import params
from qsweep.track.pareto import volume
from qsweep.track.publish import Publisher
from qsweep.track.view import DASHBOARDS, view_state

DEAD = "http://127.0.0.1:9"
METRIC_NAMES = {
    "accuracy", "accuracy_test", "accuracy_simulated", "accuracy_drop_pp", "size_bytes", "size_zstd_bytes",
    "size_theoretical_bytes", "latency_ms", "latency_p95_ms", "latency_ratio", "parity_top1", "parity_max_abs",
    "int8_mac_fraction", "macs", "params", "sparsity", "peak_memory_bytes",
}  # fmt: skip


def runs_of(root: Path, **track: Any) -> list[Any]:
    """Every run of the store, the parent first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(track.get("uri"), root))
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], max_results=1000)
    return sorted(found, key=lambda run: int(run.data.tags.get("qsweep.number", -1)))


def files_of(root: Path, run_id: str, path: str | None = None) -> set[str]:
    from mlflow import MlflowClient

    return {item.path for item in MlflowClient(tracking_uri(None, root)).list_artifacts(run_id, path)}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose sweep has been published to its end."""
    root = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert [r.number for r in publish(drive(root, records(), finished(records())), spec(), root)][:8] == [*range(8)]
    return root


def test_every_trial_has_a_finished_run_below_one_parent_and_a_copied_one_has_none(swept: Path) -> None:
    parent, *children = runs_of(swept)
    assert [run.info.run_name for run in children] == [r.name for r in records()[:7]]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 7 + ["FAILED"]


def test_bits_that_differ_by_layer_are_a_file_of_the_run(swept: Path) -> None:
    found = [files_of(swept, run.info.run_id) for run in runs_of(swept)[1:]]
    assert [place for place, files in enumerate(found) if "layer_bits.json" in files] == [3]


def test_a_repeated_trial_has_mean_and_spread_and_a_file_of_its_repetitions(swept: Path) -> None:
    run = runs_of(swept)[3]
    assert run.data.metrics["accuracy"] == 0.968
    assert run.data.metrics["accuracy_mean"] == pytest.approx(0.966)
    assert run.data.metrics["accuracy_spread"] == pytest.approx(0.004 / 2**0.5)
    assert run.data.tags["qsweep.repetitions"] == "2"
    found = [files_of(swept, run.info.run_id) for run in runs_of(swept)[1:]]
    assert [place for place, files in enumerate(found) if "repetitions.yaml" in files] == [2]


def test_params_are_flat_metrics_have_their_names_and_tags_say_what_a_run_is(swept: Path) -> None:
    run = runs_of(swept)[5]
    assert run.data.params["compress.quantize.method"] == "qat"
    assert run.data.params["compress.prune.sparsity"] == "0.5"
    assert run.data.params["target.batch_size"] == "4"
    assert run.data.metrics["latency_ms"] == 0.58
    assert run.data.metrics["seconds_quantize"] == 0.5
    assert run.data.metrics["accuracy_test"] == 0.96
    found = {name: run.data.tags[f"qsweep.{name}"] for name in ("uid", "state", "engine", "front", "machine")}
    known = {"state": "complete", "engine": "onnxruntime", "front": "certain", "machine": "m1"}
    assert found == known | {"uid": records()[4].uid}
    assert "qsweep.failure" not in run.data.tags


def test_a_failed_trial_says_why(swept: Path) -> None:
    assert runs_of(swept)[7].data.tags["qsweep.failure"].startswith("ParityFailure: top-1 agreement must be")


def test_an_update_draws_no_curve(swept: Path) -> None:
    from mlflow import MlflowClient

    run = runs_of(swept)[5]
    client = MlflowClient(tracking_uri(None, swept))
    assert {len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics} == {1}


def test_the_parent_holds_spec_environment_front_report_and_the_hypervolume_over_trials(swept: Path) -> None:
    from mlflow import MlflowClient

    client, parent = MlflowClient(tracking_uri(None, swept)), runs_of(swept)[0]
    assert files_of(swept, parent.info.run_id) >= {"spec.yaml", "environment.json", "front.csv", "pareto.html"}
    assert "| 4 | qat-w8s-a8a-prune50 | onnxruntime | certain |" in parent.data.tags["mlflow.note.content"]
    series = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert [point.step for point in series] == list(range(1, 8))
    assert [point.value for point in series] == sorted(point.value for point in series)
    assert series[-1].value > series[0].value


def test_what_is_or_was_on_the_front_has_its_bundle_and_others_have_not(swept: Path) -> None:
    having = [run for run in runs_of(swept)[1:] if "bundle" in files_of(swept, run.info.run_id)]
    final = {str(each.number) for each in front(finished(records()), spec())}
    assert final < {run.data.tags["qsweep.number"] for run in having} < {str(number) for number in range(8)}
    bundle = files_of(swept, runs_of(swept)[4].info.run_id, "bundle")
    assert bundle == {f"bundle/{name}" for name in ("artifact", "config.yaml", "manifest.json", "metrics.json")}


def test_a_second_sweep_run_finds_its_runs_again(swept: Path) -> None:
    before = runs_of(swept)
    more = record(8, "ptq-w5s-a8a", 0.96, 6_000.0, 0.5)
    list(publish(drive(swept, [*finished(records()), more]), spec(), swept))
    after = runs_of(swept)
    assert [run.info.run_id for run in after[:8]] == [run.info.run_id for run in before]
    assert [run.info.run_name for run in after[8:]] == ["ptq-w5s-a8a"]


def test_runs_of_several_engines_are_told_apart_by_their_names(tmp_path: Path) -> None:
    asked = small_spec(target={"engine": {"choice": ["onnxruntime", "executorch"]}})
    list(publish(drive(tmp_path, records()[:2]), asked, tmp_path))
    assert [run.info.run_name for run in runs_of(tmp_path)][1:] == [f"{r.name} on {r.engine}" for r in records()[:2]]


def test_what_is_to_be_known_beside_a_front_stands_on_both_pages(tmp_path: Path) -> None:
    place = tmp_path / "sweeps" / "small" / "prepare"
    place.mkdir(parents=True)
    (place / "prepare.json").write_text(json.dumps({"doubts": ["`validation` has <few> samples"]}))
    list(publish(drive(tmp_path, records()[:3], finished(records()[:3])), spec(), tmp_path))
    parent = runs_of(tmp_path)[0]
    assert "\n- `validation` has <few> samples" in parent.data.tags["mlflow.note.content"]
    report = next(tmp_path.glob(f"mlartifacts/**/{parent.info.run_id}/**/pareto.html"))
    assert "`validation` has &lt;few&gt; samples" in report.read_text(encoding="utf-8")


def test_runs_are_called_after_their_engine_once_the_sweep_has_another(tmp_path: Path) -> None:
    fp32, bf16 = records()[:2]
    for engines, names in (
        (["onnxruntime"], [fp32.name, bf16.name]),
        (["onnxruntime", "executorch"], [f"{fp32.name} on onnxruntime", f"{bf16.name} on float"]),
    ):
        target = {"engine": {"choice": engines}}
        list(publish(drive(tmp_path, [fp32, bf16]), small_spec(target=target), tmp_path))
        parent, *children = runs_of(tmp_path)
        assert [run.info.run_name for run in children] == names
        assert {name.split(".")[0] for name in parent.data.params} == {"measure", "search"}


def test_runs_of_several_batch_sizes_are_told_apart_by_their_names(tmp_path: Path) -> None:
    asked = small_spec(target={"engine": "onnxruntime", "batch_size": {"choice": [1, 4]}})
    list(publish(drive(tmp_path, records()[:2]), asked, tmp_path))
    assert [run.info.run_name for run in runs_of(tmp_path)][1:] == [f"{r.name}, batch 4" for r in records()[:2]]


def test_a_driver_killed_between_run_and_ledger_leaves_no_run_twice_and_none_running(tmp_path: Path) -> None:
    stream = publish(drive(tmp_path, records()), spec(), tmp_path)
    for _ in range(4):
        next(stream)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(None, tmp_path))
    ledger = tmp_path / "sweeps" / "small" / "published.json"
    content = json.loads(ledger.read_text())
    (published,) = content["stores"].values()
    lost = published["runs"].pop("3")
    client.update_run(lost["run_id"], status="RUNNING")
    stream.close()
    client.update_run(published["parent"], status="RUNNING")
    ledger.write_text(json.dumps(content))  # as kill -9 leaves things

    list(publish(drive(tmp_path, records()), spec(), tmp_path))
    assert len(runs_of(tmp_path)) == 8
    assert "RUNNING" not in {run.info.status for run in runs_of(tmp_path)}
    assert lost["run_id"] in {run.info.run_id for run in runs_of(tmp_path)}


def test_a_parent_that_was_deleted_in_mlflow_begins_anew(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    MlflowClient(tracking_uri(None, tmp_path)).delete_run(runs_of(tmp_path)[0].info.run_id)
    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    parents = [run for run in runs_of(tmp_path) if run.data.tags["qsweep.kind"] == "sweep"]
    assert [run.info.status for run in parents] == ["FINISHED"]


def test_trials_whose_parent_was_deleted_are_put_below_the_new_one(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    parent, *children = runs_of(tmp_path)
    MlflowClient(tracking_uri(None, tmp_path)).delete_run(parent.info.run_id)
    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    parent, *after = runs_of(tmp_path)
    assert [run.info.run_id for run in after] == [run.info.run_id for run in children]
    assert {run.data.tags["mlflow.parentRunId"] for run in after} == {parent.info.run_id}


def test_a_sweep_published_elsewhere_in_between_is_the_same_sweep_everywhere(tmp_path: Path) -> None:
    here: dict[str, str] = {}
    elsewhere = {"uri": f"sqlite:///{tmp_path}/elsewhere/mlflow.db"}
    for track in (here, elsewhere, here):
        list(publish(drive(tmp_path, records()[:2]), spec(**track), tmp_path))
    assert [len(runs_of(tmp_path, **track)) for track in (here, elsewhere)] == [3, 3]
    assert len({r.data.tags["qsweep.sweep_id"] for track in (here, elsewhere) for r in runs_of(tmp_path, **track)}) == 1


def test_a_project_whose_folder_was_moved_goes_on_where_it_is_now(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.tracking._tracking_service import utils

    old, new = tmp_path / "old", tmp_path / "new"
    list(publish(drive(old, records()[:3]), spec(), old))
    before = runs_of(old)
    old.rename(new)
    utils._artifact_repos_cache.clear()  # as in another process
    list(publish(drive(new, records()[:4]), spec(), new))
    after = runs_of(new)
    assert [run.info.run_id for run in after[:4]] == [run.info.run_id for run in before]
    assert [run.info.run_name for run in after[4:]] == ["ptq-w4s-a8a"]
    assert not old.exists()
    assert "bundle" in files_of(new, after[4].info.run_id)
    client = MlflowClient(tracking_uri(None, new))
    assert all(run.info.artifact_uri.startswith((new / "mlartifacts").as_uri()) for run in after)
    assert Path(client.download_artifacts(after[0].info.run_id, "spec.yaml", str(tmp_path))).is_file()


def test_what_an_earlier_version_has_published_is_found_again(tmp_path: Path) -> None:
    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    ledger, before = tmp_path / "sweeps" / "small" / "published.json", runs_of(tmp_path)
    content = json.loads(ledger.read_text())
    (published,) = content["stores"].values()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ledger.write_text(json.dumps(published | {"sweep_id": content["sweep_id"], "uri": uri}))
    list(publish(drive(tmp_path, records()[:3]), spec(), tmp_path))
    assert [run.info.run_id for run in runs_of(tmp_path)[:3]] == [run.info.run_id for run in before]
    assert len(runs_of(tmp_path)) == 4


def test_a_ledger_that_is_none_is_begun_anew(tmp_path: Path) -> None:
    ledger = write(tmp_path, records()[0]).path / "published.json"
    ledger.write_text("[1]")
    list(publish(drive(tmp_path, records()[:2]), spec(), tmp_path))
    assert len(runs_of(tmp_path)) == 3


def test_a_consumer_that_stops_leaves_nothing_running(tmp_path: Path) -> None:
    stream = publish(drive(tmp_path, records()), spec(), tmp_path)
    next(stream)
    stream.close()
    assert [run.info.status for run in runs_of(tmp_path)] == ["KILLED", "FINISHED"]


def test_an_error_of_the_driver_comes_through_and_fails_the_parent(tmp_path: Path) -> None:
    def driver() -> Any:
        yield from drive(tmp_path, records()[:1])
        raise MemoryError("of the driver")

    with pytest.raises(MemoryError, match="of the driver"):
        list(publish(driver(), spec(), tmp_path))
    assert [run.info.status for run in runs_of(tmp_path)] == ["FAILED", "FINISHED"]


def test_whether_the_sweep_has_finished_is_handed_on(tmp_path: Path) -> None:
    def stopped() -> Any:
        yield from drive(tmp_path, records()[:1])
        return False

    stream = publish(stopped(), spec(), tmp_path)
    next(stream)
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value is False
    assert runs_of(tmp_path)[0].info.status == "KILLED"


def test_a_dead_server_costs_one_warning_and_what_it_missed_is_published_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qsweep.track"):
        seen = list(publish(drive(tmp_path, records()), spec(uri=DEAD), tmp_path))
    assert [r.number for r in seen] == list(range(8))
    warned = [entry.getMessage() for entry in caplog.records if entry.name == "qsweep.track"]
    assert len(warned) == 1
    assert DEAD in warned[0]
    assert "the sweep goes on" in warned[0]

    list(publish(drive(tmp_path, []), spec(), tmp_path))  # nothing new; now there is a store that answers
    assert len(runs_of(tmp_path)) == 8


def test_a_server_that_never_answers_is_asked_again_after_twenty_times_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        publisher = Publisher(spec(uri=f"http://127.0.0.1:{server.getsockname()[1]}"), tmp_path)
        began = time.monotonic()
        publisher.take(records()[0])
        took = time.monotonic() - began
        assert took >= 1
        assert publisher.pause == pytest.approx(20 * took, rel=0.05)
        publisher.take(records()[1])
        assert time.monotonic() - began < 1.1 * took
    assert publisher.owed == {0, 1}


def test_a_database_whose_driver_is_not_installed_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qsweep.track"):
        seen = list(publish(drive(tmp_path, records()), spec(uri="postgresql://localhost:9/x"), tmp_path))
    assert len(seen) == 8
    assert ["psycopg" in entry.getMessage() for entry in caplog.records if entry.name == "qsweep.track"] == [True]


def test_a_database_that_was_not_made_to_its_end_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.unfinished").write_bytes(b"half")
    list(publish(drive(tmp_path, records()), spec(), tmp_path))
    assert len(runs_of(tmp_path)) == 8
    assert not list(tmp_path.glob("*.unfinished*"))


def test_the_environment_of_the_process_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    list(publish(drive(tmp_path, records()[:1]), spec(uri=DEAD), tmp_path))
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"


def test_a_record_that_mlflow_refuses_stops_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = record(0, "odd", 0.9, 1.0, 1.0, seconds={"bad[name]": 1.0})
    list(publish(drive(tmp_path, [odd, *records()[1:3]]), spec(), tmp_path))
    assert [run.info.run_name for run in runs_of(tmp_path)] == ["small", "odd", "bf16", "ptq-w8s-a8a"]
    assert "record 0 (`odd`) must fit MLflow" in caplog.text
    assert [run.info.status for run in runs_of(tmp_path)] == ["FINISHED", "FAILED", "FINISHED", "FINISHED"]


def test_a_sweep_of_the_real_driver_is_published(tmp_path: Path) -> None:
    asked = small_spec()
    numbers = {r.number for r in publish(run_sweep(asked, tmp_path, "arithmetic_jobs", ("numpy",)), asked, tmp_path)}
    assert len(runs_of(tmp_path)) == len(numbers) + 1
    assert {run.info.status for run in runs_of(tmp_path)} == {"FINISHED"}
    assert any(run.data.tags.get("qsweep.front") == "certain" for run in runs_of(tmp_path))


@pytest.mark.parametrize("name", ["what?x=1", "a%20b", "100% {x} #1"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    asked, root = small_spec(), tmp_path / name
    root.mkdir()
    list(publish(run_sweep(asked, root, "arithmetic_jobs", ("numpy",)), asked, root))
    assert {run.info.status for run in runs_of(root)} == {"FINISHED"}
    assert (root / "mlflow.db").is_file()
    assert (root / "sweeps" / "small" / "optuna.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert "uri" in json.loads((root / "sweeps" / "small" / "published.json").read_text())


def test_the_default_store_lies_beside_the_spec_and_relative_ones_start_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("sqlite:///deep/other.db", tmp_path) == f"sqlite:///{tmp_path}/deep/other.db"
    assert tracking_uri("sqlite:////abs.db", tmp_path) == "sqlite:////abs.db"
    assert (
        tracking_uri("sqlite:///deep%20er/x.db?timeout=9", tmp_path) == f"sqlite:///{tmp_path}/deep er/x.db?timeout=9"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(None, tmp_path) == "http://host:5000"
    assert tracking_uri("https://other", tmp_path) == "https://other"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "ftp://host", "sqlite:x.db"])
def test_a_uri_that_is_none_of_mlflow_is_refused_before_anything_runs(tmp_path: Path, uri: str) -> None:
    began: list[int] = []

    def driver() -> Any:
        began.append(1)
        yield records()[0]

    with pytest.raises(SpecError, match=r"`track.uri`: must start with one of"):
        next(publish(driver(), spec(uri=uri), tmp_path))
    assert not began


def test_metric_names_are_the_interface() -> None:
    assert set(Metrics.model_fields) >= METRIC_NAMES


def test_every_trial_has_the_axes_of_the_parallel_coordinates() -> None:
    definition = json.loads((DASHBOARDS / "pareto_view.json").read_text(encoding="utf-8"))
    axes = next(chart["params"] for chart in definition["charts"] if chart["type"] == "parallel")
    assert all(set(axes) <= params(r).keys() for r in records())
    assert [params(r)["weight_bits"] for r in records()[:4]] == ["32", "16", "8", "4"]


def test_the_preset_view_fits_the_tag_and_opens_by_url(swept: Path) -> None:
    from mlflow import MlflowClient

    url = pareto_url(swept / "sweeps" / "small", "http://127.0.0.1:5000")
    assert url is not None
    head, _, key = url.partition("&viewStateShareKey=")
    number = head.partition("/#/experiments/")[2].partition("/")[0]
    tags = MlflowClient(tracking_uri(None, swept)).get_experiment(number).tags
    state = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    assert [chart["type"] for chart in state["compareRunCharts"]] == ["SCATTER"] * 3 + ["PARALLEL"]
    assert state == view_state(json.loads((DASHBOARDS / "pareto_view.json").read_text(encoding="utf-8")), "small")


def test_the_report_is_an_artifact_of_the_parent_run_at_its_url(swept: Path) -> None:
    from mlflow import MlflowClient

    url = report_url(swept / "sweeps" / "small", "http://127.0.0.1:5000")
    assert url is not None
    found = re.fullmatch(r"http://127.0.0.1:5000/#/experiments/(\d+)/runs/(\w+)/artifacts/([\w.]+)\?\S+", url)
    assert found is not None
    client = MlflowClient(tracking_uri(None, swept))
    run = client.get_run(found[2])
    assert (run.info.experiment_id, run.data.tags["qsweep.kind"]) == (found[1], "sweep")
    assert found[3] in [artifact.path for artifact in client.list_artifacts(found[2])]


def test_there_is_no_page_of_a_sweep_that_was_never_published(tmp_path: Path) -> None:
    folder = write(tmp_path, records()[0]).path
    assert pareto_url(folder, "http://127.0.0.1:5000") is None
    assert report_url(folder, "http://127.0.0.1:5000") is None


def test_the_ui_serves_the_sweep_on_loopback_and_is_gone_afterwards(swept: Path) -> None:
    from urllib.request import urlopen

    with ui(tracking_uri(None, swept), port=0) as address:
        assert address.startswith("http://127.0.0.1:")
        with urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=small") as answer:
            assert json.load(answer)["experiment"]["name"] == "small"
        with (
            pytest.raises(TrackError, match=r"port \d+ must be free"),
            ui(tracking_uri(None, swept), int(address[17:])),
        ):
            pass
    with pytest.raises(OSError, match="refused"):
        urlopen(address)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with (
        pytest.raises(TrackError, match=r"must start \(it said: (.|\n)*not a database"),
        ui(f"sqlite:///{tmp_path}/mlflow.db", 0),
    ):
        pass


def test_a_server_is_its_own_ui() -> None:
    with ui("https://mlflow.example") as address:
        assert address == "https://mlflow.example"


def test_the_hypervolume_needs_a_baseline_and_counts_only_what_beats_it() -> None:
    assert hypervolume(records()[2:], spec()) is None
    worse = record(9, "worse", 0.99, 80_000.0, 2.0)
    assert hypervolume([records()[0], worse], spec()) == 0
    half = record(9, "half", 0.97, 20_000.0, 0.5)
    assert hypervolume([records()[0], half], spec()) == pytest.approx(0.25)


def test_the_hypervolume_of_another_metric_counts_from_a_tenth_below_the_baseline() -> None:
    metric = {"name": "negative RMSE", "unit": "m"}
    asked = small_spec(target=TARGET, task={"method": "python", "file": "a.py:B", "metric": metric})
    base = record(0, "fp32", -50.0, 2.0, 2.0, kind="baseline")
    alike, worse = record(9, "alike", -50.0, 1.0, 1.0), record(9, "worse", -52.5, 1.0, 1.0)
    assert hypervolume([base, alike], asked) == pytest.approx(0.25)
    assert hypervolume([base, worse], asked) == pytest.approx(0.125)


def corners(dimensions: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(1, 4)] * dimensions), min_size=1, max_size=6)


@given(st.one_of(corners(1), corners(2), corners(3), corners(5)))
def test_the_volume_is_the_number_of_unit_cubes_under_the_points(points: list[tuple[int, ...]]) -> None:
    cubes = {cube for point in points for cube in itertools.product(*map(range, point))}
    assert volume([tuple(map(float, point)) for point in points]) == len(cubes)


def test_the_front_leaves_out_copies_and_what_breaks_a_constraint() -> None:
    bound = small_spec(target=TARGET, constraints={"accuracy_drop_pp": {"max": 1.0}})
    assert [r.number for r in front(records(), spec())] == [2, 3, 4]
    assert [r.number for r in front(records(), bound)] == [2, 4]


def test_what_another_engine_shows_in_place_of_the_target_is_on_no_front() -> None:
    found = finished(records())
    better = Metrics(accuracy=1.0, accuracy_drop_pp=-3.0, size_bytes=1.0, latency_ms=0.1)
    beside = found[1].model_copy(
        update={"metrics": better, "config": found[1].config | {"target": {"engine": "float"}}}
    )
    assert [r.number for r in front([*found[:1], beside, *found[2:]], spec())] == [2, 3, 4]
    assert hypervolume([*found[:1], beside, *found[2:]], spec()) == hypervolume([found[0], *found[2:]], spec())
