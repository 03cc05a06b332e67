from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from qsweep.config import Listed
from qsweep.distill.base import Distillation

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.tasks._parts import Parts


class Logits(Distillation):
    """Fine-tune a classifier on the uncompressed model's softened outputs.

    The distance is T^2 * KL(softmax(teacher / T) || softmax(student / T)).
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2.
    """

    version: ClassVar[int] = 2

    method: Literal["logits"] = "logits"
    temperature: Annotated[float, Field(gt=0)] = 4.0
    """T: a higher one shows the student more of how the teacher ranks the wrong classes."""
    outputs: Listed[tuple[str, ...]] = ()
    """Which of several outputs are logits, by their keys, as in `[start_logits, end_logits]`: the distance is the mean
    of theirs."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["temperature", "outputs"] * (self.alpha == 0))

    def label(self) -> str:
        return f"T{self.temperature:.0f}" if self.temperature.is_integer() else f"T{self.temperature:.1f}"

    def distance(self, outputs: Tensor, targets: Tensor, labels: Tensor | None, parts: Parts | None = None) -> Tensor:
        from qsweep.distill._loss import check_classes, chosen, divergence
        from qsweep.evaluate import class_axis

        students, teachers = (chosen(each, parts, self.outputs) for each in (outputs, targets))
        axis = 1
        if labels is not None and not self.outputs:
            check_classes(students[0], labels)
            axis = class_axis(students[0], labels)
        pairs = zip(students, teachers, strict=True)
        found = [divergence(one, other, self.temperature, axis) for one, other in pairs]
        return self.temperature**2 * sum(found[1:], found[0]) / len(found)
