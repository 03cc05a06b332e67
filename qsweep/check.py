"""The check of a task before anything is spent on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qsweep.errors import NotFinite, QsweepError, TaskFailure
from qsweep.evaluate import accuracy_of_part, class_axis, eval_mode, metric_of, predict
from qsweep.stage import own_teacher
from qsweep.tasks.base import SplitName, Task

_FIRST = 128
"""Samples of `train` that have a loss where a few have none."""
_PART = 256
"""Samples that are looked at together."""
_FEW = 500
"""Samples that a teacher is held against the model on."""
_SAME, _APART = 1e-4, 1e-2
"""Of the largest output: how far two calls of one model may be apart, and those for other batch sizes."""


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
                _check_loss(task, model, few, outputs, warned, may_need_more=odd is None)
        except (TaskFailure, NotFinite) as error:
            if odd is None:
                raise
            raise type(error)(f"{error}; labels of sample {odd} of `{split}` are NaN or infinity") from error
        if split == "train":
            known = labels
        elif strange := _strange_classes(outputs, labels, known):
            warned.append(f"`{split}` has labels that neither the model nor `train` knows: {strange}")
        if split != "train" and (metric := metric_of(task)) is not None:  # which may need samples of all classes
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
    if not torch.allclose(task.transform(stored.clone()), given, rtol=_SAME, atol=_SAME, equal_nan=True):
        raise TaskFailure(
            "`transform` must give the same each time when it is given no generator (it gave others the second time): "
            "it augments with one alone"
        )
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


def _check_loss(
    task: Task, model: nn.Module, few: Tensor, outputs: Tensor, warned: list[str], *, may_need_more: bool
) -> None:
    """Of the samples `few` of `train`; where it has no value for them, as a loss of pairs may not have, of as many as a
    batch has."""
    inputs, labels = task.samples("train")
    try:
        with _told("loss", warned):
            _finite(task.loss(outputs, labels[few]))
            if _no_gradient(task, model, inputs[few], labels[few]):
                warned.append(
                    "the task's `loss` gives the model's parameters no gradient (`no_grad`, `detach()`): no training "
                    "can follow it"
                )
    except (TaskFailure, NotFinite):
        if not may_need_more or len(few) == len(inputs):
            raise
        _finite(task.loss(_outputs(model, task, inputs[:_FIRST]), labels[:_FIRST]))


def _no_gradient(task: Task, model: nn.Module, inputs: Tensor, labels: Tensor) -> bool:
    """Whether the loss does not depend on parameters that are to be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return False  # which trainings refuse
    with torch.enable_grad(), eval_mode(model):
        try:
            return not task.loss(model(task.transform(inputs)), labels).requires_grad
        except RuntimeError:  # as a training will say, if there is one
            return False


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


def _outputs(model: nn.Module, task: Task, inputs: Tensor) -> Tensor:
    try:
        return predict(model, task, inputs)
    except (QsweepError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # the model may be the user's, and raises what it likes
        raise TaskFailure(f"the model raised {type(error).__name__}: {error}") from error
