from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from realistic import finished, records
from realistic import spec as realistic_spec
from rich.console import Console
from small_sweep import CONTENT, small_spec, sweep, told
from typer.testing import CliRunner, Result

import qsweep.sweep
from qsweep.cli.console import grid
from qsweep.cli.main import app, main
from qsweep.machine import cores
from qsweep.records import Failure, Metrics, Record
from qsweep.schema import json_schema
from qsweep.study.driver import run as drive
from qsweep.study.folder import SweepFolder
from qsweep.track import front_table


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(CONTENT, encoding="utf-8")
    return path


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that need no model; driver, Optuna and MLflow are the real ones."""
    jobs = functools.partial(drive, jobs="arithmetic_jobs", preload=("numpy",))
    monkeypatch.setattr("qsweep.study.driver.run", jobs)


def qsweep_(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command that ends with exit code 1 says on standard error; nothing else is said."""
    monkeypatch.setattr(sys, "argv", ["qsweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (1, "")
    return said.err


def test_the_package_itself_can_be_run() -> None:
    said = subprocess.run([sys.executable, "-m", "qsweep", "runn"], capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "Did you mean 'run'" in said.stderr


@pytest.mark.usefixtures("arithmetic")
def test_what_is_doubtful_stands_below_the_front(spec: Path) -> None:
    told(spec.parent, prepare="doubt")
    for command in ("run", "front"):
        assert "\nnote: as told\n" in qsweep_(command, spec).output


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("bound", "told"), [("{min: 0.995}", True), ("{min: 0.5}", False)])
def test_a_bound_that_fp32_breaks_is_told_once_it_is_known_and_below_the_front(
    tmp_path: Path, bound: str, told: bool
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"{CONTENT}constraints: {{accuracy: {bound}}}\n")
    begin = "note: fp32 itself does not keep `constraints.accuracy` (its accuracy is 0."
    said = qsweep_("run", spec).output.splitlines()
    assert [line.startswith(begin) for line in said if line.startswith("note: ")] == [True, True] * told
    assert said[1].startswith(begin) == told
    assert any(line.startswith(begin) for line in qsweep_("front", spec).output.splitlines()) == told


@pytest.mark.usefixtures("arithmetic")
def test_where_fp32_is_the_quickest_the_smallest_is_proposed_to_ship(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(CONTENT)
    told(tmp_path, measure="heavy")
    said = qsweep_("run", tmp_path / "spec.yaml").output
    assert "--by size_bytes" in said
    assert "--by latency_ms" not in said


@pytest.mark.usefixtures("arithmetic")
def test_what_could_not_be_had_is_told_below_the_front(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(CONTENT.replace("engine: onnxruntime", "engine: {choice: [onnxruntime, executorch]}"))
    told(tmp_path, test_0000="fail", build_0003="Refused", build_0004="Refused")
    for command in ("run", "front"):
        notes = [line for line in qsweep_(command, spec).output.splitlines() if line.startswith("note: ")]
        assert notes == [
            "note: `executorch` has refused the model itself: as told",
            "note: the test split of #0 `fp32` failed: as told",
        ]


def test_what_is_shown_of_a_sweep_whose_spec_has_changed_is_said_to_be_of_before(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(spec.parent, small_spec())
    for text, changed in ((CONTENT, False), (CONTENT.replace("trials: 6", "trials: 7"), True)):
        spec.write_text(text)
        result = qsweep_("front", spec)
        assert ("has changed since; this is the sweep as it was run" in " ".join(result.stderr.split())) == changed
        assert "ptq-w6s-a8a" in result.stdout


def test_validate_says_what_a_spec_asks_for(spec: Path) -> None:
    said = qsweep_("validate", spec).output
    assert f"{spec}: valid" in said
    assert "6 points" in said
    assert "every point" in said


def test_a_model_that_is_to_be_trained_first_is_said_to_be(tmp_path: Path) -> None:
    methods = "".join(f"    def {name}(self, *given): ...\n" for name in ("model", "samples", "loss", "score"))
    (tmp_path / "task.py").write_text(f"class Mine:\n{methods}")
    told = "the model is trained first, 20 epochs; `task: {trained: true}` says that `model()` gives trained weights"
    for trained in (False, True):
        task = {"method": "python", "file": "task.py:Mine", "trained": trained}
        said = " ".join(qsweep_("validate", written(tmp_path / "spec.yaml", task=task)).output.split())
        assert (told in said) != trained, said


def written(spec: Path, **changes: object) -> Path:
    spec.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | changes), encoding="utf-8")
    return spec


def test_validate_refuses_a_spec_whose_files_are_missing_and_names_them_all(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FOLDER", raising=False)
    (spec.parent / "there.parquet").touch()
    data = {"method": "parquet", "train": {"file": "there.parquet"}, "test": "$FOLDER/test.parquet", "classes": 10}
    model = {"arch": "resnet20", "checkpoint": "none.safetensors"}
    images = {"method": "image_classification", "model": model, "data": data}
    own = {"method": "python", "file": "none.py:Task", "depends_on": ["there.parquet"]}
    no = f"there is no file `{spec.parent.resolve()}"
    assert failing(monkeypatch, capsys, "validate", written(spec, task=images)) == (
        f"error: `none.safetensors`: {no}/none.safetensors`; "
        "`$FOLDER/test.parquet`: the environment variable `FOLDER` must be set (it is not)\n"
    )
    assert failing(monkeypatch, capsys, "validate", written(spec, task=own)) == f"error: `none.py`: {no}/none.py`\n"


def test_validate_refuses_a_checkpoint_of_another_form(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (spec.parent / "weights.pt").write_bytes(b"PK no safetensors file")
    model = {"arch": "digits_cnn", "checkpoint": "weights.pt"}
    written(spec, task={"method": "image_classification", "model": model, "data": {"method": "digits"}})
    said = failing(monkeypatch, capsys, "validate", spec)
    assert "must be a whole safetensors file" in said
    assert "`safetensors.torch.save_file` writes one from a `state_dict()`" in said


def test_validate_refuses_a_class_that_is_none_without_loading_its_data(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "".join(f"    def {name}(self, *given): ...\n" for name in ("model", "samples", "loss"))
    code = f"class Mine:\n    def __init__(self): raise OSError('the data are read')\n{methods}"
    (spec.parent / "mine.py").write_text(code)
    written(spec, task={"method": "python", "file": "mine.py:Mine"})
    assert "`Mine` must have the methods model, samples, loss, score" in failing(monkeypatch, capsys, "validate", spec)
    (spec.parent / "mine.py").write_text(f"{code}    score = loss\n")
    assert f"{spec}: valid" in qsweep_("validate", spec).output


def test_validate_refuses_threads_that_this_machine_has_not_as_run_does(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    most = cores()
    said = (
        "`onnxruntime` does not work on this machine: "
        f"`threads` must be at most {most}, the cores that may be used (got {most + 1})"
    )
    written(spec, target={"engine": "onnxruntime", "threads": most + 1})
    for command in ("validate", "run"):
        assert failing(monkeypatch, capsys, command, spec) == f"error: `target.engine`: {said}\n"
    written(spec, target={"engine": "onnxruntime", "threads": {"choice": [1, most + 1]}})
    assert f"\n  left out     {said}\n" in qsweep_("validate", spec).output


def test_validate_counts_no_points_where_there_are_ranges_of_real_numbers(spec: Path) -> None:
    compress = {"quantize": {"method": "qat", "learning_rate": {"range": [0.001, 0.1]}}}
    spec.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | {"compress": compress}), encoding="utf-8")
    said = qsweep_("validate", spec).output
    assert "not countable" in said
    assert "6 trials by tpe" in said


def test_plan_says_how_many_configs_what_they_share_and_what_is_refused(spec: Path) -> None:
    options = [{"method": "ptq", "weight_bits": {"choice": [4, 8]}}, {"method": "cast"}]
    content = yaml.safe_load(CONTENT) | {"compress": {"quantize": {"choice": options}}}
    spec.write_text(yaml.safe_dump(content), encoding="utf-8")
    said = qsweep_("plan", spec).output
    assert "configs    3" in said
    assert "trials     2 at most" in said
    assert "quantize: computed 2 times for 2 configs" in said
    assert "refused    1 configs: ONNX Runtime" in said


def test_schema_prints_the_json_schema() -> None:
    assert json.loads(qsweep_("schema").output) == json_schema()


def test_doctor_says_of_every_engine_whether_it_works() -> None:
    said = qsweep_("doctor").output
    for engine in ("float", "inductor", "onnxruntime", "reference"):
        assert f"engine {engine}" in said


def test_run_prints_a_line_a_record_the_front_and_what_comes_next(spec: Path, arithmetic: None) -> None:
    result = qsweep_("run", spec)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    numbered = [line for line in lines if line.startswith("#")]
    assert [int(line[1:4]) for line in numbered] == sorted({int(line[1:4]) for line in numbered})
    assert len(numbered) == 9  # three baselines, six points
    assert f"  qsweep best {spec} --max accuracy_drop_pp=1 --by latency_ms" in lines
    assert re.search(r"\n  qsweep ui \S+ +then http://127\.0\.0\.1:5000/#/experiments/\d+/runs\?", result.output)
    report = r"\n  report: http://127\.0\.0\.1:5000/#/experiments/\d+/runs/\w+/artifacts/pareto\.html\?"
    assert re.search(report, result.output)


def test_a_spec_that_is_a_link_belongs_to_the_folder_of_the_link(spec: Path, tmp_path: Path, arithmetic: None) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "project").mkdir()
    link = tmp_path / "project" / "spec.yaml"
    link.symlink_to(spec.rename(tmp_path / "shared" / "spec.yaml"))
    assert qsweep_("run", link).exit_code == 0
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["spec.yaml"]
    assert (tmp_path / "project" / "mlflow.db").is_file()
    assert "ptq-w6" in qsweep_("front", link).output


def test_a_search_that_finds_nothing_new_says_that_it_ended_early(spec: Path, arithmetic: None) -> None:
    quantize = {"method": "ptq", "weight_bits": 4, "activation_bits": None, "calibration_samples": {"range": [1, 999]}}
    content = {"compress": {"quantize": quantize}, "target": {"engine": "float", "compile": False}}
    spec.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | content), encoding="utf-8")
    said = qsweep_("run", spec).output
    assert "the search ended after 1 of 6 trials: no config was found that is new and possible" in said


def test_what_comes_next_can_be_pasted_though_its_path_has_spaces(spec: Path, arithmetic: None) -> None:
    place = spec.parent / "my specs"
    place.mkdir()
    said = qsweep_("run", spec.rename(place / "my spec.yaml")).output
    assert f"  qsweep best '{place / 'my spec.yaml'}' --max" in said
    assert f"  qsweep ui '{place / 'my spec.yaml'}'" in said


def test_where_no_trial_keeps_the_constraints_run_says_so_instead_of_how_to_ship_one(
    spec: Path, arithmetic: None
) -> None:
    content = yaml.safe_load(CONTENT) | {"constraints": {"size_bytes": {"max": 1}}}
    spec.write_text(yaml.safe_dump(content), encoding="utf-8")
    said = qsweep_("run", spec).output
    assert "  no trial keeps size_bytes ≤ 1 and accuracy_drop_pp ≤ 1; the nearest is #" in said
    assert "qsweep promote" not in said


def test_a_search_that_its_time_has_ended_says_so_and_goes_on(spec: Path, arithmetic: None) -> None:
    short = {"search": {"trials": 6, "timeout": 0.001}}
    spec.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | short), encoding="utf-8")
    said = qsweep_("run", spec).output
    assert re.search(r"`search\.timeout` ended the search after \d of 6 trials; `qsweep run` goes on", said)
    spec.write_text(CONTENT, encoding="utf-8")
    assert "`search.timeout`" not in qsweep_("run", spec).output
    assert len(SweepFolder(spec.parent, "small").records()) == 9


