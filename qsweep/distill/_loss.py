"""The arithmetic of distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsweep.errors import TaskFailure
from qsweep.tasks._parts import Parts, by_name

_LEAST = 1e-6
"""Of the largest mean square: outputs that are all but zero would outweigh the others."""


def with_teacher(
    teacher: nn.Module,
    task_loss: Callable[[Tensor, Tensor], Tensor],
    distance: Callable[[Tensor, Tensor, Tensor], Tensor],
    alpha: float,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`loss(inputs, outputs, labels)`; the teacher, in eval mode, is asked for `inputs` and gets no gradient."""

    def loss(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher(inputs)
        return alpha * distance(outputs, targets, labels) + (1 - alpha) * task_loss(outputs, labels)

    teacher.eval()
    return loss


def chosen(outputs: Tensor, parts: Parts | None, names: Sequence[str]) -> list[Tensor]:
    """Those of several outputs, or the one. Raises TaskFailure for names that the model does not give, and for none
    where it gives several."""
    found = by_name(outputs, parts)
    known = ", ".join(f"`{name}`" for name in found) if parts else "one, without a name"
    if len(found) > 1 and not names:
        raise TaskFailure(
            f"`distill: {{method: logits}}` needs `outputs`, those of {known} that are logits; `method: outputs` "
            "follows outputs of any kind"
        )
    if unknown := [name for name in names if name not in found]:
        raise TaskFailure(f"`distill.outputs`: must be outputs of the model, {known} (got `{unknown[0]}`)")
    return [found[name] for name in names or found]


def check_classes(outputs: Tensor, labels: Tensor) -> None:
    """Raises TaskFailure where labels are several real numbers a sample that are no shares of the classes: a softmax
    over all outputs, logits and boxes, would be of no use."""
    if labels.is_floating_point() and labels.dim() > 1 and labels.shape != outputs.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(labels.shape)}"
        raise TaskFailure(
            "`distill: {method: logits}` needs labels that number classes, or a share for each (got real numbers, "
            f"outputs and labels {shapes}); `method: outputs` follows outputs of any kind"
        )


def divergence(outputs: Tensor, targets: Tensor, temperature: float, axis: int = 1) -> Tensor:
    """KL(softmax(targets / T) || softmax(outputs / T)) of logits with their classes along `axis`, mean over the rest.

    Raises TaskFailure for outputs that cannot be logits of several classes, or whose shapes differ.
    """
    if outputs.dim() < 2 or outputs.shape[axis] < 2 or outputs.shape != targets.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise TaskFailure(
            f"distillation needs logits (batch, 2 classes or more, ...) alike from student and teacher (got {shapes}); "
            "`method: outputs` takes outputs of any kind"
        )
    wanted, found = F.log_softmax(targets / temperature, axis), F.log_softmax(outputs / temperature, axis)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(axis).mean()


def squared(outputs: Tensor, targets: Tensor, parts: Parts | None = None) -> Tensor:
    """Mean squared difference; of several outputs the mean of theirs, each in units of the mean square of `targets`.
    Raises TaskFailure for shapes that differ."""
    if outputs.shape != targets.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise TaskFailure(f"distillation needs outputs alike from student and teacher (got {shapes})")
    if parts is None or not parts.several:
        return F.mse_loss(outputs, targets)
    students, teachers = (by_name(each, parts).values() for each in (outputs, targets))
    squares = torch.stack([teacher.square().mean() for teacher in teachers])
    errors = torch.stack([F.mse_loss(a, b) for a, b in zip(students, teachers, strict=True)])
    return (errors / squares.clamp_min(_LEAST * squares.max())).mean()
