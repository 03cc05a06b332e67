"""Bad input at the command line: one line that names the spec's path or the file, what must hold and what came; exit
code 1; no traceback; nothing of a sweep that was there is lost. One case after another of what people get wrong."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_sweep import CONTENT, small_spec, sweep
from test_cli import failing

from qsweep.machine import cores
from qsweep.spec import BOUNDED
from qsweep.study import SweepFolder
from qsweep.study.driver import run as drive

NAN_TASK = """
import torch
from torch import nn

class Task:
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def samples(self, split):
        return torch.ones(40, 1, 8, 8), torch.arange(40) % 10
    def transform(self, inputs, generator=None):
        return inputs * float("nan")
    def loss(self, outputs, labels):
        return nn.functional.cross_entropy(outputs, labels)
    def score(self, outputs, labels):
        return (outputs.argmax(1) == labels).float()
"""


def images(checkpoint: str | None = None, **data: Any) -> dict[str, Any]:
    return {
        "method": "image_classification",
        "model": {"arch": "digits_cnn", "checkpoint": checkpoint},
        "data": data or {"method": "digits"},
    }


def parquet(train: str) -> dict[str, Any]:
    return images(method="parquet", train=train, test="good.parquet", classes=10, mean=[0.5], std=[0.5])


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What `qsweep run` says of the small spec with some changes."""

    def run(**changes: Any) -> str:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(CONTENT) | changes), encoding="utf-8")
        said = failing(monkeypatch, capsys, "run", path)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return re.sub(f"^error: (`{path}`(, line [0-9]+)?: )?", "", said).rstrip()

    return run


