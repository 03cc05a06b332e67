"""What worker processes run: `prepare`, `build`, `measure`, `test`. The contract is in docs/architecture.md."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from qsweep import alone
from qsweep.build import Clock, compress, context_of, lower
from qsweep.check import check, doubts_of_teacher
from qsweep.config import content_hash
from qsweep.errors import Crashed, Refused, TaskChanged
from qsweep.evaluate import accuracy, accuracy_of_part, judged, predict
from qsweep.failures import known
from qsweep.hub.export import example_of, export, float_graph
from qsweep.hub.save import structure
from qsweep.hub.simulate import simulation
from qsweep.hub.tables import with_tables
from qsweep.machine import fingerprint, pin, use_gpu
from qsweep.measure import gpu
from qsweep.measure.deployed import outputs, parity
from qsweep.measure.files import digests, file_sizes
from qsweep.measure.latency import latency
from qsweep.measure.memory import PeakMemory
from qsweep.measure.sizes import work
from qsweep.spec import Measure, TrialConfig
from qsweep.splits import doubts
from qsweep.stage import own_teacher
from qsweep.store import Store
from qsweep.tasks import AnyTask, Task, TaskConfig
from qsweep.tasks._seen import Seen
from qsweep.tasks._user import UserTask, parts_of
from qsweep.tasks.base import SplitName
from qsweep.train import seeded

SIMULATED = "simulated.safetensors"
"""What the simulation gives on the parity samples, from `build` to `measure`."""

_ROOM = 4096
"""Bytes taken for the result before anything else is written, so that it can be told that the disk is full."""

Result = dict[str, Any]


class Job:
    """The content of `job.json`, made real."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "job.json").read_text())
        self.folder, self.root, self.seed = folder, Path(content["root"]), int(content["seed"])
        self.draw = int(content.get("draw", self.seed))  # of the stages; a repetition has another
        self.task_config: TaskConfig = TypeAdapter(AnyTask).validate_python(content["task"])
        self.config = TrialConfig.model_validate(content["config"])
        self.measure = Measure.model_validate(content["measure"])
        self.store = Store(Path(content["store"]))
        self.baseline = Path(content["baseline"]) if content["baseline"] else None
        self.model: str | None = content.get("model")  # the key of what the sweep began with
        self.interface: dict[str, Any] = content.get("interface") or {}  # what `prepare` has found the model to take
        self.samples: dict[SplitName, Seen] = content.get("samples") or {}  # what it has seen of them
        self.place = int(content.get("place", 0))  # among the workers, no two of which have the same
        self.clock = Clock()
        torch.set_num_threads(content["threads"])

    def task(self) -> Task:
        task = self.task_config.open(self.root)
        if isinstance(task, UserTask):
            task.tell(self.interface, self.samples)
        return task

    def progress(self, text: str) -> None:
        """Say what it is doing now, and keep it in its log."""
        print(text, flush=True)
        (self.folder / "progress.txt").write_text(text)

    def alone(self, text: str) -> None:
        """Wait until nothing else of the sweep runs on this host: threads of two jobs on one core wait for each other,
        and latency would be that of both."""
        self.progress("wait for the others")
        alone.ask(self.folder)
        self.progress(text)

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"


def prepare(folder: Path) -> None:
    """Open the task, see that it can be asked and its model traced, and train the baseline if it has no weights."""
    _write(folder, "prepare", _prepare)


def build(folder: Path) -> None:
    """Compress the model and write its artifact."""
    _write(folder, "build", _build)


def measure(folder: Path) -> None:
    """Load the artifact in this fresh process; then, alone, accuracy, parity, latency, memory."""
    _write(folder, "measure", _measure)


def test(folder: Path) -> None:
    """Accuracy on the test split."""
    _write(folder, "test", _test)


def _prepare(job: Job) -> Result:
    task = job.task()
    context = context_of(job.task_config, task, job.root, job.store, job.seed, job.progress)
    job.progress("check")
    if not job.task_config.pretrained:  # what is wrong with it, or cannot be traced, is told before it is trained
        with seeded(job.seed, torch.device("cpu")):
            untrained = task.model()
        warned = check(task, untrained)
        export(untrained, example_of(context))
    with job.clock("baseline"):
        model = context.original()
    if job.task_config.pretrained:
        warned = check(task, model)
    with job.clock("export"):
        graph = float_graph(model, context)
        metrics = work(graph)
    about = job.task_config.about(job.root)
    return {
        "metrics": metrics,
        "seconds": job.clock.seconds,
        "model": context.key,
        "own_teacher": own_teacher(task) is not None,
        "about": about,
        "interface": with_tables(task.interface, graph) if isinstance(task, UserTask) else {},
        "samples": task.seen if isinstance(task, UserTask) else {},
        "doubts": [
            *filter(None, [job.task_config.doubt]),
            *warned,
            *doubts_of_teacher(task, model),
            *doubts(task, job.task_config.judged_by),
        ],
    }


def _build(job: Job) -> Result:
    use_gpu(job.place)
    task = job.task()
    context = context_of(job.task_config, task, job.root, job.store, job.seed, job.progress)
    if job.model not in (None, context.key):
        raise TaskChanged(
            "code and files of the task, and the weights that `model()` and `teacher()` give, must be those that the "
            "sweep began with (some have changed since)"
        )
    context = replace(context, seed=job.draw)  # the model that is compressed stays the same
    model = compress(job.config.compress, copy.deepcopy(context.original()), context, job.clock)
    job.progress("simulate")
    with job.clock("simulate"):
        samples = task.samples("validation")
        stored, labels = (part[: job.measure.parity_samples] for part in samples)
        together = job.config.target.batch_size if model.dynamic else 256
        simulated = predict(simulation(model), task, stored, together)
        metrics = {"accuracy_simulated": accuracy_of_part(task, simulated, labels)}
    save_file({"outputs": simulated.contiguous()}, job.folder / SIMULATED)
    job.progress("lower")
    with job.clock("lower"):
        lower(model, job.config, job.artifact, job.store)
    metrics |= work(model) | file_sizes(job.artifact)
    kernels = content_hash([structure(model, widths=True), job.config.target.uid()])
    about = {"kernels": kernels, "layer_bits": model.layer_bits(), "files": digests(job.artifact)}
    return {"metrics": metrics, "seconds": job.clock.seconds} | about


