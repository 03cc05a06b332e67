"""MLflow's model registry: a chosen trial becomes a version of a model, and comes back by its alias."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import TypeAdapter

import qsweep
from qsweep.engines import Engine, EngineConfig
from qsweep.errors import SpecError, TrackError
from qsweep.records import Record
from qsweep.ship.select import Selector, best
from qsweep.spec import Spec
from qsweep.study.folder import SweepFolder
from qsweep.track.bundle import bundle, verify
from qsweep.track.client import answering, connect, impatient, sqlite_path, tracking_uri
from qsweep.track.ledger import Ledger
from qsweep.track.table import engine_text, place_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

_UPLOAD_SECONDS = 120
"""How long a server may take to answer while models are put there or fetched."""
_PUBLISHES = "`qsweep run` publishes it"
_NEEDED = ("mlflow", "numpy", "onnx", "onnxruntime", "pydantic", "pyyaml", "safetensors", "torch")


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


def promote(sweep: Path, selector: Selector, name: str, alias: str = "champion") -> Promotion:
    """Register the bundle of the best trial of the sweep in folder `sweep` as a new version of `name`, with `alias`.

    The version links to the trial's run and carries the spec's hash, the trial's uid, its place on the front and its
    metrics as tags. Raises SweepError where no trial fits, TrackError where MLflow does not have the trial.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]*", name) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", alias):
        raise SpecError(f"`--name`, `--alias`: must be letters, digits, `.`, `_`, `-` (got `{name}`, `{alias}`)")
    if re.fullmatch(r"v\d+|latest", alias, re.IGNORECASE):
        raise SpecError(
            f"`--alias`: must be no name that MLflow keeps for itself, such as `v1` or `latest` (got `{alias}`)"
        )
    folder = SweepFolder.at(sweep)
    spec = folder.spec()
    record = best(folder.records(), selector, spec)
    uri = tracking_uri(spec.track.uri, folder.root)
    run_id = _run_of(record, folder.path, uri)
    client = connect(uri)
    with TemporaryDirectory() as place:
        model = _save(bundle(record, folder.path, Path(place) / "bundle"), Path(place) / "model")
        with answering(uri), impatient(_UPLOAD_SECONDS):
            kept = f"model-{uuid4().hex[:8]}"  # a version stays as it is, whatever is made of its trial later
            client.log_artifacts(_existing(client, run_id, record, uri), str(model), kept)
            version = _register(client, name, run_id, kept, record, spec)
            client.set_registered_model_alias(name, alias, version)
    return Promotion(record, name, version, alias, uri)


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


def _register(client: MlflowClient, name: str, run_id: str, kept: str, record: Record, spec: Spec) -> str:
    """The new version of `name`: the model that is `kept` among the artifacts of the run."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        "qsweep.sweep": spec.name,
        "qsweep.spec": spec.uid(),
        "qsweep.number": str(record.number),
        "qsweep.uid": record.uid,
        "qsweep.engine": engine_text(record),
        "qsweep.front": record.front or "no",
        **{key: str(value) for key, value in record.metrics.model_dump(exclude_none=True).items()},
    }
    about = f"`{record.name}` on {place_text(record)}"
    made = client.create_model_version(name, f"runs:/{run_id}/{kept}", run_id, tags, description=about)
    return str(made.version)


def _save(made: Path, out: Path) -> Path:
    """The bundle as an MLflow model folder: models-from-code, and qsweep's own code beside it; no pickle."""
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints when it is imported
        from mlflow.pyfunc import save_model

        code = Path(place) / "qsweep"
        shutil.copytree(Path(qsweep.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
        save_model(
            out,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"bundle": str(made)},
            code_paths=[str(code)],
            pip_requirements=_requirements(made),
            signature=_signature(made),
        )
    return out


def _requirements(made: Path) -> list[str]:
    """Packages as an index has them: without the local part of a version, such as `+cpu`."""
    adapter: TypeAdapter[EngineConfig] = TypeAdapter(Engine)
    needed = (*_NEEDED, *adapter.validate_python(verify(made).engine).packages)
    return [f"{package}=={importlib.metadata.version(package).split('+')[0]}" for package in needed]


def _signature(made: Path) -> ModelSignature | None:
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from qsweep.tasks._parts import Parts

    manifest = verify(made)
    if rows := manifest.interface.get("inputs"):
        parts = Parts.read(rows).parts
        names = [part.called("input") if part.path else None for part in parts]
        kinds = [str(part.dtype).removeprefix("torch.") for part in parts]
        given = list(zip(kinds, [part.shape for part in parts], names, strict=True))
    elif (shape := manifest.input.get("shape")) is not None:
        given = [("float32", shape, None)]
    else:
        return None
    return ModelSignature(
        inputs=Schema([TensorSpec(numpy.dtype(kind), (-1, *shape), name) for kind, shape, name in given])
    )


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
