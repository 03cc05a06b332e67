"""Outputs and scores of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qsweep.errors import NotFinite, TaskFailure
from qsweep.tasks.base import Metric, Task

_GROUPS = 500
"""Of samples that are left out of a metric in turns: the spread that they tell is right within 3 %."""


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
    with torch.no_grad(), eval_mode(model):
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
    scores, metric = task.score(outputs, labels), metric_of(task)
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
    scores, metric = task.score(outputs, labels), metric_of(task)
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


def metric_of(task: Task) -> Metric | None:
    return getattr(task, "metric", None)


def layout(inputs: Tensor) -> torch.memory_format:
    """How a batch and the model that takes it lie in memory."""
    return torch.channels_last if inputs.dim() == 4 else torch.contiguous_format


@contextmanager
def eval_mode(model: object) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    were = [module.training for module in modules]  # one by one: a frozen batch norm stays frozen afterwards
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was
