from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from qsweep.distill.base import Distillation
from qsweep.stage import Context, stage_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn


class Logits(Distillation):
    """Fine-tune on the uncompressed model's softened outputs.

    loss = alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) * the task's loss. The teacher
    sees the very batch that the student sees, augmentation included (Beyer et al. 2021).

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """

    method: Literal["logits"] = "logits"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T: a higher one shows the student more of how the teacher ranks the wrong classes."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the teacher; the labels have the rest."""
    epochs: Annotated[int, Field(ge=0)] = 1
    """Of the model as it is before it is quantized. 0: none; quantization-aware training has the loss all the same."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.01, with the optimizer adamw 0.0003."""

    def canonical(self) -> Self:
        unused = ["temperature"] * (self.alpha == 0) + ["learning_rate"] * (self.epochs == 0)
        return super().canonical().with_defaults(*unused)

    @property
    def trains(self) -> bool:
        return self.epochs > 0

    def label(self) -> str:
        return f"T{self.temperature:.0f}" if self.temperature.is_integer() else f"T{self.temperature:.1f}"

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        from qsweep.baseline import kept
        from qsweep.train import fine_tune

        def compute(checkpoint: Path) -> None:
            fine_tune(model, self, context, loss=self.loss(context), checkpoint=checkpoint)

        return kept(model, context.store, stage_key(self, context), compute)

    def loss(self, context: Context) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        from copy import deepcopy

        from qsweep.distill._loss import with_teacher

        teacher = context.teacher()
        if context.device.type != "cpu":  # what others are given stays on the CPU
            teacher = deepcopy(teacher).to(context.device)
        return with_teacher(teacher, context.task.loss, self.temperature, self.alpha)
