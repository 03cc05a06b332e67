"""A bundle: the folder that ships. Everything to run one trial's artifact and to trust it, and nothing that executes.

Its files:

    config.yaml      the TrialConfig
    metrics.json     what was measured, on which machine; the bits of every layer
    artifact/        the engine's files
    manifest.json    SHA-256 and size of each of these, the engine, the input, the task, versions; format number
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError

from qsweep.config import Config
from qsweep.errors import BundleError
from qsweep.measure.files import digests
from qsweep.records import Record
from qsweep.space import complaint
from qsweep.track.environment import versions

MANIFEST = "manifest.json"
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class File(Config):
    """One file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(Config):
    """What a bundle says of itself. Keys of `files` are paths in it, with `/`."""

    format: Literal[1] = 1
    name: str
    trial: str
    """The record's uid: identity of the config."""
    sweep: str
    number: int
    engine: dict[str, Any]
    """The target of the TrialConfig: which engine loads `artifact/`, and how."""
    input: dict[str, Any] = {}
    """`shape` of one sample and `dtype`, as the model takes them: after the task's preprocessing."""
    interface: dict[str, list[dict[str, Any]]] = {}
    """`inputs` and `outputs` where the model takes or gives several tensors, or whole numbers: `path` (keys and
    places), `shape` of one sample and `dtype` of each; of inputs `below`, the rows of the table that they are looked up
    in, one number or one for each column. The artifact takes and gives one tensor (N, columns) of float32,
    in which they lie side by side."""
    task: dict[str, Any] = {}
    """The task's config, and what it says of its classes and its preprocessing."""
    versions: dict[str, str] = {}
    files: dict[str, File]


def bundle(record: Record, sweep: Path, out: Path) -> Path:
    """Write the bundle of `record` (of the sweep in folder `sweep`) to `out`, which must not exist; returns `out`.

    Raises BundleError where the trial left no artifact, `out` is taken, or the artifact holds a pickle or is not as it
    was built.
    """
    artifact = sweep / record.folder / "artifact"
    if record.state != "complete" or not artifact.is_dir():
        raise BundleError(
            f"`{record.name}` ({record.folder}): must have an artifact to be shipped (it is {record.state})"
        )
    if out.exists():
        raise BundleError(f"`{out}`: must not exist yet")
    _check_as_built(sweep / record.folder)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(artifact, unfinished / "artifact")
        _describe(record, sweep, unfinished)
        if pickled := next(pickles(unfinished), None):
            raise BundleError(
                f"`{artifact}`: must hold no pickle, which executes code when it is loaded (got `{pickled}`)"
            )
        os.replace(unfinished, out)
    except OSError as error:
        raise BundleError(f"`{out}`: cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _check_as_built(folder: Path) -> None:
    """Raises BundleError where a file of the artifact in the trial's `folder` has changed since `build` wrote it."""
    built = read_json(folder / "build.json").get("files")
    if built is None:  # of a version that did not write them, or of `compress`, which builds and bundles at once
        return
    for name, _ in sorted(built.items() ^ digests(folder / "artifact").items()):
        raise BundleError(f"`{folder / 'artifact' / name}`: must be as it was built and measured (it was changed)")


def _describe(record: Record, sweep: Path, folder: Path) -> None:
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(record.config, sort_keys=False), encoding="utf-8")
    measured = record.metrics.model_dump(exclude_none=True)
    about = {"metrics": measured, "seconds": record.seconds, "machine": record.machine, "front": record.front}
    about["layer_bits"] = record.layer_bits
    (folder / "metrics.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    spec, prepared = read_json(sweep / "spec.json"), read_json(sweep / "prepare" / "prepare.json")
    manifest = Manifest(
        name=record.name,
        trial=record.uid,
        sweep=sweep.name,
        number=record.number,
        engine=record.config["target"],
        input=_input(folder / "artifact"),
        interface=prepared.get("interface", {}),
        task=spec.get("spec", spec).get("task", {}) | prepared.get("about", {}),
        versions=versions(),
        files={name: _file(path) for name, path in _walk(folder)},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def verify(folder: Path) -> Manifest:
    """Hold every file of a bundle against its manifest. Raises BundleError that names the first that differs."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(f"`{folder / MANIFEST}`: must be there to load a bundle ({error.strerror})") from None
    except ValidationError as error:
        raise BundleError(f"`{folder / MANIFEST}`: {complaint(error)}") from None
    for name in manifest.files:
        if not _inside(name):
            raise BundleError(f"`{folder / MANIFEST}`: `{name}` must be a path inside of the bundle")
    there = dict(_walk(folder))
    for name in sorted(manifest.files.keys() - there.keys()):
        raise BundleError(f"`{folder / name}`: is in the manifest and missing")
    for name in sorted(there.keys() - manifest.files.keys() - {MANIFEST}):
        raise BundleError(f"`{folder / name}`: is not in the manifest")
    for name, wanted in manifest.files.items():
        found = _file(there[name])
        if found != wanted:
            what = f"{wanted.bytes} bytes" if found.bytes != wanted.bytes else f"SHA-256 {wanted.sha256[:12]}…"
            got = f"{found.bytes} bytes" if found.bytes != wanted.bytes else f"{found.sha256[:12]}…"
            raise BundleError(f"`{folder / name}`: was changed: must have {what} (got {got})")
    return manifest


def recorded(folder: Path, manifest: Manifest) -> Record:
    """The record that the bundle in `folder`, which `verify` gave `manifest` of, was made of, its repetitions left out.
    Raises BundleError."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    known = {"number": manifest.number, "uid": manifest.trial, "name": manifest.name, "state": "complete"}
    about = {"config": config, "engine": manifest.engine["engine"], "folder": str(folder)}
    try:
        return Record.model_validate(known | about | read_json(folder / "metrics.json"))
    except ValidationError as error:
        raise BundleError(f"`{folder / 'metrics.json'}`: {complaint(error)}") from None


def pickles(folder: Path) -> Iterator[str]:
    """Files under `folder`, also inside of zip archives, that are pickles."""
    for name, path in _walk(folder):
        yield from _pickles_in(path.read_bytes(), name)


def _pickles_in(content: bytes, name: str) -> Iterator[str]:
    if content[:2] in _PICKLED and content.rstrip()[-1:] == b".":
        yield name
    elif zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from _pickles_in(archive.read(member), f"{name}!{member}")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path in the bundle, file) in a fixed order. A link is refused: it could lead anywhere."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BundleError(f"`{path}`: must be a file, not a link")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


def _file(path: Path) -> File:
    with path.open("rb") as file:
        return File(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def _input(artifact: Path) -> dict[str, Any]:
    """Shape of one sample, as the artifact's own files tell it."""
    example = read_json(artifact / "graph.json").get("example")
    if isinstance(example, list):
        return {"shape": example[1:], "dtype": "float32"}
    for path in artifact.glob("*.onnx"):
        import onnx

        tensor = onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type
        return {"shape": [dim.dim_value for dim in tensor.shape.dim][1:], "dtype": "float32"}
    return {}