def _measure(job: Job) -> Result:
    task, engine = job.task(), job.config.target
    torch.set_num_threads(1)  # engines that are PyTorch set theirs; beside another runtime its threads only disturb
    inputs = task.transform(task.samples("validation").inputs[: engine.batch_size]).float().contiguous()
    inputs = inputs.repeat(-(-engine.batch_size // len(inputs)), *[1] * (inputs.dim() - 1))[: engine.batch_size]
    job.progress("load")
    if (reason := engine.available()) is not None:
        raise Refused(reason)
    devices = {engine.device} if job.baseline is None else {engine.device, _config_of(job.baseline).target.device}
    if "cuda" in devices:  # kernels are chosen by timing them, on the one GPU that all workers share
        job.alone("load")
    inputs = inputs.to(engine.device)
    memory, device_memory = PeakMemory(), gpu.DeviceMemory() if inputs.is_cuda else None
    with job.clock("load"):
        run = engine.load(job.artifact)
        run(inputs)
    metrics: dict[str, float] = {}
    if (peak := memory.bytes()) is not None:
        metrics["peak_memory_bytes"] = peak
    if device_memory is not None:
        metrics["peak_device_memory_bytes"] = device_memory.bytes(partial(run, inputs))
    with job.clock("load"):
        built = json.loads((job.folder / "build.json").read_text())
        all_macs = len(inputs) * built["metrics"]["macs"]
        metrics["int8_mac_fraction"] = engine.integer_macs(job.artifact, run, inputs) / max(1, all_macs)
        other = _baseline_runner(job)
    job.alone("accuracy")
    pin(engine.threads)
    with job.clock("accuracy"):
        deployed = outputs(run, task, "validation", engine.batch_size, device=engine.device)
        labels = task.samples("validation").labels
        scores = judged(task, deployed, labels)
        np.save(job.folder / "scores.npy", scores.numpy())
        metrics["accuracy"] = scores.mean().item()
    simulated = load_file(job.folder / SIMULATED)["outputs"]
    first = labels[: len(simulated)]
    metrics |= parity(deployed[: len(simulated)], simulated, first, job.measure, parts_of(task, "outputs"))
    metrics["accuracy_drop_pp"] = _drop(job, metrics["accuracy"])
    job.progress("latency")
    with job.clock("latency"):
        metrics |= latency(run, other, inputs, job.measure)
    if inputs.is_cuda:
        with job.clock("energy"):
            metrics |= gpu.energy(partial(run, inputs), len(inputs))
    return {"metrics": metrics, "seconds": job.clock.seconds, "machine": fingerprint(engine.device)}


def _test(job: Job) -> Result:
    task, engine = job.task(), job.config.target
    if engine.device == "cuda":
        job.alone("load")
    run = engine.load(job.artifact)
    labels = task.samples("test").labels
    job.alone("test")
    found = outputs(run, task, "test", engine.batch_size, device=engine.device)
    metrics = {"accuracy_test": accuracy(task, found, labels)}
    return {"metrics": metrics, "seconds": job.clock.seconds}


def _drop(job: Job, accuracy: float) -> float:
    if job.baseline is None or job.baseline == job.folder:
        return 0.0
    content = json.loads((job.baseline / "measure.json").read_text())
    return job.task_config.judged_by.scale * (float(content["metrics"]["accuracy"]) - accuracy)


def _baseline_runner(job: Job) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if job.baseline is None or job.baseline == job.folder:
        return None
    own = job.config.target
    engine = _config_of(job.baseline).target.model_copy(update={"batch_size": own.batch_size, "threads": own.threads})
    run = engine.load(job.baseline / "artifact")
    if engine.device == own.device:
        return run
    elsewhere = cache(lambda inputs: inputs.to(engine.device))  # copied once, so that copying is not timed

    def call(inputs: torch.Tensor) -> torch.Tensor:
        found = run(elsewhere(inputs))
        if found.is_cuda:  # timed by the clock of the CPU, for which it is over when it has been launched
            torch.cuda.synchronize()
        return found

    return call


def _config_of(folder: Path) -> TrialConfig:
    return TrialConfig.model_validate(json.loads((folder / "job.json").read_text())["config"])


def _write(folder: Path, name: str, run: Callable[[Job], Result]) -> None:
    """Run one job and write its result, a failure that qsweep knows included. The trial boundary."""
    result: dict[str, Any]
    unfinished = folder / f"{name}.unfinished"
    unfinished.write_bytes(bytes(_ROOM))
    try:
        result = dict(run(Job(folder)))
    except Exception as error:  # whatever a config or a user's task does, the sweep goes on and the record says why
        failed = known(error)
        if isinstance(failed, Crashed):
            raise  # what this process does next on the device fails too: it has to end
        result = {"failure": {"kind": type(failed).__name__, "message": str(failed)}}
        if failed is not error:
            import traceback

            traceback.print_exc()
    with unfinished.open("r+") as file:
        file.write(json.dumps(result, indent=1))
        file.truncate()
    os.replace(unfinished, folder / f"{name}.json")
