"""The arithmetic of distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsweep.errors import TaskFailure
from qsweep.tasks._parts import each

_SMALL = 1e-12
"""Mean square of outputs that are all but zero."""


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


def check_classes(outputs: Tensor, labels: Tensor, widths: list[int] | None = None) -> None:
    """Raises TaskFailure where outputs are several, or labels several real numbers a sample that are no shares of the
    classes: a softmax over all outputs, logits and boxes, would be of no use."""
    if widths is not None:
        raise TaskFailure(
            f"`distill: {{method: logits}}` needs one output of logits (got {len(widths)} outputs); `method: outputs` "
            "follows outputs of any kind"
        )
    if labels.is_floating_point() and labels.dim() > 1 and labels.shape != outputs.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(labels.shape)}"
        raise TaskFailure(
            "`distill: {method: logits}` needs labels that number classes, or a share for each (got real numbers, "
            f"outputs and labels {shapes}); `method: outputs` follows outputs of any kind"
        )


def divergence(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(softmax(targets / T) || softmax(outputs / T)) of logits (B, classes, ...), mean over all but the classes.

    Raises TaskFailure for outputs that cannot be logits of several classes, or whose shapes differ.
    """
    if outputs.dim() < 2 or outputs.shape[1] < 2 or outputs.shape != targets.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise TaskFailure(
            f"distillation needs logits (batch, 2 classes or more, ...) alike from student and teacher (got {shapes}); "
            "`method: outputs` takes outputs of any kind"
        )
    wanted, found = F.log_softmax(targets / temperature, 1), F.log_softmax(outputs / temperature, 1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(1).mean()


def squared(outputs: Tensor, targets: Tensor, widths: list[int] | None = None) -> Tensor:
    """Mean squared difference; of several outputs, of so many columns each, the mean of theirs, each in units of the
    mean square of `targets`. Raises TaskFailure for shapes that differ."""
    if outputs.shape != targets.shape:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise TaskFailure(f"distillation needs outputs alike from student and teacher (got {shapes})")
    if widths is None:
        return F.mse_loss(outputs, targets)
    pairs = zip(each(outputs, widths), each(targets, widths), strict=True)
    return torch.stack([F.mse_loss(a, b) / b.square().mean().clamp_min(_SMALL) for a, b in pairs]).mean()
