from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import DIGITS, needs
from torch import nn

from qsweep import jobs

TASK = DIGITS | {"training": {"epochs": 6}}
PTQ = {"quantize": {"method": "ptq", "weight_bits": 6, "calibration_samples": 100}}
QAT = {"quantize": {"method": "qat", "weight_bits": 4, "epochs": 1, "calibration_samples": 100}}
ONNX = {"engine": "onnxruntime", "batch_size": 32}
TASK_FILE = """
import torch
from torch import nn

class Task:
    def __init__(self, fails=""):
        self.fails = fails
    def model(self):
        if self.fails == "trace":
            class Untraceable(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.linear = nn.Linear(64, 10)
                def forward(self, x):
                    return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))
            return Untraceable()
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    def samples(self, split):
        inputs = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        if self.fails == "nan" and split == "train":
            inputs[7, 0, 0, 0] = torch.nan
        return inputs, torch.arange(40) % 10
    def loss(self, outputs, labels):
        if self.fails == "loss":
            raise KeyError("no such class")
        return nn.functional.cross_entropy(outputs, labels)
    def score(self, outputs, labels):
        if self.fails == "score":
            raise RuntimeError("cannot judge")
        return (outputs.argmax(1) == labels).float()
"""
Run = Callable[..., dict[str, Any]]


def written(folder: Path, root: Path, compress: Any = None, target: Any = None, **changes: Any) -> Path:
    """A job's folder with what the driver tells it."""
    folder.mkdir(parents=True)
    content = {
        "root": str(root),
        "task": TASK,
        "config": {"compress": compress or {}, "target": target or ONNX},
        "measure": {"latency_pairs": 10, "latency_seconds": 0.01, "parity_samples": 200},
        "seed": 0,
        "store": str(root / "sweeps" / "store"),
        "baseline": None,
        "threads": 1,
    }
    (folder / "job.json").write_text(json.dumps(content | changes))
    return folder


def did(folder: Path, name: str) -> dict[str, Any]:
    """Run a job and read its result, which is there whatever happened."""
    getattr(jobs, name)(folder)
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    assert ("failure" in result) != ("metrics" in result)
    return result


