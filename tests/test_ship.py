from __future__ import annotations

import json
import os
import time
import warnings
import zipfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from realistic import TARGET, asked, finished, record, records, spec, write
from small_sweep import small_spec
from toy_task import Toy
from typer.testing import CliRunner

from qsweep.cli.main import app
from qsweep.config import content_hash
from qsweep.errors import BundleError, DataError, Refused, SpecError, SweepError, TaskFailure, TrackError
from qsweep.machine import fingerprint
from qsweep.measure.files import digests
from qsweep.records import Metrics, Record
from qsweep.ship import LoadedModel, Selector, best, bundle, compress, export, load, promote, verify
from qsweep.ship.compress import asked_for
from qsweep.ship.registry import fetch
from qsweep.spec import TrialConfig
from qsweep.study import Places, SweepFolder
from qsweep.tasks import Training
from qsweep.track import publish, tracking_uri
from qsweep.track.bundle import pickles, recorded

if TYPE_CHECKING:
    from torch import Tensor, nn


def trained() -> nn.Module:
    import torch

    torch.manual_seed(0)
    return Toy().model().eval()


def inputs(count: int) -> Tensor:
    import torch

    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """A finished sweep whose trials 0 and 2 to 4 hold a real artifact of ONNX Runtime at batch size 4."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.hub.export import export as trace
    from qsweep.hub.norm import fold_batch_norm
    from qsweep.store import Store

    folder = SweepFolder(tmp_path_factory.mktemp("swept"), "small")
    folder.path.mkdir(parents=True)
    plain = json.loads(spec().model_dump_json())
    content = {"hash": content_hash(plain), "spec": plain, "fingerprint": "f", "baselines": []}
    (folder.path / "spec.json").write_text(json.dumps(content))
    (folder.path / "prepare").mkdir()
    about = spec().task.about(folder.root)
    (folder.path / "prepare" / "prepare.json").write_text(json.dumps({"about": about}))
    traced = trace(trained(), inputs(2))
    traced = type(traced)(fold_batch_norm(traced.graph), traced.example)
    for one in finished(records()):
        folder.write(one)
        if one.number in (0, 2, 3, 4):
            artifact = folder.trial(one.number) / "artifact"
            artifact.mkdir()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's exporter warns of itself
                OnnxRuntime(batch_size=4).lower(traced, artifact, Store(folder.store))
    return folder


@pytest.fixture
def made(swept: SweepFolder, tmp_path: Path) -> Path:
    return bundle(swept.records()[4], swept.path, tmp_path / "bundle")


def test_a_bundle_says_all_that_is_needed_to_run_and_to_trust_it(made: Path) -> None:
    manifest = verify(made)
    assert manifest.name == "qat-w8s-a8a-prune50"
    assert manifest.engine == {"engine": "onnxruntime", "batch_size": 4}
    assert manifest.input == {"shape": [1, 4, 4], "dtype": "float32"}
    assert manifest.task["data"] == {"method": "digits", "seed": 0}
    assert manifest.task["classes"] == 10
    assert manifest.task["preprocessing"]["mean"] == [4.9]
    assert "torch" in manifest.versions
    assert {"config.yaml", "metrics.json", "artifact/model.onnx", "artifact/weights.safetensors"} <= set(manifest.files)


def test_a_loaded_bundle_gives_what_the_model_gives(made: Path) -> None:
    import torch

    with torch.no_grad():
        torch.testing.assert_close(load(made)(inputs(4)), trained()(inputs(4)), atol=1e-5, rtol=1e-5)


def test_any_number_of_samples_gives_the_outputs_of_each_alone(made: Path) -> None:
    import torch

    model = load(made)
    whole = model(inputs(9))
    for count in (0, 1, 4, 5):
        torch.testing.assert_close(model(inputs(9)[:count]), whole[:count], atol=0, rtol=0)


def test_arrays_give_arrays(made: Path) -> None:
    import numpy

    model = load(made)
    array = inputs(3).numpy().astype(numpy.float64)
    assert isinstance(model(array), numpy.ndarray)
    assert (model(array) == model(inputs(3)).numpy()).all()


def test_outputs_that_the_next_call_overwrites_are_copied(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    loaded, buffer = load(made), torch.empty(4, 16)
    monkeypatch.setattr(loaded, "_runner", lambda batch: buffer.copy_(batch.flatten(1)))
    assert torch.equal(loaded(inputs(10)), inputs(10).flatten(1))


def test_calls_of_several_threads_take_turns(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, place = load(made), torch.zeros(1, 10)

    def engine(batch: Tensor) -> Tensor:
        """One place for what it computes, as a captured graph has."""
        place.fill_(batch.flatten()[0])
        time.sleep(0.001)
        return place

    monkeypatch.setattr(model, "_runner", engine)
    monkeypatch.setattr(model, "_batch_size", 1)
    given = [torch.full_like(inputs(1), float(number)) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(model, given))
    assert [float(outputs[0, 0]) for outputs in found] == list(range(40))


def test_inputs_of_another_shape_or_not_preprocessed_are_refused(made: Path) -> None:
    import torch

    model = load(made)
    with pytest.raises(DataError, match=r"must have the shape \['N', 1, 4, 4\] \(got \[2, 1, 8, 8\]\)"):
        model(torch.rand(2, 1, 8, 8))
    with pytest.raises(DataError, match=r"must be float32, preprocessed as the task does \(got torch.uint8\)"):
        model(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))


def test_inputs_with_nan_are_refused_since_integers_know_none(made: Path) -> None:
    model, given = load(made), inputs(5)
    given[3, 0, 1, 2] = float("nan")
    with pytest.raises(DataError, match=r"inputs must not hold NaN \(sample 3 does\)"):
        model(given)


def test_arrays_need_not_be_contiguous_or_writable_and_may_be_lists(made: Path) -> None:
    model, given = load(made), inputs(3).numpy()
    outputs = model(given)
    read_only = given.copy()
    read_only.setflags(write=False)
    backwards = given[::-1].copy()[::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (read_only, backwards, given.tolist(), list(inputs(3))):
            assert (model(other) == outputs).all()


@pytest.mark.parametrize("given", [None, "pixels", [[1.0], [1.0, 2.0]]], ids=["None", "text", "ragged"])
def test_what_is_no_array_of_numbers_is_refused(made: Path, given: Any) -> None:
    with pytest.raises(DataError, match="inputs must be a tensor or an array of float32"):
        load(made)(given)


def test_a_changed_byte_is_found(made: Path) -> None:
    path = made / "artifact" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights.safetensors`: was changed: must have SHA-256"):
        load(made)


def test_a_missing_an_extra_and_a_shortened_file_are_named(made: Path) -> None:
    config = made / "config.yaml"
    config.write_text(config.read_text()[:-1])
    with pytest.raises(BundleError, match=r"config.yaml`: was changed: must have \d+ bytes"):
        verify(made)
    config.unlink()
    with pytest.raises(BundleError, match=r"config.yaml`: is in the manifest and missing"):
        verify(made)
    (made / "artifact" / "evil.so").touch()
    config.touch()
    with pytest.raises(BundleError, match=r"evil.so`: is not in the manifest"):
        verify(made)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "artifact/../../outside", "a\\..\\b", "C:/x", ""])
def test_a_manifest_that_leads_out_of_the_bundle_is_refused(made: Path, name: str) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"must be a path inside of the bundle"):
        verify(made)


def test_a_link_in_a_bundle_is_refused(made: Path) -> None:
    (made / "config.yaml").unlink()
    (made / "config.yaml").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match=r"config.yaml`: must be a file, not a link"):
        verify(made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, r"`format`: must be 1 \(got 2\)"),
        ({"surprise": 1}, r"`surprise`: there is no such key"),
        ({"engine": {"engine": "abacus"}}, r"engine"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(made: Path, change: dict[str, object], said: str) -> None:
    manifest = json.loads((made / "manifest.json").read_text()) | change
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=said):
        load(made)


def test_a_folder_that_is_no_bundle_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest.json`: must be there"):
        load(tmp_path)


def test_no_pickle_is_shipped(made: Path, swept: SweepFolder, tmp_path: Path) -> None:
    import torch

    assert list(pickles(made)) == []
    torch.save({"weights": torch.zeros(1)}, swept.trial(3) / "artifact" / "weights.pt")
    try:
        assert zipfile.is_zipfile(swept.trial(3) / "artifact" / "weights.pt")
        with pytest.raises(BundleError, match=r"must hold no pickle.*weights.pt!weights/data.pkl"):
            bundle(swept.records()[3], swept.path, tmp_path / "other")
    finally:
        (swept.trial(3) / "artifact" / "weights.pt").unlink()
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_trial_that_failed_cannot_be_bundled_and_nothing_is_overwritten(swept: SweepFolder, made: Path) -> None:
    with pytest.raises(BundleError, match=r"must have an artifact to be shipped \(it is failed\)"):
        bundle(swept.records()[6], swept.path, made.parent / "other")
    with pytest.raises(BundleError, match="must not exist yet"):
        bundle(swept.records()[4], swept.path, made)


def test_an_artifact_that_changed_since_it_was_built_is_not_shipped(swept: SweepFolder, tmp_path: Path) -> None:
    import shutil

    sweep, record = tmp_path / "sweep", swept.records()[4]
    shutil.copytree(swept.path, sweep)
    artifact = sweep / record.folder / "artifact"
    built = json.dumps({"metrics": {}, "files": digests(artifact)})
    (sweep / record.folder / "build.json").write_text(built)
    bundle(record, sweep, tmp_path / "whole")
    (artifact / "weights.safetensors").write_bytes((artifact / "weights.safetensors").read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"weights\.safetensors`: must be as it was built and measured"):
        bundle(record, sweep, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_begins_like_an_archive_is_no_archive(swept: SweepFolder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(swept.path, tmp_path / "sweep")
    (tmp_path / "sweep" / swept.records()[4].folder / "artifact" / "odd.bin").write_bytes(b"PK\x03\x04 no archive")
    assert "artifact/odd.bin" in verify(bundle(swept.records()[4], tmp_path / "sweep", tmp_path / "out")).files


def test_an_export_runs_without_qsweep(swept: SweepFolder, made: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = export(swept.records()[4], swept.path, tmp_path / "out" / "model")
    assert os.listdir(out) == ["model.onnx"]
    assert os.listdir(out.parent) == ["model"]
    session = onnxruntime.InferenceSession((out / "model.onnx").read_bytes())
    (given,) = session.get_inputs()
    assert (session.run(None, {given.name: inputs(4).numpy()})[0] == load(made)(inputs(4)).numpy()).all()


def test_the_command_says_where_an_export_is_larger_than_what_is_promoted(
    swept: SweepFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qsweep.cli import shipping

    record = swept.records()[4]
    shipping.export(swept.path, tmp_path / "one", trial=4)
    size = (tmp_path / "one" / "model.onnx").stat().st_size
    said = capsys.readouterr().out
    assert f"{size:,} bytes" in said
    assert record.metrics.size_bytes is not None
    larger = (
        f"these are {size:,} bytes for the runtime alone; `promote` ships the same in {record.metrics.size_bytes:,.0f}"
    )
    assert (larger in " ".join(said.split())) == (size > 1.05 * record.metrics.size_bytes)
    swept.write(record.model_copy(update={"metrics": record.metrics.model_copy(update={"size_bytes": size / 2})}))
    shipping.export(swept.path, tmp_path / "two", trial=4)
    assert f"`promote` ships the same in {size / 2:,.0f}, packed" in " ".join(capsys.readouterr().out.split())
    swept.write(record)


def test_the_best_is_chosen_by_its_metric_within_the_bounds() -> None:
    found = finished(records())
    assert best(found, Selector(by="accuracy")).number == 4
    assert best(found, Selector(by="size_bytes")).number == 3
    assert best(found, Selector(max={"accuracy_drop_pp": 1}, by="size_bytes")).number == 4
    assert best(found, Selector(max={"accuracy_drop_pp": 1}, min={"latency_ms": 0.9}, by="latency_ms")).number == 0


def test_a_trial_may_be_named_by_its_number() -> None:
    found, kept = finished(records()), asked(constraints={"accuracy_drop_pp": {"max": 1}})
    assert best(found, Selector(trial=3), kept).number == 3
    copy = found[3].model_copy(update={"number": 20, "duplicate_of": 3})
    assert best([*found, copy], Selector(trial=20)).number == 3
    failed = next(record for record in found if record.state == "failed")
    with pytest.raises(SweepError, match=rf"trial {failed.number} must be one that was measured \(it failed\)"):
        best(found, Selector(trial=failed.number))


def test_what_another_engine_shows_in_place_of_one_that_refuses_it_is_not_shipped() -> None:
    found = finished(records())
    kept, target = found[4], {"engine": "float", "batch_size": 4}
    update = {"number": 21, "kind": "baseline", "uid": "of float", "config": kept.config | {"target": target}}
    quickest = kept.model_copy(update=update | {"metrics": kept.metrics.model_copy(update={"accuracy": 1.0})})
    assert best([*found, quickest], Selector(by="accuracy"), spec()).number == 4
    assert best([*found, quickest], Selector(trial=21), spec()).number == 21
    asks = asked(baselines=[{"compress": {}, "target": target}])
    wanted = quickest.model_copy(update={"uid": asks.baselines[0].uid()})
    assert best([*found, wanted], Selector(by="accuracy"), asks).number == 21
    assert Places.of(asks, [*found, quickest], {}).members().keys() == Places.of(asks, found, {}).members().keys()


def test_what_was_measured_as_the_spec_asks_no_more_is_not_shipped() -> None:
    found = finished(records())
    batch = {"range": [1, 64]}
    assert best(found, Selector(), asked()).number == 4
    assert best(found, Selector(), small_spec(target=TARGET | {"batch_size": 8})).number == 0
    assert best(found, Selector(), small_spec(target=TARGET | {"batch_size": batch})).number == 4
    assert best(found, Selector(trial=4), small_spec(target=TARGET | {"batch_size": 8})).number == 4
    assert Places.of(small_spec(target=TARGET | {"batch_size": 8}), found, {}).members().keys() <= {0}


def test_the_best_keeps_the_constraints_of_the_spec_too() -> None:
    found, kept = finished(records()), asked(constraints={"accuracy_drop_pp": {"max": 1}})
    assert best(found, Selector(by="size_bytes"), kept).number == 4
    with pytest.raises(SweepError, match="no trial keeps accuracy_drop_pp ≤ 1 and size_bytes ≤ 5000"):
        best(found, Selector(max={"size_bytes": 5000}), kept)


def test_the_best_keeps_bounds_by_its_mean_too() -> None:
    from test_repeats import again

    lucky = again(record(1, "lucky", 0.95, 9_000.0, 1.0), 0.85)
    safe = record(2, "safe", 0.92, 9_500.0, 1.0)
    assert best([lucky, safe], Selector(min={"accuracy": 0.91}, by="size_bytes")).number == 2
    with pytest.raises(SweepError, match=r"the nearest is #2 `safe` with accuracy 0\.92"):
        best([lucky, safe], Selector(min={"accuracy": 0.93}))
    with pytest.raises(SweepError, match=r"the nearest is #1 `lucky` with accuracy 0\.95 \(mean 0\.9\)"):
        best([lucky], Selector(min={"accuracy": 0.93}))


def test_latencies_that_the_front_takes_for_one_are_one_for_the_best_too() -> None:
    quick, better = record(1, "quick", 0.95, 9_000.0, 1.0), record(2, "better", 0.97, 8_000.0, 1.05)
    assert best([quick, better], Selector(by="latency_ms")).number == 2


def test_ties_go_to_the_more_accurate() -> None:
    assert best(records(), Selector(by="latency_ms")).number == 2


def test_the_last_bits_of_an_accuracy_decide_nothing() -> None:
    """As means of real numbers have them, here of a loss, which is negative."""
    by_size = sorted((r for r in records() if r.state == "complete"), key=lambda r: r.metrics.size_bytes or 0)
    small, large = by_size[0], by_size[-1]
    values = {small.number: -0.49548173, large.number: -0.49548167}
    found = [
        each.model_copy(update={"metrics": each.metrics.model_copy(update={"accuracy": values[each.number]})})
        for each in (small, large)
    ]
    assert best(found, Selector()).number == small.number


def test_when_nothing_keeps_the_bounds_the_nearest_is_named() -> None:
    with pytest.raises(
        SweepError, match=r"no trial keeps size_bytes ≤ 4000; the nearest is #3 `ptq-w4s-a8a` with size"
    ):
        best(records(), Selector(max={"size_bytes": 4000}))
    with pytest.raises(SweepError, match=r"there must be a finished trial with `accuracy`"):
        best([records()[6]], Selector())


def test_a_metric_that_was_not_measured_keeps_no_bound() -> None:
    with pytest.raises(SweepError, match=r"no trial keeps peak_memory_bytes ≤ 1e\+09"):
        best(records(), Selector(max={"peak_memory_bytes": 1e9}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"max": ["accuracy_drop_pp"]}, r"`--max`: must be METRIC=NUMBER.*\(got `accuracy_drop_pp`\)"),
        ({"min": ["accuracy=high"]}, r"`--min`: must be METRIC=NUMBER"),
        ({"max": ["speed=1"]}, r"`--max`: must name metrics out of"),
        ({"max": ["latency=1"]}, r"`--max`: did you mean `latency_ms`\? Must name metrics out of"),
        ({"max": ["size_bytes=nan"]}, r"finite"),
        ({"by": "energy"}, r"`--by`: did you mean `energy_mj`\? Must be one of"),
    ],
)
def test_selectors_are_checked(words: dict[str, list[str]], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Selector.parse(**words)  # type: ignore[arg-type]


def test_selectors_are_read_from_words() -> None:
    read = Selector.parse(max=["accuracy_drop_pp=1"], min=["parity_top1=0.99"], by="latency_ms")
    assert read == Selector(max={"accuracy_drop_pp": 1.0}, min={"parity_top1": 0.99}, by="latency_ms")


@pytest.fixture(scope="module")
def published(swept: SweepFolder) -> SweepFolder:
    def driver() -> Generator[Record, None, bool]:
        yield from swept.records()
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        list(publish(driver(), spec(), swept.root))
    return swept


def test_a_promoted_trial_comes_back_by_its_alias(
    published: SweepFolder, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = tracking_uri(None, published.root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = promote(published.path, Selector(max={"accuracy_drop_pp": 1}, by="size_bytes"), "digits")
    assert (done.record.number, done.uri) == (4, "models:/digits@champion")
    for source in (done.uri, f"models:/digits/{done.version}"):
        loaded = load(source)
        assert isinstance(loaded, LoadedModel)
        assert (loaded(inputs(3)) == load(made)(inputs(3))).all()
    version = MlflowClient(uri).get_model_version("digits", done.version)
    run = MlflowClient(uri).get_run(str(version.run_id))
    assert run.data.tags["qsweep.uid"] == version.tags["qsweep.uid"] == done.record.uid
    assert version.tags["qsweep.spec"] == published.spec().uid()
    assert version.tags["qsweep.front"] == "certain"
    assert version.tags["qsweep.engine"] == "onnxruntime"

    place = str(version.source).removeprefix(f"runs:/{version.run_id}/")
    (kept,) = (published.root / "mlartifacts").glob(f"*/{version.run_id}/artifacts/{place}/MLmodel")
    before = kept.read_text()
    other = promote(published.path, Selector(trial=4), "others")
    copied = MlflowClient(uri).copy_model_version(f"models:/others/{other.version}", "production")
    assert kept.read_text() == before
    assert load(f"models:/production/{copied.version}").manifest.number == 4

    again = promote(published.path, Selector(by="size_bytes"), "digits")
    assert (again.record.number, load("models:/digits@champion").manifest.number) == (3, 3)
    assert int(again.version) == int(done.version) + 1


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_a_promoted_trial_is_an_mlflow_model_without_pickle(
    published: SweepFolder, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mlflow

    uri = tracking_uri(None, published.root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = promote(published.path, Selector(), "served", alias="candidate")
    assert (done.record.number, done.alias) == (4, "candidate")
    local = mlflow.artifacts.download_artifacts(done.uri, dst_path=str(tmp_path), tracking_uri=uri)
    assert list(pickles(Path(local))) == []
    needed = (Path(local) / "requirements.txt").read_text().split()
    assert "torch==" in "".join(needed)
    assert not any("+" in package for package in needed)  # what an index has
    outputs = mlflow.pyfunc.load_model(local).predict(inputs(3).numpy())
    assert (outputs == load(made)(inputs(3)).numpy()).all()


def test_a_bundle_is_registered_if_it_keeps_the_bounds(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    kept = recorded(made, verify(made))
    with pytest.raises(SweepError, match=r"no trial keeps accuracy ≥ 0.98; the nearest is #4 .* with accuracy 0.971"):
        promote(str(made), Selector(min={"accuracy": 0.98}), "nightly", "challenger")
    assert not (tmp_path / "mlflow.db").exists()
    command = ["promote", str(made), "--name", "nightly", "--alias", "challenger"]
    assert CliRunner().invoke(app, [*command, "--max", "accuracy_drop_pp=-1"]).exit_code != 0
    said = CliRunner().invoke(app, [*command, "--max", "accuracy_drop_pp=0.1"]).output
    told = "qat-w8s-a8a-prune50 on onnxruntime, batch 4 is version 1 of `nightly`, alias `challenger`"
    assert said.splitlines()[0] == told
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert (load("models:/nightly@challenger")(inputs(3)) == load(made)(inputs(3))).all()
    client = MlflowClient(uri)
    run = client.get_run(str(client.get_model_version("nightly", "1").run_id))
    assert (run.info.status, run.info.run_name, run.data.metrics["accuracy"]) == ("FINISHED", kept.name, 0.971)
    assert (run.data.params["quantize"], run.data.tags["qsweep.uid"]) == ("qat", kept.uid)

    (made / "metrics.json").write_text("{}")
    with pytest.raises(BundleError, match=r"metrics\.json`: was changed"):
        promote(made, Selector(), "nightly")


def test_what_the_registry_lacks_is_said(published: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(None, published.root))
    with pytest.raises(TrackError, match="`models:/nobody@champion`: must be in the registry `sqlite"):
        load("models:/nobody@champion")
    with pytest.raises(SpecError, match="`uri`: must start with one of"):
        load("models:/nobody@champion", uri="ftp://x")
    with pytest.raises(SpecError, match=r"must be `models:/NAME@ALIAS`"):
        load("models:/digits")
    with pytest.raises(SpecError, match=r"`--name`, `--alias`"):
        promote(published.path, Selector(), "a/b")
    with pytest.raises(SpecError, match=r"`--alias`: must be no name that MLflow keeps for itself"):
        promote(published.path, Selector(), "digits", "v1")


def test_a_registry_that_is_not_there_is_said_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackError, match=r"there is no registry `.*mlflow\.db`; give its `uri`"):
        load("models:/digits@champion")
    assert not list(tmp_path.iterdir())


def test_the_model_as_it_is_may_be_promoted_and_is_said_to_be_that_where_it_was_not_named(
    published: SweepFolder,
) -> None:
    chosen = (["--trial", "0"], ["--by", "latency_ms", "--min", "latency_ms=0.9", "--max", "accuracy_drop_pp=1"])
    for version, (options, noted) in enumerate(zip(chosen, (False, True), strict=True), start=1):
        said = CliRunner().invoke(app, ["promote", str(published.path), "--name", "as-it-is", *options]).output
        assert f"fp32 on onnxruntime, batch 4 is version {version} of `as-it-is`" in said
        assert ("note: this is the model as it is" in said) == noted


def test_a_trial_that_was_never_published_cannot_be_promoted(swept: SweepFolder, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(swept.path, tmp_path / "sweeps" / "small", ignore=shutil.ignore_patterns("published.json"))
    with pytest.raises(TrackError, match=r"must have trial #4 `qat-w8s-a8a-prune50`: `qsweep run` publishes it"):
        promote(tmp_path / "sweeps" / "small", Selector(), "digits")


def test_to_look_for_a_trial_elsewhere_forgets_nothing_of_what_was_published(
    published: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (published.path / "published.json").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(TrackError, match=r"must have trial #4.*: it is at `sqlite:///mlflow.db`: set MLFLOW_TRACKING"):
        promote(published.path, Selector(), "digits")
    assert (published.path / "published.json").read_text() == before
    assert not (tmp_path / "other.db").exists()


def test_a_trial_whose_run_mlflow_has_lost_is_said_to_be_published_by_the_same_command(
    published: SweepFolder, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(published.path, tmp_path / "sweeps" / "small")  # without its database
    with pytest.raises(TrackError, match=r"must have trial #4 .*has published there: `qsweep run` publishes it"):
        promote(tmp_path / "sweeps" / "small", Selector(), "digits")


def test_a_sweep_that_was_moved_away_is_the_one_in_its_folder(published: SweepFolder, tmp_path: Path) -> None:
    import shutil

    from mlflow.tracking._tracking_service import utils

    shutil.copytree(published.root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sweeps").rename(tmp_path / "old")
    write(tmp_path, *records()[:2])  # another of the same name
    shutil.copy(published.path / "spec.json", tmp_path / "sweeps" / "small")
    said = CliRunner().invoke(app, ["best", str(tmp_path / "old" / "small"), "--by", "size_bytes"]).output
    assert "#3" in said
    utils._artifact_repos_cache.clear()
    done = promote(tmp_path / "old" / "small", Selector(), "digits")
    assert (done.record.number, load(done.uri, done.tracking_uri).manifest.number) == (4, 4)


def test_what_was_promoted_before_its_project_was_moved_comes_back_and_more_can_be_promoted(
    published: SweepFolder, tmp_path: Path
) -> None:
    import shutil

    from mlflow.tracking._tracking_service import utils

    shutil.copytree(published.root, tmp_path / "old")
    utils._artifact_repos_cache.clear()  # MLflow's memory of where runs lie: as in another process
    first = promote(tmp_path / "old" / "sweeps" / "small", Selector(), "moved")
    (tmp_path / "old").rename(tmp_path / "new")
    utils._artifact_repos_cache.clear()
    second = promote(tmp_path / "new" / "sweeps" / "small", Selector(), "moved")
    assert [first.version, second.version] == ["1", "2"]
    (tmp_path / "place").mkdir()
    for number in (1, 2):
        assert verify(fetch(f"models:/moved/{number}", tmp_path / "place", second.tracking_uri))
    assert not (tmp_path / "old").exists()


def test_a_sweep_without_a_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="there is no sweep here"):
        promote(tmp_path / "sweeps" / "none", Selector(), "digits")


PTQ = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "onnxruntime", "batch_size": 4}}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter warns of itself
def test_a_config_is_applied_to_another_checkpoint_which_stays_as_it_was(tmp_path: Path) -> None:
    import torch

    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = compress(model, PTQ, Toy(), tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert (made(inputs(9)) - model(inputs(9))).abs().max() < 0.05
    assert verify(tmp_path / "out").name == "ptq-w8s-a8a"
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    assert measured["parity_top1"] >= 0.95
    assert measured["accuracy"] == pytest.approx(measured["accuracy_simulated"], abs=0.05)
    assert made.metrics == Metrics.model_validate(measured)
    samples = Toy().samples("validation")
    with torch.no_grad():
        whole = Toy().score(model(Toy().transform(samples.inputs)), samples.labels).mean().item()
    assert measured["accuracy_drop_pp"] == pytest.approx(100 * (whole - measured["accuracy"]), abs=1e-4)
    assert recorded(tmp_path / "out", made.manifest).machine == fingerprint()

    torch.manual_seed(7)
    other = Toy().model().eval()
    again = compress(other, tmp_path / "out", Toy())  # the config of that bundle
    assert again.manifest.trial == made.manifest.trial
    with torch.no_grad():
        assert (again(inputs(9)) - other(inputs(9))).abs().max() < 0.05
    assert not torch.allclose(again(inputs(9)), made(inputs(9)), atol=0.05)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter warns of itself
def test_bits_by_layer_are_chosen_again_alike_and_told_in_the_bundle(tmp_path: Path) -> None:
    mixed = {"method": "mixed", "average_bits": 4.5, "candidates": [3, 6], "sensitivity": "output_error"}
    config = PTQ | {"compress": {"quantize": mixed}}
    model, found = trained(), []
    for source, out in ((config, "first"), (tmp_path / "first", "again")):
        compress(model, source, Toy(), tmp_path / out)
        found.append(json.loads((tmp_path / out / "metrics.json").read_text())["layer_bits"])
    assert found[0] == found[1] == {"0.weight": 6, "5.weight": 3}  # 36 weights and 128: the budget has room for these
    assert verify(tmp_path / "first").trial == verify(tmp_path / "again").trial


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter warns of itself
def test_fine_tuning_and_metric_are_those_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = PTQ | {"compress": {"prune": {"method": "magnitude", "sparsity": 0.5, "epochs": 1}}}
    model, settings = trained(), Training(optimizer="adamw", batch_size=8)
    first = compress(model, pruned, Toy(), tmp_path / "first", training=settings)
    assert Training.model_validate(first.manifest.task["training"]) == settings
    again, others = compress(model, tmp_path / "first", Toy()), compress(model, pruned, Toy())
    with monkeypatch.context() as patch:
        patch.setattr(Training, "unavailable", lambda self: "no GPU" if self.device == "cuda" else None)
        compress(model, PTQ, Toy(), tmp_path / "of a GPU", training=settings)
        manifest = json.loads((tmp_path / "of a GPU" / "manifest.json").read_text())
        manifest["task"]["training"]["device"] = "cuda"
        manifest["task"]["metric"] = {"name": "PSNR", "unit": "dB"}
        (tmp_path / "of a GPU" / "manifest.json").write_text(json.dumps(manifest))
        kept = compress(model, tmp_path / "of a GPU", Toy()).manifest.task
        assert kept["training"]["device"] == "cpu"
        assert kept["metric"]["unit"] == "dB"
    assert (again(inputs(9)) == first(inputs(9))).all()
    assert not (others(inputs(9)) == first(inputs(9))).all()


def test_a_trial_is_named_by_its_folder_with_the_settings_of_its_sweep(tmp_path: Path) -> None:
    folder, settings = tmp_path / "sweeps" / "small" / "trials" / "0003", {"optimizer": "adamw"}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(PTQ))
    task = {"training": settings, "metric": {"name": "PSNR", "unit": "dB"}}
    (tmp_path / "sweeps" / "small" / "spec.json").write_text(json.dumps({"spec": {"task": task}}))
    config, training, metric = asked_for(folder, None)
    assert (config, training, metric.unit) == (TrialConfig.model_validate(PTQ), Training(**settings), "dB")
    assert asked_for(folder / "config.yaml", None)[1] == Training()
    with pytest.raises(SpecError, match=r"`.*/trials/config.yaml`: there is no"):
        asked_for(folder.parent, None)


def test_a_folder_that_is_taken_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="must not exist yet"):
        compress(trained(), {"target": {"engine": "float"}}, Toy(), tmp_path)


def test_a_config_that_is_none_or_that_the_engine_refuses_is_said_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"`compress.quantise`: did you mean `quantize`\? There is no such key"):
        compress(trained(), {"compress": {"quantise": None}, "target": {"engine": "onnxruntime"}}, Toy())
    with pytest.raises(SpecError, match="there is no such file"):
        compress(trained(), tmp_path / "none.yaml", Toy())
    cast = {"compress": {"quantize": {"method": "cast"}}, "target": {"engine": "onnxruntime"}}
    with pytest.raises(Refused, match="`bf16`: ONNX Runtime"):
        compress(trained(), cast, Toy())


def test_a_class_as_specs_name_it_is_a_task_for_compress_too() -> None:
    class Plain:
        """Tuples for samples, no transform."""

        def model(self) -> object:
            return trained()

        def samples(self, split: str) -> object:
            return inputs(40), Toy().samples("train").labels[:40]

        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return Toy().loss(outputs, labels)

        def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return Toy().score(outputs, labels)

    model = compress(trained(), {"target": {"engine": "float", "compile": False}}, Plain())  # type: ignore[arg-type]
    assert model(inputs(3)).shape[0] == 3
    with pytest.raises(TaskFailure, match=r"`task`: must have the methods .* \(`NoneType` lacks model"):
        compress(trained(), {"target": {"engine": "float"}}, None)  # type: ignore[arg-type]
    with pytest.raises(TaskFailure, match=r"`task`: must be an object, such as `Plain\(\)` \(got the class\)"):
        compress(trained(), {"target": {"engine": "float"}}, Plain)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"`model`: must be a torch.nn.Module \(got NoneType\)"):
        compress(None, {"target": {"engine": "float"}}, Toy())  # type: ignore[arg-type]
