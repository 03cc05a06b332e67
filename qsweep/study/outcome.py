"""From what jobs left in a trial's folder to its record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qsweep.errors import NotFinite, Refused, TrialFailure
from qsweep.records import Failure, Metrics, Record, Repetition
from qsweep.space import complaint
from qsweep.spec import Spec
from qsweep.study.folder import read_result
from qsweep.study.pipeline import Evaluation
from qsweep.study.points import Candidate

if TYPE_CHECKING:
    from numpy import ndarray


def record(
    spec: Spec, number: int, candidate: Candidate, evaluation: Evaluation | None, baseline: Record | None
) -> Record:
    """The record of a trial whose evaluation is over; without one, of a candidate that was refused."""
    known = _known(candidate, number)
    if evaluation is None:
        return Record(state="refused", failure=_failed(Refused(candidate.refusal)), **known)
    known["attempts"] = evaluation.attempts
    built = evaluation.results.get("build", {})
    known |= {"kernels": built.get("kernels", ""), "layer_bits": built.get("layer_bits", {})}
    known["machine"] = evaluation.results.get("measure", {}).get("machine", "")
    try:
        known["seconds"] = evaluation.merged("seconds")
        if evaluation.failure:
            return Record(state="failed", failure=evaluation.failure, **known)
        metrics = _metrics(spec, evaluation, baseline)
    except ValidationError as error:
        return Record(state="failed", failure=_failed(NotFinite(complaint(error))), **known | {"seconds": {}})
    if lacking := _lacking(spec, metrics):
        return Record(state="failed", failure=_failed(lacking), **known)
    return Record(state="complete", metrics=metrics, **known)


def _metrics(spec: Spec, evaluation: Evaluation, baseline: Record | None) -> Metrics:
    """Raises ValidationError for NaN, infinity or a name that is no metric."""
    metrics = Metrics.model_validate(evaluation.merged("metrics"))
    if metrics.accuracy is None or metrics.accuracy_drop_pp is not None:
        return metrics
    reference = metrics.accuracy if baseline is None else baseline.metrics.accuracy
    drop = None if reference is None else spec.task.judged_by.scale * (reference - metrics.accuracy)
    return metrics.model_copy(update={"accuracy_drop_pp": drop})


def repetition(spec: Spec, folder: str, round: int, seed: int, evaluation: Evaluation, baseline: Record) -> Repetition:
    """What came of one more evaluation of a config, in the folder of this name."""
    known: dict[str, Any] = {"round": round, "seed": seed, "folder": folder}
    known["kernels"] = evaluation.results.get("build", {}).get("kernels", "")
    if evaluation.failure:
        return Repetition(failure=evaluation.failure, **known)
    try:
        metrics = _metrics(spec, evaluation, baseline)
    except ValidationError as error:
        return Repetition(failure=_failed(NotFinite(complaint(error))), **known)
    lacking = _lacking(spec, metrics)
    return Repetition(failure=_failed(lacking), **known) if lacking else Repetition(metrics=metrics, **known)


def _lacking(spec: Spec, metrics: Metrics) -> TrialFailure | None:
    missing = [name for name in (*spec.objectives, *spec.constraints) if getattr(metrics, name) is None]
    return TrialFailure(f"`{missing[0]}` is an objective or a constraint and was not measured") if missing else None


def duplicate(original: Record, number: int, candidate: Candidate | None = None) -> Record:
    """The record of a trial whose config has been evaluated under another number; its folder is that one's. With
    `candidate`, of another config that has given the same artifact."""
    first = original.number if original.duplicate_of is None else original.duplicate_of
    own: dict[str, Any] = {"number": number, "duplicate_of": first, "front": None, "repetitions": ()}
    return original.model_copy(update=own | (_known(candidate, number) if candidate else {}))


def _known(candidate: Candidate, number: int) -> dict[str, Any]:
    """What is known of a record before anything has run."""
    return {
        "number": number,
        "uid": candidate.uid,
        "name": candidate.name,
        "config": candidate.plain,
        "engine": candidate.engine,
        "folder": f"trials/{number:04d}",
        "simulated": candidate.simulated,
    }


def write_config(folder: Path, candidate: Candidate) -> None:
    """`config.yaml`, for people."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(candidate.plain, sort_keys=False))


def scores(folder: Path) -> ndarray | None:
    """Scores of each validation sample, (N,), if the trial left them whole."""
    import numpy

    try:
        found: ndarray = numpy.load(folder / "scores.npy", allow_pickle=False)
    except (FileNotFoundError, EOFError, ValueError):
        return None
    return found


def forget(folder: Path, jobs: Iterable[str]) -> None:
    """Remove the results of `jobs` and the count of attempts, so that they run again."""
    for name in (*jobs, "job"):
        (folder / f"{name}.json").unlink(missing_ok=True)


def forget_failure(folder: Path, job: str) -> None:
    """Remove the result of `job` if it is a failure: failures are never kept in place of a result."""
    if "failure" in read_result(folder / f"{job}.json"):
        forget(folder, [job])


def _failed(error: TrialFailure) -> Failure:
    return Failure(kind=error.kind, message=str(error))