def metrics(folder: Path, *names: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in names:
        result = did(folder, name)
        assert "failure" not in result, result
        found |= result["metrics"]
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def baseline(root: Path) -> Path:
    """The trial of the uncompressed model: prepared, built and measured."""
    folder = written(root / "fp32", root)
    found = metrics(folder, "prepare", "build", "measure")
    assert found["accuracy_drop_pp"] == 0.0
    assert found["latency_ratio"] == 1.0
    assert found["int8_mac_fraction"] == 0.0
    assert found["accuracy"] > 0.8
    return folder


@pytest.mark.parametrize(
    "target",
    [
        ONNX,
        {"engine": "reference", "batch_size": 100},
        {"engine": "executorch", "batch_size": 32},
        {"engine": "litert", "batch_size": 32},
        {"engine": "openvino", "batch_size": 32},
    ],
    ids=lambda target: str(target["engine"]),
)
def test_a_config_is_prepared_built_measured_and_tested(
    target: dict[str, Any], root: Path, baseline: Path, tmp_path: Path
) -> None:
    needs(target["engine"])
    folder = written(tmp_path / "trial", root, PTQ, target, baseline=str(baseline))
    found = metrics(folder, "build", "measure", "test")
    assert found["accuracy_drop_pp"] < 3
    assert found["parity_top1"] >= 0.99
    assert found["int8_mac_fraction"] == 1.0
    assert found["accuracy_test"] > 0.8
    assert found["latency_low_ms"] <= found["latency_ms"] <= found["latency_high_ms"]
    assert found["size_theoretical_bytes"] < found["size_bytes"]
    assert found["size_bytes"] == sum(path.stat().st_size for path in (folder / "artifact").iterdir())
    scores = np.load(folder / "scores.npy")
    assert scores.shape == (360,)
    assert scores.mean() == pytest.approx(found["accuracy"])
    assert not list(folder.rglob("*.unfinished"))


def test_the_bits_that_were_chosen_by_layer_are_in_the_result(root: Path, baseline: Path, tmp_path: Path) -> None:
    mixed = {"method": "mixed", "average_bits": 4, "edge_bits": 8, "calibration_samples": 60}
    target = {"engine": "reference", "batch_size": 100}
    folder = written(tmp_path / "trial", root, {"quantize": mixed}, target, baseline=str(baseline))
    bits = did(folder, "build")["layer_bits"]
    content = json.loads((folder / "artifact" / "graph.json").read_text())
    assert {width for width, _ in content["packed"].values()} == set(bits.values()) - {8}
    assert [name for name, width in bits.items() if width == 8][:1] == ["stem.conv.weight"]
    assert len(set(bits.values())) > 1


def test_a_config_is_built_and_measured_on_inductor(root: Path, baseline: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "trial", root, PTQ, {"engine": "inductor", "batch_size": 32}, baseline=str(baseline))
    found = metrics(folder, "build", "measure")
    assert found["parity_top1"] >= 0.99
    assert found["int8_mac_fraction"] >= 0.95


@pytest.mark.parametrize("compress", [PTQ, QAT], ids=["ptq", "qat"])
def test_the_same_config_and_seed_in_two_stores_give_the_same_weights_and_accuracy(
    compress: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for name in ("one", "two"):
        folder = written(tmp_path / name / "trial", tmp_path / name, compress)
        accuracy = metrics(folder, "build", "measure")["accuracy"]
        found.append((accuracy, (folder / "artifact" / "weights.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("fails", "job", "kind", "text"),
    [
        ("loss", "prepare", "TaskFailure", "KeyError"),
        ("score", "prepare", "TaskFailure", "cannot judge"),
        ("trace", "prepare", "ExportFailure", "`torch.export` cannot trace the model"),
        ("trace", "build", "ExportFailure", "`torch.export` cannot trace the model"),
        ("score", "build", "TaskFailure", "cannot judge"),
    ],
)
def test_what_the_users_task_does_wrong_is_a_result(fails: str, job: str, kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK_FILE)
    task = {"method": "python", "file": "task.py:Task", "arguments": {"fails": fails}, "trained": True}
    failure = did(written(tmp_path / "trial", tmp_path, PTQ, task=task), job)["failure"]
    assert failure["kind"] == kind
    assert text in failure["message"]


@pytest.mark.parametrize("fails", ["score", "trace"])
def test_what_is_wrong_with_a_task_is_told_before_its_model_is_trained(fails: str, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK_FILE)
    arguments = {"arguments": {"fails": fails}, "training": {"epochs": 1}}
    task = {"method": "python", "file": "task.py:Task"} | arguments
    assert "failure" in did(written(tmp_path / "trial", tmp_path, PTQ, task=task), "prepare")
    assert not list(tmp_path.rglob("weights.safetensors"))


def test_a_config_that_bad_samples_or_a_diverging_training_break_is_a_result_and_others_are_built(
    tmp_path: Path,
) -> None:
    (tmp_path / "task.py").write_text(TASK_FILE)

    def built(name: str, fails: str, quantize: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
        task = {"method": "python", "file": "task.py:Task", "arguments": {"fails": fails}, "trained": True}
        return did(written(tmp_path / name, tmp_path, {"quantize": quantize}, target, task=task), "build")

    alone, floating = {"method": "ptq", "activation_bits": None}, {"engine": "float", "compile": False}
    failures = [
        built("static", "nan", {"method": "ptq"}, ONNX)["failure"],
        built("diverging", "", {"method": "lsq", "learning_rate": 1e30, "epochs": 3}, ONNX)["failure"],
    ]
    assert [failure["kind"] for failure in failures] == ["NotFinite"] * 2
    assert "an activation is NaN or infinite on the calibration samples" in failures[0]["message"]
    assert "finite" in failures[1]["message"]
    assert built("weights alone", "nan", alone, floating)["metrics"]["accuracy_simulated"] >= 0


def test_a_config_that_the_engine_cannot_load_is_a_result(root: Path, baseline: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "trial", root, PTQ, baseline=str(baseline))
    metrics(folder, "build")
    path = folder / "artifact" / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])
    assert did(folder, "measure")["failure"]["kind"] == "BundleError"


def test_an_artifact_that_disagrees_with_its_simulation_is_a_result(root: Path, baseline: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = written(tmp_path / "trial", root, PTQ, baseline=str(baseline))
    metrics(folder, "build")
    simulated = load_file(folder / jobs.SIMULATED)["outputs"]
    save_file({"outputs": simulated.roll(1, 1)}, folder / jobs.SIMULATED)
    failure = did(folder, "measure")["failure"]
    assert failure["kind"] == "ParityFailure"
    assert "artifact and simulation must agree" in failure["message"]


def test_sums_that_could_leave_int32_are_a_result(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        TASK_FILE.replace("nn.Linear(64, 10)", "nn.Linear(90_000, 10)")
        .replace("1, 8, 8", "1, 300, 300")
        .replace("return nn.Sequential", "model = nn.Sequential")
        .replace("    def samples", "        nn.init.ones_(model[1].weight)\n        return model\n    def samples")
    )
    task = {"method": "python", "file": "task.py:Task", "trained": True}
    compress = {"quantize": {"method": "ptq", "calibration_samples": 10}}
    failure = did(written(tmp_path / "trial", tmp_path, compress, task=task), "build")["failure"]
    assert failure["kind"] == "Refused"
    assert "int32 accumulator" in failure["message"]
    assert not list((tmp_path / "trial").rglob("artifact*"))


def test_a_full_disk_is_a_result(root: Path, baseline: Path, tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("`unshare` gives a small disk of one's own")
    template = written(tmp_path / "template", root, PTQ, baseline=str(baseline)) / "job.json"
    mount, out = tmp_path / "disk", tmp_path / "out.json"
    mount.mkdir()
    script = f"""
        mount -t tmpfs -o size=48k tmpfs {mount} || exit 77
        cp {template} {mount}/job.json
        {sys.executable} -c 'from pathlib import Path; from qsweep import jobs; jobs.build(Path("{mount}"))' || exit 1
        cp {mount}/build.json {out}
    """
    done = subprocess.run([unshare, "-Urm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this system gives no disk of one's own")
    assert done.returncode == 0, done.stderr
    failure = json.loads(out.read_text())["failure"]
    assert failure["kind"] == "DiskFull"
    assert "no space left" in failure["message"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "OutOfMemory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "OutOfMemory"),
        (ZeroDivisionError("division by zero"), "TaskFailure"),
    ],
)
def test_whatever_is_raised_becomes_a_result(error: Exception, kind: str, root: Path, tmp_path: Path) -> None:
    def run(job: jobs.Job) -> jobs.Result:
        raise error

    folder = written(tmp_path / "trial", root)
    jobs._write(folder, "build", run)
    assert json.loads((folder / "build.json").read_text())["failure"]["kind"] == kind


def test_a_job_tells_what_it_is_doing(root: Path, baseline: Path) -> None:
    assert (baseline / "progress.txt").read_text() == "latency"
    assert torch.get_num_threads() == 1


def test_weights_that_changed_since_the_sweep_began_are_not_compressed(tmp_path: Path) -> None:
    loaded = "torch.load(__file__ + '.pt', weights_only=False)"
    (tmp_path / "task.py").write_text(TASK_FILE.replace("nn.Sequential(nn.Flatten(), nn.Linear(64, 10))", loaded))
    task = {"method": "python", "file": "task.py:Task", "trained": True}
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(model, tmp_path / "task.py.pt")
    key = did(written(tmp_path / "trial", tmp_path, PTQ, task=task), "prepare")["model"]
    assert "metrics" in did(written(tmp_path / "same", tmp_path, PTQ, task=task, model=key), "build")
    with torch.no_grad():
        model[1].bias[0] += 1e-3
    torch.save(model, tmp_path / "task.py.pt")
    failed = did(written(tmp_path / "other", tmp_path, PTQ, task=task, model=key), "build")["failure"]
    assert (failed["kind"], "sweep began with" in failed["message"]) == ("TaskChanged", True)


def test_another_draw_calibrates_anew_on_the_same_baseline(root: Path, baseline: Path, tmp_path: Path) -> None:
    def grids(draw: int) -> str:
        quantize, target = PTQ["quantize"] | {"calibration_samples": 20}, {"engine": "reference", "batch_size": 100}
        folder = written(tmp_path / str(draw), root, {"quantize": quantize}, target, baseline=str(baseline), draw=draw)
        assert "failure" not in did(folder, "build")
        return (folder / "artifact" / "graph.json").read_text()

    trained = set((root / "sweeps/store").rglob("weights.safetensors"))
    assert trained
    assert grids(0) != grids(1_000_003)
    assert set((root / "sweeps/store").rglob("weights.safetensors")) == trained
