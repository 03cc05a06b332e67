"""A config that was found once, applied to another checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qsweep.errors import BundleError, Refused, SpecError
from qsweep.records import Metrics, Record
from qsweep.ship.model import LoadedModel, temporary
from qsweep.ship.registry import fetch
from qsweep.space import complaint
from qsweep.spec import Measure, TrialConfig
from qsweep.tasks import ACCURACY, Task, TaskMetric, Training
from qsweep.track.bundle import MANIFEST, bundle, read_json, verify
from qsweep.yamlfile import read_mapping

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


def compress(
    model: nn.Module,
    config: TrialConfig | Mapping[str, Any] | str | Path,
    task: object,
    out: str | Path | None = None,
    *,
    training: Training | None = None,
    seed: int = 0,
    uri: str | None = None,
) -> LoadedModel:
    """`model` compressed as `config` says, deployed and loaded; with `out`, its bundle is written to that new folder.

    `config` is a TrialConfig, the same as plain data, a `config.yaml`, the folder of a bundle or of a trial, or a
    registered bundle such as `models:/NAME@champion` (at `uri`, as for `load`). `task`, an object with the methods of
    `qsweep.Task`, gives the data; its own model is not looked at, and `model` is not changed. What a config leaves to
    the model, such as the bits by layer of `mixed`, is chosen for `model` anew. `training` holds the settings of
    fine-tuning that a spec's task has, by default those of the bundle or the sweep, on the CPU where there is no GPU.
    What came of it is in `metrics` of the model; `promote` registers the bundle, if it keeps the bounds it is given.
    Raises SpecError for a config that is none, BundleError where `out` is taken, and the TrialFailure of what goes
    wrong; ParityFailure if the artifact disagrees with its simulation.
    """
    from torch import nn

    from qsweep.tasks._user import guarded

    asked, kept, judged_by = asked_for(config, uri)
    if kept.unavailable() is not None:
        kept = kept.model_copy(update={"device": "cpu"})
    settings, guarded_task = training or kept, guarded(task)
    if not isinstance(model, nn.Module):
        raise Refused(f"`model`: must be a torch.nn.Module (got {type(model).__name__})")
    reason = settings.unavailable() or asked.target.available() or asked.target.refuses(asked.compress)
    if reason is not None:
        raise Refused(f"`{asked.name}`: {reason}")
    if out is not None and Path(out).exists():
        raise BundleError(f"`{out}`: must not exist yet")
    with TemporaryDirectory() as place:
        sweep = Path(place) / "compress"
        record = _built(model, asked, guarded_task, sweep, settings, judged_by, seed)
        if out is not None:
            return LoadedModel(bundle(record, sweep, Path(out)))
        return temporary(lambda folder: bundle(record, sweep, folder / "bundle"))


def asked_for(
    source: TrialConfig | Mapping[str, Any] | str | Path, uri: str | None
) -> tuple[TrialConfig, Training, TaskMetric]:
    """The config that `source` is or names, and of the task that its bundle was made with the settings of training and
    the metric; `uri` is MLflow's. Raises SpecError."""
    if isinstance(source, TrialConfig):
        return source, Training(), ACCURACY
    if str(source).startswith("models:/"):
        with TemporaryDirectory() as place:
            return asked_for(fetch(str(source), Path(place), uri), None)
    content: Any = source
    task: dict[str, Any] = {}
    if not isinstance(source, Mapping):
        path = Path(source)
        if (path / MANIFEST).is_file():
            task = verify(path).task
        elif path.is_dir():  # of a trial in its sweep
            task = read_json(path.resolve().parents[1] / "spec.json").get("spec", {}).get("task", {})
        content = read_mapping(path / "config.yaml" if path.is_dir() else path)
    try:
        training, metric = Training.model_validate(task.get("training", {})), task.get("metric", {})
        return TrialConfig.model_validate(content), training, TaskMetric.model_validate(metric)
    except ValidationError as error:
        raise SpecError(complaint(error, content=content)) from None


def _built(
    model: nn.Module,
    config: TrialConfig,
    task: Task,
    sweep: Path,
    training: Training,
    judged_by: TaskMetric,
    seed: int,
) -> Record:
    """The record of `config` on `model`, its artifact in the folder of the throw-away sweep `sweep`."""
    from qsweep import build
    from qsweep.check import check
    from qsweep.hub.export import float_graph
    from qsweep.hub.tables import with_tables
    from qsweep.machine import fingerprint
    from qsweep.stage import Context
    from qsweep.store import Store
    from qsweep.tasks._user import UserTask

    original = copy.deepcopy(model).eval()
    if isinstance(task, UserTask):
        original = task.whole(original)
    check(task, original)
    clock, store = build.Clock(), Store(sweep.parent / "store")
    context = Context(
        task=task,
        store=store,  # lives as long as this call, so the key needs to tell nothing apart
        key="compress",
        seed=seed,
        original=lambda: original,
        training=training,
    )
    quantized = build.compress(config.compress, copy.deepcopy(original), context, clock)
    artifact = sweep / "trials" / "0000" / "artifact"
    artifact.parent.mkdir(parents=True)
    if isinstance(task, UserTask):
        (sweep / "prepare").mkdir()
        interface = with_tables(task.interface, float_graph(original, context))
        (sweep / "prepare" / "prepare.json").write_text(json.dumps({"interface": interface}), encoding="utf-8")
    kept = {"task": {"training": training.model_dump(mode="json"), "metric": judged_by.model_dump(mode="json")}}
    (sweep / "spec.json").write_text(json.dumps(kept), encoding="utf-8")  # for the manifest
    build.lower(quantized, config, artifact, store)
    return Record(
        number=0,
        uid=config.uid(),
        name=config.name,
        state="complete",
        config=config.model_dump(mode="json"),
        engine=config.target.engine,
        metrics=_measured(quantized, original, config, task, judged_by, artifact),
        seconds=clock.seconds,
        folder="trials/0000",
        layer_bits=quantized.layer_bits(),
        machine=fingerprint(config.target.device),
    )


def _measured(
    quantized: QuantizedModel,
    original: nn.Module,
    config: TrialConfig,
    task: Task,
    judged_by: TaskMetric,
    artifact: Path,
) -> Metrics:
    """Accuracy of the artifact as deployed and what it has lost to `original`, as PyTorch runs that; its agreement with
    the simulation, and its sizes."""
    from qsweep.evaluate import accuracy, accuracy_of_part, predict
    from qsweep.hub.simulate import simulation
    from qsweep.measure.deployed import outputs, parity
    from qsweep.measure.files import file_sizes
    from qsweep.measure.sizes import work
    from qsweep.tasks._user import parts_of

    settings = Measure()
    inputs, labels = task.samples("validation")
    target = config.target
    deployed = outputs(target.load(artifact), task, "validation", target.batch_size, device=target.device)
    together = target.batch_size if quantized.dynamic else 256
    simulated = predict(simulation(quantized), task, inputs[: settings.parity_samples], together)
    first = labels[: len(simulated)]
    found = parity(deployed[: len(simulated)], simulated, first, settings, parts_of(task, "outputs"))
    found["accuracy"] = accuracy(task, deployed, labels)
    whole = accuracy(task, predict(original, task, inputs), labels)
    found["accuracy_drop_pp"] = judged_by.scale * (whole - found["accuracy"])
    part = accuracy_of_part(task, simulated, first)
    metrics = found | {"accuracy_simulated": part} | work(quantized) | file_sizes(artifact)
    return Metrics.model_validate(metrics)
