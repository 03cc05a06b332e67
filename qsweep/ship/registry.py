"""MLflow's model registry: a chosen trial becomes a version of a model, and comes back by its alias."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from qsweep.errors import SpecError, TrackError
from qsweep.records import Record
from qsweep.ship._package import mlflow_model
from qsweep.ship.select import Selector, best
from qsweep.study.folder import SweepFolder
from qsweep.track import flat
from qsweep.track.bundle import MANIFEST, bundle, recorded, verify
from qsweep.track.client import answering, connect, experiment, impatient, log_all, sqlite_path, tracking_uri
from qsweep.track.ledger import Ledger
from qsweep.track.table import engine_text, place_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_UPLOAD_SECONDS = 120
"""How long a server may take to answer while models are put there or fetched."""
_PUBLISHES = "`qsweep run` publishes it"


class Version(NamedTuple):
    """What a new version is called."""

    name: str
    alias: str


@dataclass(frozen=True)
class Promotion:
    """A version of a registered model."""

    record: Record
    name: str
    version: str
    alias: str
    tracking_uri: str

    @property
    def uri(self) -> str:
        """What `qsweep.load` and MLflow call it."""
        return f"models:/{self.name}@{self.alias}"


def promote(
    source: str | Path, selector: Selector, name: str, alias: str = "champion", uri: str | None = None
) -> Promotion:
    """Register a new version of `name`, with `alias`: the bundle of the best trial of the sweep in the folder `source`,
    or the bundle that `source` is, as `compress` writes it, if it keeps the bounds.

    The version links to the trial's run and carries the spec's hash, the trial's uid, its place on the front and its
    metrics as tags; a bundle gets a run of its own, in the experiment `name`, at `uri` (as for `load`). Raises
    SweepError where no trial fits, TrackError where MLflow does not have the trial.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]*", name) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", alias):
        raise SpecError(f"`--name`, `--alias`: must be letters, digits, `.`, `_`, `-` (got `{name}`, `{alias}`)")
    if re.fullmatch(r"v\d+|latest", alias, re.IGNORECASE):
        raise SpecError(
            f"`--alias`: must be no name that MLflow keeps for itself, such as `v1` or `latest` (got `{alias}`)"
        )
    version, source = Version(name, alias), Path(source)
    if (source / MANIFEST).is_file():
        return _promote_bundle(source, selector, version, tracking_uri(uri, Path.cwd(), "uri"))
    return _promote_trial(SweepFolder.at(source), selector, version)


def _promote_trial(folder: SweepFolder, selector: Selector, version: Version) -> Promotion:
    spec = folder.spec()
    record = best(folder.records(), selector, spec)
    uri = tracking_uri(spec.track.uri, folder.root)
    run_id = _run_of(record, folder.path, uri)
    client = connect(uri)
    with TemporaryDirectory() as place, answering(uri), impatient(_UPLOAD_SECONDS):
        made = bundle(record, folder.path, Path(place) / "bundle")
        tags = {"qsweep.sweep": spec.name, "qsweep.spec": spec.uid()}
        return _registered(client, uri, version, record, made, _existing(client, run_id, record, uri), tags)


def _promote_bundle(made: Path, selector: Selector, version: Version, uri: str) -> Promotion:
    manifest = verify(made)
    record, sweep = best([recorded(made, manifest)], selector), {"qsweep.sweep": manifest.sweep}
    client = connect(uri)
    with answering(uri), impatient(_UPLOAD_SECONDS):
        place = experiment(client, uri, version.name)
        run = client.create_run(place, tags=flat.tags(record) | sweep, run_name=record.name).info.run_id
        log_all(client, run, flat.params(record), flat.metrics(record))
        registered = _registered(client, uri, version, record, made, run, sweep)
        client.set_terminated(run)
        return registered


def _run_of(record: Record, sweep: Path, uri: str) -> str:
    """The id of the run that the sweep has published for `record` at `uri`. Raises TrackError, which says where else it
    is, where it has none."""
    ledger = Ledger(sweep / "published.json", uri)
    run_id = ledger.entry(record.number).get("run_id")
    if run_id is None:
        elsewhere = [f"`{place}`" for place in ledger.places(record.number)]
        there = f"it is at {', '.join(elsewhere)}: set MLFLOW_TRACKING_URI" if elsewhere else _PUBLISHES
        raise TrackError(f"MLflow at `{uri}` must have trial #{record.number} `{record.name}`: {there}")
    return str(run_id)


def _existing(client: MlflowClient, run_id: str, record: Record, uri: str) -> str:
    """`run_id`. Raises TrackError where MLflow has no such run any more."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run_id).info.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        must = f"MLflow at `{uri}` must have trial #{record.number} `{record.name}`"
        raise TrackError(f"{must}, which the sweep has published there: {_PUBLISHES}") from None


def _registered(
    client: MlflowClient, uri: str, version: Version, record: Record, made: Path, run_id: str, sweep: dict[str, str]
) -> Promotion:
    """The new version: the bundle `made`, which is kept among the artifacts of the run."""
    from mlflow.exceptions import MlflowException

    kept = f"model-{uuid4().hex[:8]}"  # a version stays as it is, whatever is made of its trial later
    with TemporaryDirectory() as place:
        client.log_artifacts(run_id, str(mlflow_model(made, Path(place) / "model")), kept)
    try:
        client.create_registered_model(version.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = sweep | {
        "qsweep.number": str(record.number),
        "qsweep.uid": record.uid,
        "qsweep.engine": engine_text(record),
        "qsweep.front": record.front or "no",
        **{key: str(value) for key, value in record.metrics.model_dump(exclude_none=True).items()},
    }
    about = f"`{record.name}` on {place_text(record)}"
    number = client.create_model_version(
        version.name, f"runs:/{run_id}/{kept}", run_id, tags, description=about
    ).version
    client.set_registered_model_alias(version.name, version.alias, str(number))
    return Promotion(record, version.name, str(number), version.alias, uri)


def _version(client: MlflowClient, source: str, uri: str, name: str, alias: str | None, number: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackError(f"`{source}`: must be in the registry `{uri}` ({error.message})") from None


def fetch(source: str, place: Path, uri: str | None = None) -> Path:
    """The bundle of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, in `place` or where it lies on this machine. A
    version that MLflow has copied to another name is the version that it was copied from."""
    found = re.fullmatch(r"models:/([^@/]+)(?:@(.+)|/(\d+))", source)
    if found is None:
        raise SpecError(f"`{source}`: must be `models:/NAME@ALIAS` or `models:/NAME/VERSION`")
    name, alias, number = found.groups()
    uri = tracking_uri(uri, Path.cwd(), "uri")
    if (database := sqlite_path(uri)) is not None and not database.exists():
        raise TrackError(f"`{source}`: there is no registry `{database}`; give its `uri`, or set MLFLOW_TRACKING_URI")
    client = connect(uri)
    with answering(uri), impatient(_UPLOAD_SECONDS):
        version = _version(client, source, uri, name, alias, number)
        if (version.source or "").startswith("models:/"):
            return fetch(str(version.source), place, uri)
        model = re.fullmatch(r"runs:/([^/]+)/(.+)", version.source or "")
        if model is None:
            raise TrackError(
                f"`{source}` at `{uri}`: must be a version that `qsweep promote` made (got `{version.source}`)"
            )
        return Path(client.download_artifacts(model[1], f"{model[2]}/artifacts/bundle", str(place)))