PTQ = {"method": "ptq"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"run": {"worker": 2}},
            "`run.worker`: did you mean `workers`? There is no such key; there are `workers`, `trial_timeout`, "
            "`attempts` (got 2)",
        ),
        ({"search": {"trials": "4"}}, "`search.trials`: must be an integer (got '4')"),
        (
            {"compress": {"quantize": PTQ | {"calibration_samples": True}}},
            "`compress.quantize.calibration_samples`: must be an integer (got True)",
        ),
        (
            {"compress": {"quantize": PTQ | {"weight_bits": 1}}},
            "`compress.quantize.weight_bits`: must be greater than or equal to 2 (got 1)",
        ),
        (
            {"compress": {"quantize": PTQ | {"weight_bits": {"range": [4, 99]}}}},
            "`compress.quantize.weight_bits`: must be less than or equal to 16 (got 99)",
        ),
        (
            {"compress": {"quantize": PTQ | {"weight_bits": {"range": [2, 16]}}}},
            "`compress.quantize.weight_bits`: must be 2 to 8, or 16 (got 9)",
        ),
        (
            {"compress": {"quantize": PTQ | {"weight_bits": {"choice": []}}}},
            "`compress.quantize.weight_bits.choice`: must be a list with at least one option (got [])",
        ),
        (
            {"constraints": {"accuracy_test": {"min": 0.9}}},
            f"`constraints`: did you mean `accuracy`? Must name metrics out of {sorted(BOUNDED)} "
            "(got {'accuracy_test': {'min': 0.9}})",
        ),
        (
            {"search": {"sampler": "tep"}},
            "`search.sampler`: did you mean `tpe`? Must be 'tpe', 'nsga2', 'gp', 'random' or 'grid' (got 'tep')",
        ),
        (
            {"constraints": {"accuracy_drop_pp": {"maximum": 1}}},
            "`constraints.accuracy_drop_pp.maximum`: did you mean `max`? There is no such key; there are `max`, `min` "
            "(got 1)",
        ),
        (
            {"compress": {"quantize": PTQ | {"weight_bits": {"chioce": [4, 8]}}}},
            "`compress.quantize.weight_bits`: did you mean `choice`? Must be an integer (got {'chioce': [4, 8]})",
        ),
        (
            {"track": {"uri": "ftp://x"}},
            "`track.uri`: must start with one of http, https, sqlite, postgresql, mysql, mssql, databricks, like "
            "`sqlite:///mlflow.db` (got `ftp://x`)",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_spec(refused: Any, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert refused(**changes) == said
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize(
    ("text", "said"), [(None, "there is no such file"), ("name: [", "must be YAML (expected"), ("7", "must hold a map")]
)
def test_a_spec_that_is_missing_or_no_yaml(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "spec.yaml"
    if text is not None:
        path.write_text(text)
    line = failing(monkeypatch, capsys, "run", path)
    assert line.startswith(f"error: `{path}`")
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (images("none.safetensors"), "none.safetensors"),
        (parquet("none.parquet"), "none.parquet"),
        ({"method": "python", "file": "none.py:Task"}, "none.py"),
    ],
    ids=["checkpoint", "data", "task"],
)
def test_a_file_that_is_missing(refused: Any, tmp_path: Path, task: dict[str, Any], name: str) -> None:
    assert refused(task=task) == f"`{name}`: there is no file `{tmp_path / name}`"


def test_an_engine_that_is_not_installed(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused()
    assert said.startswith("`target.engine`: `onnxruntime` does not work on this machine: ")
    assert "pip install onnxruntime" in said


def test_more_threads_than_there_are_cores(refused: Any) -> None:
    most = cores()
    assert refused(target={"engine": "onnxruntime", "threads": most + 1}) == (
        "`target.engine`: `onnxruntime` does not work on this machine: "
        f"`threads` must be at most {most}, the cores that may be used (got {most + 1})"
    )


def test_of_several_numbers_of_threads_those_that_fit_are_measured(tmp_path: Path) -> None:
    target = {"engine": "onnxruntime", "threads": {"choice": [1, cores() + 1]}}
    records = sweep(tmp_path, small_spec({"method": "ptq"}, target=target))
    trials = [record for record in records.values() if record.kind == "trial"]
    assert [record.state for record in trials] == ["complete", "refused"]
    assert "`threads` must be at most" in str(trials[1].failure)
    assert all(record.config["target"]["threads"] == 1 for record in records.values() if record.kind == "baseline")


def test_another_spec_under_the_name_of_a_sweep_that_is_there(refused: Any, tmp_path: Path) -> None:
    before = sweep(tmp_path, small_spec())
    said = refused(search={"trials": 6, "seed": 3})
    assert said.startswith(f"`{tmp_path / 'sweeps' / 'small'}`: holds a sweep of the same name and another spec: ")
    assert "`search.seed` was 0 and is 3" in said
    assert {r.number: r for r in SweepFolder(tmp_path, "small").records()} == before


@pytest.fixture
def real_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real jobs; what they need is imported by the few that run."""
    monkeypatch.setattr("qsweep.study.driver.run", functools.partial(drive, preload=("numpy",)))


def test_data_that_does_not_fit_ends_the_run_with_its_row(refused: Any, real_jobs: None, tmp_path: Path) -> None:
    import pandas
    from PIL import Image

    place = io.BytesIO()
    Image.new("L", (8, 8)).save(place, "PNG")
    for name, labels in (("good", [*range(10)] * 2), ("bad", [*range(10), *range(1, 11)])):
        rows = {"image": [{"bytes": place.getvalue()}] * 20, "label": labels}
        pandas.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    assert refused(task=parquet("bad.parquet")) == "`bad.parquet`, row 19: `label` must be from 0 to 9 (got 10)"
    assert not SweepFolder(tmp_path, "small").records()


def test_a_task_that_gives_nan_ends_the_run(refused: Any, real_jobs: None, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(NAN_TASK)
    task = {"method": "python", "file": "task.py:Task", "trained": True}
    assert refused(task=task) == "`task`: the inputs of `train` must be finite (sample 0 holds NaN or infinity)"


def test_engines_that_do_not_work_here_are_left_out_where_there_is_another(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("qsweep.machine.shutil.which", lambda name: None)  # no compiler
    targets = {"choice": [{"engine": "inductor"}, {"engine": "onnxruntime"}]}
    records = sweep(tmp_path, small_spec({"method": "ptq"}, target=targets))
    trials = [record for record in records.values() if record.kind == "trial"]
    assert [(record.engine, record.state) for record in trials] == [
        ("inductor", "refused"),
        ("onnxruntime", "complete"),
    ]
    assert "C++ compiler" in str(trials[0].failure)
    bf16 = next(record for record in records.values() if record.name == "bf16")
    assert bf16.state == "complete"
    assert bf16.config["target"]["compile"] is False


def test_the_engine_of_a_baseline_that_does_not_work_here(refused: Any) -> None:
    baselines = [{"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "cuda"}}]
    assert refused(baselines=baselines).startswith(
        "`baselines.0.target.engine`: `cuda` does not work on this machine: "
    )


def test_a_spec_may_be_mended_as_long_as_nothing_was_finished(refused: Any, real_jobs: None, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    said = refused(task=images("weights.safetensors"))
    assert "must be a whole safetensors file" in said
    assert len(sweep(tmp_path, small_spec())) == 9  # another spec under the same name


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda good: good[: len(good) // 2], "`train.parquet`: must be a whole Parquet file"),
        (lambda good: b"", "`train.parquet`: must be a whole Parquet file"),
    ],
    ids=["cut", "empty"],
)
def test_a_parquet_file_that_is_not_whole(
    refused: Any, real_jobs: None, tmp_path: Path, make: Callable[[bytes], bytes], said: str
) -> None:
    import pandas

    pandas.DataFrame({"image": [{"bytes": b"x"}] * 20, "label": range(20)}).to_parquet(tmp_path / "good.parquet")
    (tmp_path / "train.parquet").write_bytes(make((tmp_path / "good.parquet").read_bytes()))
    assert refused(task=parquet("train.parquet")).startswith(said)


UNTRACEABLE = (
    NAN_TASK.replace(' * float("nan")', "").replace("nn.Sequential(nn.Flatten(), nn.Linear(64, 10))", "Odd()")
    + """

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
    def forward(self, x):
        return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))
"""
)


def test_a_model_that_cannot_be_traced_ends_the_run(refused: Any, real_jobs: None, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(UNTRACEABLE, encoding="utf-8")
    said = refused(task={"method": "python", "file": "task.py:Task", "training": {"epochs": 1}})
    assert "`torch.export` cannot trace the model" in said


@pytest.mark.parametrize("name", ["spec.json", "trials/0004/record.json"])
def test_a_file_of_the_sweep_that_is_damaged(refused: Any, tmp_path: Path, name: str) -> None:
    sweep(tmp_path, small_spec())
    (tmp_path / "sweeps" / "small" / name).write_text("{")
    assert refused().startswith(f"`{tmp_path / 'sweeps' / 'small' / name}`: cannot be read (")
