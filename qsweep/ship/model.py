"""A bundle made ready to run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import finalize

from pydantic import TypeAdapter, ValidationError

from qsweep.engines import Engine, EngineConfig, Runner
from qsweep.errors import BundleError, DataError
from qsweep.records import Metrics
from qsweep.space import complaint
from qsweep.track.bundle import Manifest, read_json, verify

if TYPE_CHECKING:
    from torch import Tensor


class LoadedModel:
    """The deployed model: call it on a float32 tensor or array (N, ...), preprocessed as the task does.

    A model of several inputs takes them in a dict or a tuple, as its task gives them, and several outputs come so
    (`manifest.interface`). Any N: the engine runs at the batch size it was measured at, the last batch is filled up.
    Calls of several threads take turns.
    Inputs may be on any device; outputs are on the CPU. Engines that are PyTorch run on as many threads as the target
    has, and set that for the process.
    """

    def __init__(self, folder: Path) -> None:
        """Load the bundle in `folder`, which must stay: runtimes may map its files."""
        from qsweep.ship._interface import Interface

        self.manifest = verify(folder)
        self._folder = folder
        engine = engine_of(self.manifest, folder)
        self._runner: Runner = engine.load(folder / "artifact")
        self._batch_size, self._device = engine.batch_size, engine.device
        self._interface = Interface(self.manifest.interface)
        self._turn = Lock()  # engines have one place for inputs and outputs

    @property
    def metrics(self) -> Metrics:
        """Those of its trial; a model of `compress` has accuracy, agreement with the simulation and sizes."""
        return Metrics.model_validate(read_json(self._folder / "metrics.json").get("metrics", {}))

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs: tensors for tensors, else arrays. Raises DataError where shape or type do not fit, and
        for NaN: integers know none, so it would come out as some class or other."""
        from qsweep.ship._interface import has_tensors

        outputs = self._run(self._interface.joined(inputs))
        return self._interface.shown(outputs, arrays=not has_tensors(inputs))

    def _run(self, inputs: Tensor) -> Tensor:
        import torch

        self._check(inputs)
        size, count = self._batch_size, len(inputs)
        filler = inputs[-1:] if count else torch.zeros(1, *inputs.shape[1:], device=inputs.device)
        missing = -count % size if count else size
        padded = torch.cat([inputs, filler.expand(missing, *inputs.shape[1:])]).to(torch.float32).contiguous()
        with self._turn, torch.no_grad():  # as it was compiled: for `inference_mode` it would be once more
            batches = torch.split(padded.to(self._device), size)
            outputs = [self._runner(batch).to("cpu", copy=True) for batch in batches]  # the next call may overwrite it
        return torch.cat(outputs)[:count].clone()

    def _check(self, inputs: Tensor) -> None:
        shape, wanted = list(inputs.shape), self.manifest.input.get("shape")
        if wanted is not None and shape[1:] != wanted:
            raise DataError(f"inputs must have the shape {['N', *wanted]} (got {shape})")
        if not inputs.is_floating_point():
            raise DataError(f"inputs must be float32, preprocessed as the task does (got {inputs.dtype})")
        missing = inputs[..., None].isnan().flatten(1).any(1)
        if missing.any():
            raise DataError(f"inputs must not hold NaN (sample {int(missing.int().argmax())} does)")

    def __repr__(self) -> str:
        return f"LoadedModel({self.manifest.name} on {self.manifest.engine.get('engine')})"


def load(source: str | Path, uri: str | None = None) -> LoadedModel:
    """A bundle's model, verified and ready: a folder, or `models:/NAME@ALIAS`, `models:/NAME/VERSION`.

    `uri` is MLflow's, for the latter: by default `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working directory.
    Raises BundleError where the bundle is incomplete or changed, TrackError where the registry has none.
    """
    if str(source).startswith("models:/"):
        from qsweep.ship.registry import fetch

        return temporary(lambda folder: fetch(str(source), folder, uri))
    return LoadedModel(Path(source))


def temporary(make: Callable[[Path], Path]) -> LoadedModel:
    """The model of the bundle that `make` puts in a new folder, which goes when the model does."""
    place = mkdtemp(prefix="qsweep-")
    try:
        model = LoadedModel(make(Path(place)))
    except BaseException:
        shutil.rmtree(place)
        raise
    finalize(model, shutil.rmtree, place, ignore_errors=True)
    return model


def engine_of(manifest: Manifest, folder: Path) -> EngineConfig:
    """The engine that a bundle names. Raises BundleError where it is unknown, or does not work on this machine."""
    adapter: TypeAdapter[EngineConfig] = TypeAdapter(Engine)
    try:
        engine = adapter.validate_python(manifest.engine)
    except ValidationError as error:
        raise BundleError(f"`{folder / 'manifest.json'}`: {complaint(error, 'engine')}") from None
    reason = engine.available()
    if reason is not None:
        raise BundleError(f"`{folder}`: its engine `{engine.engine}` must work on this machine: {reason}")
    return engine