@pytest.mark.parametrize(("width", "hidden"), [(200, 0), (90, 5), (70, 7)])
def test_a_narrow_terminal_loses_the_columns_that_say_least(
    width: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsweep.cli.console.console", lambda: Console(width=width))
    titles = [str(column.header) for column in grid(front_table(finished(records()), realistic_spec())).columns]
    whole = [column.title for column in front_table(finished(records()), realistic_spec()).columns]
    assert len(titles) >= len(whole) - hidden
    assert (len(titles) < len(whole)) == (hidden > 0)
    assert {"#", "name", "accuracy %", "size KiB", "latency ms"} <= set(titles)


def test_run_again_goes_on_and_repeats_nothing(spec: Path, arithmetic: None) -> None:
    qsweep_("run", spec)
    said = qsweep_("run", spec).output
    assert "9 records are there" in said
    assert not [line for line in said.splitlines() if line.startswith("#")]


def test_a_trial_that_fails_is_told_with_its_reason_and_fails_no_sweep(spec: Path, arithmetic: None) -> None:
    told(spec.parent, build_0004="NotFinite")
    result = qsweep_("run", spec)
    assert result.exit_code == 0
    assert "failed, NotFinite: as told" in result.output


def test_a_near_tie_that_is_run_again_is_told_with_mean_and_spread(spec: Path, arithmetic: None) -> None:
    near = {"constraints": {"accuracy": {"min": 0.869}}, "search": {"trials": 6, "repeats": 1}}
    spec.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | near), encoding="utf-8")
    assert "repeats    1 at most" in qsweep_("plan", spec).output
    said = qsweep_("run", spec).output
    assert "#8   ptq-w6s-a8a on onnxruntime again: 85.80 ± 1.70 of 2 draws\n" in said
    assert "mean of draws" not in qsweep_("front", spec).output  # it left the front


