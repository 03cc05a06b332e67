"""A bundle as a folder that MLflow registers and serves."""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

import qsweep
from qsweep.engines import Engine, EngineConfig
from qsweep.track.bundle import Manifest, verify

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

_NEEDED = ("mlflow", "numpy", "onnx", "onnxruntime", "pydantic", "pyyaml", "safetensors", "torch")


def mlflow_model(made: Path, out: Path) -> Path:
    """The bundle `made` as an MLflow model folder: models-from-code, and qsweep's own code beside it; no pickle."""
    manifest = verify(made)
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
            pip_requirements=_requirements(manifest),
            signature=_signature(manifest),
        )
    return out


def _requirements(manifest: Manifest) -> list[str]:
    """Packages as an index has them: without the local part of a version, such as `+cpu`."""
    adapter: TypeAdapter[EngineConfig] = TypeAdapter(Engine)
    needed = (*_NEEDED, *adapter.validate_python(manifest.engine).packages)
    return [f"{package}=={importlib.metadata.version(package).split('+')[0]}" for package in needed]


def _signature(manifest: Manifest) -> ModelSignature | None:
    import numpy
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from qsweep.tasks._parts import Parts

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
