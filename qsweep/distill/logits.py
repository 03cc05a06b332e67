from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from qsweep.distill.base import Distillation

if TYPE_CHECKING:
    from torch import Tensor


class Logits(Distillation):
    """Fine-tune a classifier on the uncompressed model's softened outputs.

    The distance is T^2 * KL(softmax(teacher / T) || softmax(student / T)).
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """

    method: Literal["logits"] = "logits"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T: a higher one shows the student more of how the teacher ranks the wrong classes."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["temperature"] * (self.alpha == 0))

    def label(self) -> str:
        return f"T{self.temperature:.0f}" if self.temperature.is_integer() else f"T{self.temperature:.1f}"

    def distance(self, outputs: Tensor, targets: Tensor, labels: Tensor, widths: list[int] | None = None) -> Tensor:
        from qsweep.distill._loss import check_classes, divergence

        check_classes(outputs, labels, widths)
        return self.temperature**2 * divergence(outputs, targets, self.temperature)