@pytest.mark.parametrize("where", ["spec.yaml", "sweeps/small"])
def test_front_takes_the_spec_or_the_folder_of_the_sweep(spec: Path, where: str) -> None:
    sweep(spec.parent, small_spec())
    said = qsweep_("front", spec.parent / where).output
    assert "ptq-w6s-a8a" in said
    assert "fp32" in said


def test_best_takes_the_best_by_a_metric_of_what_keeps_the_bounds(spec: Path) -> None:
    sweep(spec.parent, small_spec())
    assert qsweep_("best", spec).output.startswith("#2 ptq-w8s-a8a on onnxruntime\n")  # as accurate as fp32, smaller
    assert qsweep_("best", spec, "--by", "size_bytes").output.splitlines()[0].endswith("ptq-w2s-a8a on onnxruntime")
    bounded = qsweep_(
        "best", spec, "--max", "accuracy_drop_pp=10", "--min", "accuracy=0.5", "--by", "size_bytes"
    ).output
    assert bounded.splitlines()[0].endswith("ptq-w6s-a8a on onnxruntime")
    assert "weight_bits: 6" in bounded
    assert "8 bits: stem.weight; 6 bits: head.weight" in bounded


def test_a_metric_of_ones_own_is_told_and_bounded_in_its_unit(spec: Path) -> None:
    (spec.parent / "task.py").write_text("")
    metric = {"name": "negative RMSE", "unit": "m"}
    sweep(spec.parent, small_spec(task={"method": "python", "file": "task.py:Task", "metric": metric}))
    said = qsweep_("best", spec, "--max", "accuracy_drop_pp=0.1", "--min", "accuracy=-3", "--by", "size_bytes").stdout
    assert said.splitlines()[0].endswith("ptq-w6s-a8a on onnxruntime")
    assert "accuracy is            negative RMSE m, its drop is in that, too" in said
    assert "negative RMSE m" in qsweep_("front", spec).output


