"""Outputs and scores of a model, and the check of a task before anything is spent on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qsweep.errors import NotFinite, QsweepError, TaskFailure
from qsweep.stage import own_teacher
from qsweep.tasks.base import Metric, SplitName, Task

_FIRST = 128
"""Samples of `train` that have a loss where a few have none."""
_PART = 256
"""Samples that are looked at together."""
_GROUPS = 500
"""Of samples that are left out of a metric in turns: the spread that they tell is right within 3 %."""
_FEW = 500
"""Samples that a teacher is held against the model on."""
_SAME, _APART = 1e-4, 1e-2
"""Of the largest output: how far two calls of one model may be apart, and those for other batch sizes."""


def predict(
    model: Callable[[Tensor], Tensor],
    task: Task,
    inputs: Tensor,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Outputs (N, ...) on the CPU of `model`, in eval mode, for `inputs` (N, ...) as the task stores them.

    Raises NotFinite when an output is not, TaskFailure when the model gives anything but a tensor, or looks up what is
    not in one of its tables.
    """
    outputs: list[Tensor] = []
    with torch.no_grad(), _eval_mode(model):
        for part in torch.split(inputs, batch_size):
            batch = task.transform(part)
            try:
                found = model(batch.to(device, memory_format=layout(batch)))
            except IndexError as error:
                first = sum(map(len, outputs))
                which = f"one of samples {first} to {first + len(part) - 1}"
                raise TaskFailure(f"the model raised IndexError for {which}, counted from 0: {error}") from error
            if not isinstance(found, Tensor):
                raise TaskFailure(f"the model must give one tensor (got {type(found).__name__})")
            outputs.append(found.cpu())
    joined = torch.cat(outputs)
    if not torch.isfinite(joined).all():
        raise NotFinite("the model's outputs must be finite (got NaN or infinity)")
    return joined


def class_axis(outputs: Tensor, labels: Tensor) -> int:
    """Along which dimension of `outputs` (N, ...) the scores of classes lie that whole `labels` (N, ...) count: that
    without which the shapes are one, the second wherever that may be, as PyTorch's losses have it."""
    sizes, wanted = outputs.shape[1:], labels.shape[1:]
    fitting = [axis for axis in range(len(sizes)) if (*sizes[:axis], *sizes[axis + 1 :]) == tuple(wanted)]
    return 1 + fitting[0] if fitting and not labels.is_floating_point() else 1


def accuracy_of_part(task: Task, outputs: Tensor, labels: Tensor) -> float | None:
    """The task's `metric` of these samples where it has one, None where that has no value for them; else the mean of
    their scores."""
    scores, metric = task.score(outputs, labels), _metric(task)
    value = scores.float().mean().item() if metric is None else metric(scores)
    return None if math.isnan(value) else value


def accuracy(task: Task, outputs: Tensor, labels: Tensor) -> float:
    """That of a whole split. Raises TaskFailure where the task's `metric` has no value for it."""
    return _defined(accuracy_of_part(task, outputs, labels), len(labels))


