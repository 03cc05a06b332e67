from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from qsweep.stage import Context, Stage, stage_key

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from qsweep.hub.coupling import Coupling


class Pruning(Stage):
    """Removes weights, then fine-tunes the others. Zeros made here stay zero through every later stage.

    Fine-tuning uses the task's own loss even where the trial distils, so that trials share its result.
    """

    version: ClassVar[int] = 2

    epochs: Annotated[int, Field(ge=0)] = 1
    """Fine-tuning with the zeros kept."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.01, with the optimizer adamw 0.0003."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["learning_rate"] * (self.epochs == 0))

    def settings(self, context: Context) -> dict[str, Any]:
        """Of the fine-tuning, before those of the task."""
        return {}

    @abstractmethod
    def cut(self, model: nn.Module, context: Context) -> Coupling | None:
        """Set weights of the convolutions and linears of `model` to zero, in place; return which of its channels go
        together, if that was looked for."""

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Return `model`, changed in place, with some weights of its convolutions and linears exactly zero."""
        from qsweep.baseline import kept
        from qsweep.hub.narrow import fine_tune_narrow

        def compute(checkpoint: Path) -> None:
            coupling = self.cut(model, context)
            settings = self.settings(context)
            fine_tune_narrow(model, self, context, settings, coupling=coupling, checkpoint=checkpoint)

        return kept(model, context.store, stage_key(self, context), compute)