@pytest.mark.parametrize("command", [("best",), ("promote", "--name", "m"), ("export", "--out", "out")])
def test_commands_that_choose_refuse_bounds_that_are_none_or_that_nothing_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Path, command: tuple[str, ...]
) -> None:
    sweep(spec.parent, small_spec())
    capsys.readouterr()
    monkeypatch.chdir(spec.parent)

    def said(*options: str) -> str:
        return failing(monkeypatch, capsys, command[0], spec, *command[1:], *options)

    assert "must be METRIC=NUMBER" in said("--max", "accuracy_drop_pp")
    assert "must name metrics" in said("--max", "beauty=1")
    assert "`--by`: must be one of" in said("--by", "beauty")
    assert "no trial keeps accuracy ≥ 1; the nearest is #0" in said("--min", "accuracy=1")
    assert "a share, must be from 0 to 1 (0.9 is 90 %)" in said("--min", "accuracy=90")
    assert "either `trial` or bounds must say which" in said("--min", "accuracy=0.9", "--trial", "3")
    assert "trial 77 must be one that was measured (there is none of this number)" in said("--trial", "77")


def test_a_record_in_one_line_says_what_matters() -> None:
    from qsweep.cli.run import line
    from qsweep.tasks import ACCURACY, TaskMetric

    record = Record(number=7, uid="u", name="ptq-w4s-a8a", state="complete", config={}, engine="inductor", folder="f")
    metrics = Metrics(accuracy=0.9712, size_bytes=12345, latency_ms=0.5, latency_ratio=0.25)
    done = record.model_copy(update={"metrics": metrics, "seconds": {"build": 1.0, "measure": 0.5}})
    assert line(done, ACCURACY) == "#7   ptq-w4s-a8a on inductor: 97.12 %, 12,345 bytes, 0.5 ms, 0.25 of fp32, 1.5 s"
    assert "inductor: 0.971 dB, 12" in line(done, TaskMetric(name="PSNR", unit="dB"))
    many = done.model_copy(update={"config": {"target": {"batch_size": 8}}})
    assert [line(many, ACCURACY, sized).split(":")[0].split(" on ")[1] for sized in (False, True)] == [
        "inductor", "inductor, batch 8",
    ]  # fmt: skip
    failed = record.model_copy(
        update={"state": "failed", "failure": Failure(kind="NotFinite", message="NaN in a loss")}
    )
    assert line(failed, ACCURACY) == "#7   ptq-w4s-a8a on inductor: failed, NotFinite: NaN in a loss"
    assert line(record.model_copy(update={"duplicate_of": 3}), ACCURACY) == "#7   ptq-w4s-a8a on inductor: as #3"