def judged(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """(N,) float32, one a sample, whose mean is the accuracy: the task's scores.

    Of a task with a `metric`: numbers whose mean over samples drawn with replacement spreads as the metric of such
    samples does. Those of a group of samples follow from the metric without them (the jackknife, by groups; Efron 1982,
    "The Jackknife, the Bootstrap and Other Resampling Plans", and Kott 2001, "The Delete-a-Group Jackknife").
    """
    scores, metric = task.score(outputs, labels), _metric(task)
    if metric is None:
        return scores.float()
    number, whole = len(scores), _defined(metric(scores), len(scores))
    found = torch.zeros(number, dtype=torch.float64)
    groups = torch.randperm(number, generator=torch.Generator().manual_seed(0)).chunk(_GROUPS)
    for left_out in groups if len(groups) > 1 else ():
        rest = torch.ones(number, dtype=torch.bool)
        rest[left_out] = False
        without = metric(scores[rest])
        if not math.isnan(without):  # of a class that only they have
            # the mean of a group strays by less than a sample does
            found[left_out] = (whole - without) * (number - len(left_out)) / len(left_out) ** 0.5
    return (whole + found - found.mean()).float()


def _defined(value: float | None, count: int) -> float:
    if value is None or math.isnan(value):
        raise TaskFailure(f"the task's `metric` must have a value for the {count} samples of a split (got NaN)")
    return value


def _metric(task: Task) -> Metric | None:
    return getattr(task, "metric", None)


def check(task: Task, model: nn.Module) -> list[str]:
    """Ask `task` for everything that a sweep will, before anything is spent on it: on a few samples of each split, and
    on all of them whether inputs are finite. Returns what its loss and its score warn of, one sentence each.

    Raises DataError and TaskFailure as the task's parts do, TaskFailure for a model that raises, is not float32 or
    whose output has another batch size, and for samples of several shapes, NotFinite for inputs, outputs or losses that
    are not.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise TaskFailure(f"the model's parameters must be float32 (`{name}` is {parameter.dtype})")
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    warned: list[str] = []
    shape = task.transform(task.samples("train").inputs[:1]).shape[1:]
    for split in splits:
        inputs, labels = task.samples(split)
        _check_inputs(task, split, inputs)
        if (own := task.transform(inputs[:1]).shape[1:]) != shape:
            raise TaskFailure(
                f"samples of `{split}` must be {tuple(shape)}, as those of `train` are (got {tuple(own)})"
            )
        odd = _first_not_finite(labels)  # which the loss may know what to do with
        few = torch.tensor([*range(min(4, len(inputs))), *([] if odd is None else [odd])])
        try:
            outputs = _check_samples(task, model, split, inputs[few], labels[few], warned)
            if split == "train":
                _check_loss(task, model, few, outputs, warned)
        except (TaskFailure, NotFinite) as error:
            if odd is None:
                raise
            raise type(error)(f"{error}; labels of sample {odd} of `{split}` are NaN or infinity") from error
        if split == "train":
            known = labels
        elif strange := _strange_classes(outputs, labels, known):
            warned.append(f"`{split}` has labels that neither the model nor `train` knows: {strange}")
        if split != "train" and (metric := _metric(task)) is not None:  # which may need samples of all classes
            metric(task.score(outputs[torch.arange(len(labels)) % len(outputs)], labels))
    if (teacher := own_teacher(task)) is not None:
        _check_teacher(task, teacher(), inputs[:4], outputs[:4].shape)
    return list(dict.fromkeys(warned))


def _strange_classes(outputs: Tensor, labels: Tensor, known: Tensor) -> str | None:
    """Which of the whole `labels` number no class of `outputs` and are not among `known`, such as one for what is left
    out; None where there are none, or where labels are no classes."""
    axis = class_axis(outputs, labels)
    if outputs.dim() != labels.dim() + 1 or labels.is_floating_point() or (count := outputs.shape[axis]) < 2:
        return None
    found = torch.unique(labels)
    found = found[((found < 0) | (found >= count)) & ~torch.isin(found, known)]
    few = ", ".join(str(int(value)) for value in found[:5])
    share = torch.isin(labels, found).float().mean().item()
    more = ", ..." if len(found) > 5 else ""
    return f"{few}{more} ({share:.1%} of them; classes are 0 to {count - 1})" if len(found) else None


def _first_not_finite(values: Tensor) -> int | None:
    """Which is the first of `values` (N, ...) with NaN or infinity."""
    if not values.is_floating_point():
        return None
    finite = torch.isfinite(values).reshape(len(values), -1).all(1)
    return None if finite.all() else int(finite.int().argmin())


def _check_inputs(task: Task, split: SplitName, inputs: Tensor) -> None:
    """Whole numbers, such as pixels, are finite; to look at them all would be to decode and scale them once more."""
    if not inputs.is_floating_point():
        return
    for number, part in enumerate(torch.split(inputs, _PART)):
        if (row := _first_not_finite(task.transform(part))) is not None:
            place = number * _PART + row
            raise NotFinite(f"the inputs of `{split}` must be finite (sample {place} holds NaN or infinity)")


def _check_samples(
    task: Task, model: nn.Module, split: SplitName, inputs: Tensor, labels: Tensor, warned: list[str]
) -> Tensor:
    """The outputs for a few samples; `warned` takes what loss and score warn of."""
    stored = inputs.clone()
    given = task.transform(inputs)
    if not given.is_floating_point():
        raise TaskFailure(
            "`transform`, or without one `samples`, must give floating point: numbers of tokens as float32 "
            f"(`tokens.float()`), of which the model makes indices (`tokens.long()`) (got {given.dtype})"
        )
    if given.dtype != torch.float32:
        raise TaskFailure(f"`transform` must give float32 (got {given.dtype})")
    shape = given.shape
    augmented = task.transform(inputs, torch.Generator().manual_seed(0)).shape
    if augmented != shape:
        raise TaskFailure(f"`transform` must keep shape {tuple(shape)} when it augments (got {tuple(augmented)})")
    outputs = _outputs(model, task, inputs)
    if not torch.allclose(inputs, stored, rtol=0, atol=0, equal_nan=True):
        raise TaskFailure("`transform` and the model must leave the samples as they are (one changed its input)")
    if not torch.allclose(outputs, _outputs(model, task, inputs), rtol=_SAME, atol=_SAME * float(outputs.abs().max())):
        raise TaskFailure(
            "the model must give the same outputs for the same inputs (it gave others the second time): no random "
            "numbers in eval mode, nothing kept from call to call"
        )
    if len(outputs) != len(inputs):
        raise TaskFailure(f"the model must give {len(inputs)} outputs for as many inputs (got {len(outputs)})")
    alone = _outputs(model, task, inputs[:1])
    if alone.shape != outputs[:1].shape:
        raise TaskFailure(
            f"the model must give {tuple(outputs[:1].shape)} for one sample, as for each of {len(inputs)} "
            f"(got {tuple(alone.shape)}): `squeeze()` takes a batch of one for a dimension that is too many"
        )
    apart = (alone - outputs[:1]).abs().max().item() / (outputs.abs().max().item() or 1.0)
    if apart > _APART:
        warned.append(
            f"the model's outputs for a sample depend on the others of its batch (alone they are {apart:.1%} of the "
            "largest apart): accuracy is that of the target's batch size, and what is simulated differs from it"
        )
    if split != "train":
        with _told("score", warned):
            task.score(outputs, labels)
    return outputs


def _check_loss(task: Task, model: nn.Module, few: Tensor, outputs: Tensor, warned: list[str]) -> None:
    """Of the samples `few` of `train`; where it has no value for them, as a loss of pairs may not have, of as many as a
    batch has."""
    inputs, labels = task.samples("train")
    try:
        with _told("loss", warned):
            _finite(task.loss(outputs, labels[few]))
    except (TaskFailure, NotFinite):
        more = _FIRST if _first_not_finite(labels) is None else 0
        if len(few) >= min(more, len(inputs)):
            raise
        _finite(task.loss(_outputs(model, task, inputs[:more]), labels[:more]))


def _finite(loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise NotFinite("the loss of the first samples of `train` must be finite")


@contextmanager
def _told(method: str, warned: list[str]) -> Iterator[None]:
    """Warnings go into `warned`: the log of a job is read by few."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        warned.append(f"the task's `{method}` warns: {' '.join(str(one.message).split())}")


def _check_teacher(task: Task, teacher: nn.Module, inputs: Tensor, shape: torch.Size) -> None:
    try:
        found = _outputs(teacher, task, inputs).shape
    except TaskFailure as error:
        raise TaskFailure(f"`teacher()`: {error}") from error
    if found != shape:
        raise TaskFailure(f"`teacher()` must give outputs {tuple(shape)}, as the model does (got {tuple(found)})")


def doubts_of_teacher(task: Task, model: nn.Module) -> Iterator[str]:
    """A sentence where the task's own teacher scores less than `model`, trained, on the first validation samples."""
    if (teacher := own_teacher(task)) is None:
        return
    inputs, labels = (part[:_FEW] for part in task.samples("validation"))
    own, other = (accuracy_of_part(task, predict(each, task, inputs), labels) for each in (model, teacher()))
    if own is not None and other is not None and other < own:
        first = f"the first {len(labels)} validation samples"
        yield f"`teacher()` scores {other:.4g} on {first}, less than the model ({own:.4g}), which would follow it"


def layout(inputs: Tensor) -> torch.memory_format:
    """How a batch and the model that takes it lie in memory."""
    return torch.channels_last if inputs.dim() == 4 else torch.contiguous_format


def _outputs(model: nn.Module, task: Task, inputs: Tensor) -> Tensor:
    try:
        return predict(model, task, inputs)
    except (QsweepError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the model may be the user's, and raises what it likes
        raise TaskFailure(f"the model raised {type(error).__name__}: {error}") from error


@contextmanager
def _eval_mode(model: object) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    were = [module.training for module in modules]  # one by one: a frozen batch norm stays frozen afterwards
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was
