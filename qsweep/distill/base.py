from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from qsweep.stage import Context, Stage, stage_key

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from qsweep.tasks import Task
    from qsweep.tasks._parts import Parts


class Distillation(Stage):
    """Trains the compressed model to follow the uncompressed one, or the teacher that the task brings.

    loss = alpha * the distance from the teacher's outputs + (1 - alpha) * the task's loss. The teacher sees the very
    batch that the student sees, augmentation included (Beyer et al. 2021, "Knowledge distillation: A good teacher is
    patient and consistent").
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the teacher; the labels have the rest."""
    epochs: Annotated[int, Field(ge=0)] = 1
    """Of the model as it is before it is quantized. 0: none; quantization-aware training has the loss all the same."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.01, with the optimizer adamw 0.0003."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["learning_rate"] * (self.epochs == 0))

    @property
    def trains(self) -> bool:
        """Whether the model is trained before it is quantized."""
        return self.epochs > 0

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Return `model`, changed in place, fine-tuned on `loss`. Zero weights of a pruned model stay zero."""
        from qsweep.baseline import kept
        from qsweep.hub.narrow import fine_tune_narrow

        def compute(checkpoint: Path) -> None:
            fine_tune_narrow(model, self, context, loss=self.loss(context), checkpoint=checkpoint)

        return kept(model, context.store, stage_key(self, context), compute)

    def loss(self, context: Context) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`loss(inputs, outputs, labels)`, also used by quantization-aware training of the same trial."""
        from copy import deepcopy

        from qsweep.distill._loss import with_teacher

        teacher = context.teacher()
        if context.device.type != "cpu":  # what others are given stays on the CPU
            teacher = deepcopy(teacher).to(context.device)
        return with_teacher(teacher, context.task.loss, self._distance(context.task), self.alpha)

    def check(self, context: Context) -> None:
        from qsweep.evaluate import predict

        inputs, labels = (part[:2] for part in context.task.samples("train"))
        outputs = predict(context.original(), context.task, inputs)
        self._distance(context.task)(outputs, outputs, labels)

    def _distance(self, task: Task) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`distance` of what `task` has, by outputs, targets and labels."""
        from qsweep.tasks._user import parts_of

        parts, several = (parts_of(task, role) for role in ("outputs", "labels"))

        def distance(outputs: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
            return self.distance(outputs, targets, None if several else labels, parts)

        return distance

    @abstractmethod
    def distance(self, outputs: Tensor, targets: Tensor, labels: Tensor | None, parts: Parts | None = None) -> Tensor:
        """Scalar: how far the student's `outputs` are from the teacher's, for samples with these labels. Raises
        TaskFailure where none is defined.

        `labels`: None where they are several. `parts`: of outputs that have names, side by side where they are several.
        """