def test_an_error_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = tmp_path / "none.yaml"
    assert failing(monkeypatch, capsys, "run", missing) == f"error: `{missing}`: there is no such file\n"


def test_a_message_of_many_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("a: \x07\n")
    assert failing(monkeypatch, capsys, "validate", path).count("\n") == 1


@pytest.mark.parametrize("command", ["front", "ui"])
def test_a_sweep_that_never_ran_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Path, command: str
) -> None:
    assert "there is no sweep here; `qsweep run` makes it" in failing(monkeypatch, capsys, command, spec)


def test_a_folder_that_is_no_sweep_is_told_what_it_must_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Path
) -> None:
    said = failing(monkeypatch, capsys, "front", spec.parent)
    assert said.startswith(f"error: `{spec.parent}`: there is no sweep here; it must be the path of a spec, or")


@pytest.mark.parametrize("command", [("export", "--out", "/proc/none/out"), ("run",)])
def test_a_place_that_cannot_be_written_is_an_error_with_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spec: Path, command: tuple[str, ...]
) -> None:
    if command[0] == "run":
        (spec.parent / "sweeps").touch()  # a file where the folder of the sweep should be
    else:
        sweep(spec.parent, small_spec())
        for folder in (spec.parent / "sweeps/small/trials").iterdir():
            (folder / "artifact").mkdir()
        capsys.readouterr()
    said = failing(monkeypatch, capsys, command[0], spec, *command[1:])
    assert said.startswith(f"error: `{'/proc/none' if command[0] == 'export' else spec.parent / 'sweeps'}")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("arithmetic")
def test_ui_prints_the_pages_of_a_server(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qsweep_("run", spec)
    monkeypatch.setattr("qsweep.track.ui", lambda uri, port: nullcontext(uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    page, report = qsweep_("ui", spec).output.splitlines()
    assert page.startswith("http://mlflow.example/#/experiments/")
    assert report.startswith("report: http://mlflow.example/#/experiments/")
    assert "/artifacts/pareto.html?" in report


def test_a_port_that_is_none_is_refused(spec: Path) -> None:
    result = CliRunner().invoke(app, ["ui", str(spec), "--port", "99999"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "65535" in result.stderr


def test_the_program_itself_ends_without_a_traceback() -> None:
    code = "from qsweep.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "validate", "none.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: `none.yaml`: there is no such file\n")


def test_python_runs_the_same_generator(spec: Path, arithmetic: None) -> None:
    records = {record.number: record for record in qsweep.sweep.run(spec)}
    assert len(records) == 9
    assert [record.number for record in SweepFolder(spec.parent, "small").records()] == sorted(records)
