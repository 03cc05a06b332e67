from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qsweep.distill.base import Distillation

if TYPE_CHECKING:
    from torch import Tensor

    from qsweep.tasks._parts import Parts


class Outputs(Distillation):
    """Fine-tune on the uncompressed model's outputs as they are: numbers, maps, or logits.

    The distance is the mean squared difference; of several outputs the mean of theirs, each by the mean square of the
    teacher's.
    Source: Ba and Caruana, "Do Deep Nets Really Need to be Deep?" (2014), section 2.2.
    """

    method: Literal["outputs"] = "outputs"

    def label(self) -> str:
        return "outputs"

    def distance(self, outputs: Tensor, targets: Tensor, labels: Tensor | None, parts: Parts | None = None) -> Tensor:
        from qsweep.distill._loss import squared

        return squared(outputs, targets, parts)
