"""The boundary to the user's code: what it raises and what it returns wrongly becomes a TaskFailure that says where."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from qsweep.errors import QsweepError, TaskFailure
from qsweep.tasks.base import Samples, SplitName, Task, TaskMetric

METHODS = ("model", "samples", "loss", "score")


def load_class(path: Path, name: str) -> type:
    """The class `name` of the file `path`, imported as a module of its own."""
    module_name = f"qsweep_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look a class's module up here
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    _call(path, "import", spec.loader.exec_module, module)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
        raise TaskFailure(f"`{path}`: must have a class `{name}` (it has {', '.join(classes) or 'none'})")
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if missing:
        raise TaskFailure(
            f"`{path}`: `{name}` must have the methods {', '.join(METHODS)} (missing: {', '.join(missing)})"
        )
    return found


def check_arguments(kind: type, arguments: dict[str, Any], path: Path) -> None:
    """Raises TaskFailure where `kind(**arguments)` would refuse the arguments; calls nothing, as it may load data."""
    try:
        signature = inspect.signature(kind)
    except ValueError:  # that of a built-in class, which tells none
        return
    _call(path, f"{kind.__name__}(...)", signature.bind, **arguments)


def guarded(task: Any) -> Any:
    """`task` as it is if it is qsweep's own, else guarded like those of specs, whatever it is judged by. Raises
    TaskFailure where it is none."""
    if type(task).__module__.startswith("qsweep."):
        return task
    if isinstance(task, type):
        raise TaskFailure(f"`task`: must be an object, such as `{task.__name__}()` (got the class)")
    missing = [method for method in METHODS if not callable(getattr(task, method, None))]
    if missing:
        lacks = f"`{type(task).__name__}` lacks {', '.join(missing)}"
        raise TaskFailure(f"`task`: must have the methods {', '.join(METHODS)} ({lacks})")
    file = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    return UserTask(task, Path(file or type(task).__module__), TaskMetric(unit=None))


class UserTask:
    """A `Task` of an object of the user's class; every call is guarded and its result checked."""

    def __init__(self, task: Any, path: Path, judged_by: TaskMetric) -> None:
        """`path`: of the file that the class is in."""
        self._path, self._name, self._judged_by = path, type(task).__name__, judged_by
        self._loaded: dict[SplitName, Samples] = {}
        self.any_device = bool(getattr(task, "any_device", False))
        self._task = task
        self.metric = self._metric if callable(getattr(task, "metric", None)) else None

    @classmethod
    def of(cls, kind: type, arguments: dict[str, Any], path: Path, judged_by: TaskMetric) -> UserTask:
        """That of `kind(**arguments)`."""
        return cls(_call(path, f"{kind.__name__}(...)", kind, **arguments), path, judged_by)

    def model(self) -> nn.Module:
        model = self._ask("model")
        self._must(isinstance(model, nn.Module), "model", "return a torch.nn.Module", type(model).__name__)
        return model  # type: ignore[no-any-return]

    def samples(self, split: SplitName) -> Samples:
        if split not in self._loaded:
            self._loaded[split] = self._samples(split)
        return self._loaded[split]

    def _samples(self, split: SplitName) -> Samples:
        found = self._ask("samples", split)
        pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(item, Tensor) for item in found)
        self._must(pair, f"samples({split!r})", "return two tensors, inputs and labels", _describe(found))
        inputs, labels = found
        lengths = [len(item) if item.dim() else 0 for item in (inputs, labels)]
        same = lengths[0] == lengths[1] > 0
        self._must(same, f"samples({split!r})", "return as many inputs as labels, at least one", _describe(found))
        return Samples(inputs.detach(), labels.detach())

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        own = getattr(self._task, "transform", None)
        if own is None or getattr(own, "__func__", None) is Task.transform:
            # other whole numbers stay, for `check` to refuse
            return inputs.float() if inputs.is_floating_point() or inputs.dtype == torch.uint8 else inputs
        found = self._ask("transform", inputs, generator)
        fits = isinstance(found, Tensor) and found.dim() > 0 and len(found) == len(inputs)
        self._must(fits, "transform", f"return a tensor of {len(inputs)} samples", _describe(found))
        return found  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        found = self._ask("loss", outputs, labels)
        self._must(isinstance(found, Tensor) and found.dim() == 0, "loss", "return a scalar tensor", _describe(found))
        if found.is_cuda:  # a look at it would wait for the GPU; the training looks now and then
            return found  # type: ignore[no-any-return]
        if not torch.isfinite(found) and torch.isfinite(outputs).all():  # else the training diverged: not its fault
            self._must(False, "loss", "be finite for finite outputs", str(found.item()))
        return found  # type: ignore[no-any-return]

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        found = self._ask("score", outputs, labels)
        if self.metric is not None:
            fits = isinstance(found, Tensor) and found.dim() == 2 and len(found) == len(labels)
            shape = f"({len(labels)}, K), of which `metric` makes the accuracy"
            self._must(fits, "score", f"return a tensor of shape {shape}", _describe(found))
            self._must(bool(found.isfinite().all()), "score", "return finite numbers", "NaN or infinity")
            return found  # type: ignore[no-any-return]
        fits = isinstance(found, Tensor) and found.shape == (len(labels),)
        shape = f"({len(labels)},), or ({len(labels)}, K) beside a method `metric`"
        self._must(fits, "score", f"return a tensor of shape {shape}", _describe(found))
        least, most = found.min().item(), found.max().item()
        self._must(self._may_be(least, most), "score", f"return values {self._range}", f"{least} to {most}")
        return found  # type: ignore[no-any-return]

    def _metric(self, scores: Tensor) -> float:
        found = self._ask("metric", scores)
        try:
            value = float(found)  # of a tensor or a scalar of NumPy, too
        except (TypeError, ValueError, RuntimeError):
            self._must(False, "metric", "return one number", _describe(found))
        self._must(math.isnan(value) or self._may_be(value), "metric", f"return a value {self._range}", f"{value}")
        return value

    def _may_be(self, *values: float) -> bool:
        return all(0 <= value <= 1 if self._judged_by.share else math.isfinite(value) for value in values)

    @property
    def _range(self) -> str:
        if not self._judged_by.share:
            return "short of NaN and infinity"
        return "from 0 to 1, or have a unit in the spec, as in `task: {metric: {name: PSNR, unit: dB}}`"

    def _ask(self, method: str, *arguments: object) -> Any:
        return _call(self._path, f"{self._name}.{method}", getattr(self._task, method), *arguments)

    def _must(self, holds: bool, method: str, what: str, got: str) -> None:
        if not holds:
            raise TaskFailure(f"`{self._path}`: `{self._name}.{method}` must {what} (got {got})")


def _call(path: Path, what: str, function: Callable[..., Any], *arguments: object, **keywords: object) -> Any:
    try:
        return function(*arguments, **keywords)
    except (QsweepError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        line = _line(error, path)
        where = f"`{path}`, line {line}" if line else f"`{path}`"
        raise TaskFailure(f"{where}: `{what}` raised {type(error).__name__}: {error}") from error


def _line(error: Exception, path: Path) -> int | None:
    """The deepest line of the user's file in the traceback, or the one that does not parse."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(_describe(item) for item in value)})"
    return type(value).__name__
