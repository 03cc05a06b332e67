"""The `cuda` engine: what it refuses and where, its artifacts, and what becomes of a device that breaks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from networks import DIGITS, Noise, context, network
from typer.testing import CliRunner

from qsweep import jobs
from qsweep.cli.main import app
from qsweep.cuda.capture import captured
from qsweep.cuda.device import refusal
from qsweep.engines.cuda import Cuda
from qsweep.engines.float import Float
from qsweep.errors import Refused, SpecError, TaskFailure
from qsweep.executors.local import Local
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import QUANTIZE, aten
from qsweep.hub.nodes import nodes_of
from qsweep.hub.save import load
from qsweep.quantize.ptq import PTQ
from qsweep.records import Failure
from qsweep.spec import Compression, Run, Spec
from qsweep.stage import Context
from qsweep.study import check
from qsweep.study.baselines import baselines
from qsweep.study.pipeline import Evaluation, Pipeline

NO_GPU = not torch.cuda.is_available()
CONTENT = {
    "name": "gpu",
    "task": DIGITS,
    "compress": {"quantize": {"method": "ptq", "weight_bits": {"choice": [4, 8]}}},
    "target": {"engine": "cuda", "batch_size": 32},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def made(root: Path, **fields: Any) -> tuple[QuantizedModel, Context]:
    found = context(root, "mlp")
    return PTQ.model_validate({"calibration_samples": 50} | fields).apply(network("mlp"), found), found


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_loading_is_refused_with_the_reason_and_all_else_works(root: Path, tmp_path: Path) -> None:
    model, found = made(root)
    engine = Cuda(batch_size=2)
    reason = engine.available()
    assert reason is not None
    assert "it needs a" in reason
    engine.lower(model, tmp_path, found.store)
    with pytest.raises(Refused, match="`cuda` engine does not work on this machine: it needs a"):
        engine.load(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(CONTENT))
    for command in (["validate", str(spec)], ["plan", str(spec)], ["doctor"]):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
    assert "engine cuda" in done.output
    with pytest.raises(SpecError, match=r"`target.engine`: `cuda` does not work on this machine: it needs a"):
        check(Spec.model_validate(CONTENT))


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_gpus_without_the_matrix_instructions_are_refused_by_name(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    wanted = f"it needs compute capability 8.0 (Ampere) or newer: Tesla T4 has {capability[0]}.{capability[1]}"
    assert refusal() == wanted
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("qsweep.cuda.device.no_kernels", lambda: None)
    assert refusal() is None


class Uncompiled:
    """A driver of Triton that has just been asked to build what launches kernels."""

    def get_current_target(self) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")


def test_a_gpu_for_which_nothing_can_be_compiled_is_refused_but_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", Uncompiled())
    for reason in (Cuda().available(), Float(device="cuda").available()):
        assert reason is not None
        assert "needs a C compiler (gcc or clang) and Python's headers: Failed to find C compiler." in reason
        assert "More" not in reason
    assert "`compile: false` needs none" in str(Float(device="cuda").available())
    assert Float(device="cuda", compile=False).available() is None


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert "a PyTorch built with CUDA" in str(refusal())
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "a CUDA device (PyTorch finds none)" in str(refusal())
    monkeypatch.setattr("qsweep.cuda.device.find_spec", lambda name: None)
    assert "pip install 'qsweep[cuda]'" in str(refusal())


def test_the_cpu_runs_the_kernels_only_in_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal("cpu") is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert refusal("cpu") == "its kernels need a CUDA device (got `cpu`)"


@pytest.mark.parametrize("quantize", [None, {"method": "cast"}, {"method": "ptq", "activation_mode": "dynamic"}])
def test_what_is_not_integer_is_refused_with_what_runs_it(quantize: Any) -> None:
    reason = Cuda().refuses(Compression.model_validate({"quantize": quantize}))
    assert reason is not None
    assert "`float` runs it on the GPU" in reason


@pytest.mark.parametrize("compiled", [True, False])
def test_fp32_bf16_and_fp16_stand_beside_int8_on_the_same_device(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in (Cuda, Float):
        monkeypatch.setattr(engine, "available", lambda self: None)  # as on a machine with a GPU
    target = {"engine": "cuda", "batch_size": 32, "compile_baselines": compiled}
    found = baselines(Spec.model_validate(CONTENT | {"target": target}))
    assert [config.name for config in found] == ["fp32", "bf16", "fp16", "ptq-w8s-a8a"]
    assert [config.target.engine for config in found] == ["float"] * 3 + ["cuda"]
    assert all(config.target.device == "cuda" and config.target.batch_size == 32 for config in found)
    assert [config.target.compile for config in found[:3]] == [compiled] * 3


@pytest.mark.parametrize("bits", [8, 4])
def test_an_artifact_read_again_gives_the_references_outputs(
    bits: int, root: Path, device: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from qsweep.cuda.chain import Chain

    model, found = made(root, weight_bits=bits)
    engine = Cuda(batch_size=2)
    engine.lower(model, tmp_path, found.store)
    chain = Chain(load(tmp_path), 2, device, {})
    inputs = Noise(2).inputs
    assert torch.equal(chain(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs))
    assert engine.integer_macs(tmp_path, chain, inputs) == 2 * model.macs


@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_a_loaded_artifact_is_tuned_captured_and_equal_to_the_reference(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, found = made(root)
    engine = Cuda(batch_size=2)
    (tmp_path / "artifact").mkdir()
    engine.lower(model, tmp_path / "artifact", found.store)
    inputs = Noise(2).inputs
    for _ in range(2):
        run = engine.load(tmp_path / "artifact")
        for _ in range(2):
            assert torch.equal(run(inputs.cuda()).cpu(), IntegerInterpreter(model.graph)(inputs))
    (tiles,) = (tmp_path / "cache" / "qsweep").glob("tiles-*.json")
    assert len(json.loads(tiles.read_text())) == 2


def test_float_islands_are_there_only_where_the_spec_allows_them(root: Path, tmp_path: Path) -> None:
    model, found = made(root)
    for name in ("integers", "islands"):
        (tmp_path / name).mkdir()
    Cuda(float_islands=False).lower(model, tmp_path / "integers", found.store)
    (rectifier,) = nodes_of(model.graph, {aten.relu.default})
    rectifier.target = aten.erf.default
    with pytest.raises(Refused, match=r"`float_islands: false`: no integer kernel computes aten\.erf\.default$"):
        Cuda(float_islands=False).lower(model, tmp_path / "refused", found.store)
    Cuda().lower(model, tmp_path / "islands", found.store)
    assert not (tmp_path / "refused").exists()


def test_a_scale_of_zero_is_refused_at_lowering(root: Path, tmp_path: Path) -> None:
    model, found = made(root)
    nodes_of(model.graph, {QUANTIZE})[0].update_arg(1, 0.0)
    with pytest.raises(Refused, match=r"the scale of `.*`: must be finite and at least"):
        Cuda().lower(model, tmp_path / "artifact", found.store)
    assert not (tmp_path / "artifact").exists()


def job_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {"target": {"engine": "reference"}}
    content = {"root": str(folder), "task": DIGITS, "config": config, "measure": {}, "seed": 0, "attempt": 1}
    (folder / "job.json").write_text(
        json.dumps(content | {"store": str(folder / "store"), "threads": 1, "baseline": None})
    )
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    executor = Local(("qsweep.jobs",), tmp_path / "server.log")
    yield executor
    executor.shutdown()


def test_a_cuda_error_ends_the_worker_and_the_next_attempt_is_a_new_one(local: Local, tmp_path: Path) -> None:
    folder = job_folder(tmp_path / "trial")
    content = json.loads((folder / "job.json").read_text())
    evaluation = Evaluation(folder, content)
    pipeline = Pipeline(local, "cuda_jobs", Run(attempts=3))
    pipeline.add(evaluation)
    while not pipeline.step():
        pass
    assert (folder / "attempts").read_text() == "xx"  # built by the second
    assert "metrics" in json.loads((folder / "build.json").read_text())
    assert isinstance(evaluation.failure, Failure)
    assert evaluation.failure.kind == "Crashed"
    assert "Triton Error [CUDA]: misaligned address" in evaluation.failure.message
    assert evaluation.attempts == 3
    assert not (folder / "measure.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: torch.AcceleratorError("CUDA error: out of memory"),
        lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
        lambda: RuntimeError("CUDA driver error: out of memory"),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: caused(Refused("the model cannot run on the GPU"), torch.OutOfMemoryError("CUDA out of memory.")),
        lambda: caused(TaskFailure("`task.training.compile`: must be false"), compiling(torch.OutOfMemoryError("no"))),
    ],
)
def test_device_memory_that_runs_out_is_a_result_of_its_own(error: Callable[[], Exception], tmp_path: Path) -> None:
    def run(job: jobs.Job) -> jobs.Result:
        raise error()

    folder = job_folder(tmp_path / "trial")
    jobs._write(folder, "build", run)
    assert json.loads((folder / "build.json").read_text())["failure"]["kind"] == "OutOfMemory"


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        lambda: RuntimeError("CUDA driver error: an illegal memory access was encountered"),
        lambda: caused(TaskFailure("`task.py`, line 3"), torch.AcceleratorError("CUDA error: misaligned address")),
        lambda: caused(Refused("the model cannot run on the GPU"), RuntimeError("Triton Error [CUDA]: launch failure")),
    ],
)
def test_what_breaks_the_device_ends_the_worker(error: Callable[[], Exception], tmp_path: Path) -> None:
    def run(job: jobs.Job) -> jobs.Result:
        raise error()

    folder = job_folder(tmp_path / "trial")
    with pytest.raises(Exception, match=re.escape(str(error()))):
        jobs._write(folder, "build", run)
    assert not (folder / "build.json").exists()


def test_a_gpu_that_pytorch_has_no_kernels_for_is_refused(tmp_path: Path) -> None:
    def run(job: jobs.Job) -> jobs.Result:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")

    folder = job_folder(tmp_path / "trial")
    jobs._write(folder, "measure", run)
    failure = json.loads((folder / "measure.json").read_text())["failure"]
    assert failure["kind"] == "Refused"
    assert "has no kernels for this GPU" in failure["message"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA error: operation not permitted when stream is capturing", Refused),
        ("CUDA error: an illegal memory access was encountered", torch.AcceleratorError),
    ],
)
def test_a_call_that_cannot_be_captured_is_refused(
    said: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(call: Callable[[], object]) -> None:
        raise torch.AcceleratorError(said)

    monkeypatch.setattr("qsweep.cuda.capture.graph_of", capture)
    with pytest.raises(kind, match="CUDA"):
        captured(torch.abs, torch.zeros(2))


@pytest.mark.parametrize(("free", "kind"), [(1, "OutOfMemory"), (50, "TaskFailure")])
def test_cudnn_that_finds_no_engine_may_have_run_out_of_memory(
    free: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 80))

    def run(job: jobs.Job) -> jobs.Result:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    folder = job_folder(tmp_path / "trial")
    jobs._write(folder, "build", run)
    assert json.loads((folder / "build.json").read_text())["failure"]["kind"] == kind


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def compiling(cause: Exception) -> Exception:
    """As the compiler tells of it."""
    found = RuntimeError("backend='inductor' raised")
    found.inner_exception = cause  # type: ignore[attr-defined]
    return found
