"""The boundary to the user's code: what it raises and what it returns wrongly becomes a TaskFailure that says where."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Generator, Tensor, nn

from qsweep.errors import QsweepError, TaskFailure
from qsweep.tasks._parts import NotParts, Parts, countable, mapped, tensors
from qsweep.tasks._seen import Seen, alike, seen
from qsweep.tasks._whole import whole
from qsweep.tasks.base import Samples, SplitName, Task, TaskMetric

Role: TypeAlias = Literal["stored", "labels", "inputs", "outputs"]
_OF_SAMPLES: tuple[Role, Role] = ("stored", "labels")
_GIVES = "give a tensor, or tuples and dicts of tensors"
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
        known = vars(module).items()
        classes = [key for key, value in known if isinstance(value, type) and value.__module__ == module_name]
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


def parts_of(task: Task, role: Role) -> Parts | None:
    """The parts of what its model takes or gives, or of its labels, once these were seen; None where it is one tensor
    without a name."""
    parts = task.parts.get(role) if isinstance(task, UserTask) else None
    return None if parts is None or parts.unnamed else parts


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
    """A `Task` of an object of the user's class; every call is guarded and its result checked.

    What its methods and its model take and give may be several tensors, in tuples and dicts: to all others these are
    one.
    """

    def __init__(self, task: Any, path: Path, judged_by: TaskMetric) -> None:
        """`path`: of the file that the class is in."""
        self._path, self._name, self._judged_by = path, type(task).__name__, judged_by
        self._loaded: dict[SplitName, Samples] = {}
        self._expected: Mapping[SplitName, Seen] = {}
        self.parts: dict[Role, Parts] = {}
        """Of stored samples and labels, and of what the model takes and gives, each known once it was seen."""
        self.any_device = bool(getattr(task, "any_device", False))
        self._task = task
        self.metric = self._metric if callable(getattr(task, "metric", None)) else None
        self.teacher = (
            cache(lambda: self._module("teacher").eval()) if callable(getattr(task, "teacher", None)) else None
        )

    @classmethod
    def of(cls, kind: type, arguments: dict[str, Any], path: Path, judged_by: TaskMetric) -> UserTask:
        """That of `kind(**arguments)`."""
        return cls(_call(path, f"{kind.__name__}(...)", kind, **arguments), path, judged_by)

    def model(self) -> nn.Module:
        return self._module("model")

    def _module(self, method: str) -> nn.Module:
        model = self._ask(method)
        self._must(isinstance(model, nn.Module), method, "return a torch.nn.Module", type(model).__name__)
        return self.whole(model)

    def whole(self, model: nn.Module) -> nn.Module:
        """`model`, in place, as one that takes and gives one tensor."""
        return whole(model, lambda inputs: self._apart("inputs", inputs), self._given)

    @property
    def interface(self) -> dict[str, list[dict[str, Any]]]:
        """The parts of what the model takes and gives, as plain data, where it takes or gives more than real numbers in
        one tensor."""
        roles: tuple[Role, ...] = ("inputs", "outputs")
        found = {role: self.parts[role] for role in roles if role in self.parts}
        return {role: parts.rows() for role, parts in found.items() if not parts.plain}

    @property
    def seen(self) -> dict[SplitName, Seen]:
        """By what samples of the splits so far are known again."""
        return {split: seen(samples) for split, samples in self._loaded.items()}

    def tell(self, interface: Mapping[str, Sequence[Mapping[str, Any]]], samples: Mapping[SplitName, Seen]) -> None:
        """What `interface` was where the model has run, and `seen`."""
        self.parts |= {cast(Role, role): Parts.read(rows) for role, rows in interface.items()}
        self._expected = samples

    def _given(self, outputs: Any, inputs: Tensor) -> Tensor:
        """What the model gives for `inputs` as one tensor."""
        if torch.compiler.is_compiling():  # or tracing: it has been looked at, or will be
            return (self.parts.get("outputs") or Parts.of(outputs)).joined(outputs, torch.float32)
        parts = self._known("outputs", outputs, lambda got: TaskFailure(f"the model must {_GIVES} (got {got})"))
        if parts.plain:
            return outputs  # type: ignore[no-any-return]
        count = len(inputs)
        for part, value in zip(parts.parts, (each for _, each in tensors(outputs)), strict=True):
            if not value.is_floating_point() or value.shape[:1] != (count,):
                must = f"must be floating point, of shape ({count}, ...) for {count} samples"
                got = f"{value.dtype}, {tuple(value.shape)}"
                which = f"output `{part.name}`" if part.name else "output"
                raise TaskFailure(f"the model's {which} {must} (got {got})")
        return parts.joined(outputs, torch.float32)

    def _known(self, role: Role, value: Any, complaint: Callable[[str], TaskFailure]) -> Parts:
        """The parts of `value`, which stay the same. Raises what `complaint` makes of what came instead."""
        try:
            parts = Parts.of(value)
        except NotParts as error:
            raise complaint(str(error)) from None
        known = self.parts.setdefault(role, parts)
        if not known.alike(parts):
            raise complaint(f"{parts}, and {known} before")
        return parts

    def samples(self, split: SplitName) -> Samples:
        if split not in self._loaded:
            self._loaded[split] = self._samples(split)
        return self._loaded[split]

    def _samples(self, split: SplitName) -> Samples:
        found, method = self._ask("samples", split), f"samples({split!r})"
        what = "return two tensors, inputs and labels, or tuples and dicts of tensors for each"
        self._must(isinstance(found, tuple) and len(found) == 2, method, what, _describe(found))
        for each in found:  # of samples: a tuple or a dict has a few tensors of all samples
            self._must(not isinstance(each, list), method, what, f"a list of {len(each)}")
        stored, labels = (
            self._known(role, value, lambda got: self._complaint(method, what, got))
            for role, value in zip(_OF_SAMPLES, found, strict=True)
        )
        same = len({len(each) if each.dim() else 0 for _, each in tensors(found)} | {0}) == 2
        self._must(same, method, "return as many inputs as labels, at least one", _describe(found))
        samples = Samples(stored.joined(found[0]).detach(), labels.joined(found[1]).detach())
        now = seen(samples)
        same = alike(now, self._expected.get(split, now))
        self._must(
            same, method, "give the same samples each time, in the same order: random numbers from a seed", "others"
        )
        return samples

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        own, taken = getattr(self._task, "transform", None), self._apart("stored", inputs)
        if own is None or getattr(own, "__func__", None) is Task.transform:
            found = mapped(taken, _real)
        else:
            found = self._ask("transform", taken, generator)
        what = f"return a tensor of {len(inputs)} samples, or tuples and dicts of such"
        parts = self._known("inputs", found, lambda got: self._complaint("transform", what, got))
        fits = all(each.shape[:1] == (len(inputs),) for _, each in tensors(found))
        self._must(fits, "transform", what, _describe(found))
        if parts.plain:
            return found  # type: ignore[no-any-return]
        for part in parts.parts:
            fits = part.dtype == torch.float32 or not part.dtype.is_floating_point
            self._must(fits, "transform", "return float32 and whole numbers", f"`{part.name}` in {part.dtype}")
        few = "return whole numbers up to 2^24, which float32 tells apart"
        self._must(inputs.is_cuda or countable(found), "transform", few, "larger ones")
        return parts.joined(found, torch.float32)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        found = self._ask("loss", self._apart("outputs", outputs), self._apart("labels", labels))
        self._must(isinstance(found, Tensor) and found.dim() == 0, "loss", "return a scalar tensor", _describe(found))
        if found.is_cuda:  # a look at it would wait for the GPU; the training looks now and then
            return found  # type: ignore[no-any-return]
        if not torch.isfinite(found) and torch.isfinite(outputs).all():  # else the training diverged: not its fault
            self._must(False, "loss", "be finite for finite outputs", str(found.item()))
        return found  # type: ignore[no-any-return]

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        found = self._ask("score", self._apart("outputs", outputs), self._apart("labels", labels))
        if self.metric is not None:
            fits = isinstance(found, Tensor) and found.dim() == 2 and len(found) == len(labels)
            shape = f"({len(labels)}, K), of which `metric` makes the accuracy"
            self._must(fits, "score", f"return a tensor of shape {shape}", _describe(found))
            self._must(bool(found.isfinite().all()), "score", "return finite numbers", "NaN or infinity")
            return found  # type: ignore[no-any-return]
        fits = isinstance(found, Tensor) and found.shape == (len(labels),)
        shape = f"({len(labels)},), or ({len(labels)}, K) beside a method `metric`"
        self._must(fits, "score", f"return a tensor of shape {shape}", _describe(found))
        least, most, wrong = found.min().item(), found.max().item(), found[~found.isfinite()]
        got = f"{wrong[0].item()}, {len(wrong)} of {len(found)}" if len(wrong) else f"{least} to {most}"
        self._must(self._may_be(least, most), "score", f"return values {self._range}", got)
        return found  # type: ignore[no-any-return]

    def _apart(self, role: Role, joined: Tensor) -> Any:
        """What the user's code takes for the one tensor that all others see."""
        parts = self.parts.get(role)
        if parts is None:
            return joined
        return parts.apart(joined, own_types=role == "inputs" or (parts.several and role != "outputs"))

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
            raise self._complaint(method, what, got)

    def _complaint(self, method: str, what: str, got: str) -> TaskFailure:
        return TaskFailure(f"`{self._path}`: `{self._name}.{method}` must {what} (got {got})")


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


def _real(value: Tensor) -> Tensor:
    """Pixels as real numbers; other whole numbers stay."""
    return value.float() if value.is_floating_point() or value.dtype == torch.uint8 else value


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(_describe(item) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_describe(item)}' for key, item in value.items())}}}"
    return type(value).__name__
