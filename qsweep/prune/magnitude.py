from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from qsweep.prune.base import Pruning
from qsweep.stage import Context, stage_key

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


class Magnitude(Pruning):
    """Zero the weights of smallest magnitude, ranked over the whole network, then fine-tune the others.

    All weights of convolutions and linears take part, the first and the last layer's too; biases, batch norm and
    embeddings do not. The file gets smaller under compression; no engine skips single zeros, so latency stays.
    Fine-tuning uses the task's own loss even where the trial distils, so that trials share its result.

    Source: Han et al., "Learning both Weights and Connections" (2015), section 3, with one global threshold; Zhu &
    Gupta, "To prune, or not to prune" (2017).
    """

    method: Literal["magnitude"] = "magnitude"
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the weights that are set to zero."""
    epochs: Annotated[int, Field(ge=0)] = 1
    """Fine-tuning with the zeros kept."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.01, with the optimizer adamw 0.0003."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["learning_rate"] * (self.epochs == 0))

    def label(self) -> str:
        return f"prune{100 * self.sparsity:.3g}"

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        from qsweep.baseline import kept
        from qsweep.prune._global import zero_smallest
        from qsweep.train import fine_tune

        def compute(checkpoint: Path) -> None:
            zero_smallest(model, self.sparsity)
            fine_tune(model, self, context, checkpoint=checkpoint)

        return kept(model, context.store, stage_key(self, context), compute)
