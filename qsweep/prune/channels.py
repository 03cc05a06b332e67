from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from qsweep.prune.base import Pruning

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.coupling import Coupling
    from qsweep.stage import Context


class Channels(Pruning):
    """Take the least important channels out of every layer, with all that goes with them, then fine-tune the others.

    Layers get narrower, so that file, memory and latency fall on every engine, whatever the bits; multiply-accumulates
    fall about with the square of the share that is left. Channels that are added, multiplied or convolved one with one
    go together, and so do those of a head of attention. What the model gives stays as wide as it is, and so does what
    layer norms and group norms read.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), sections 3.2 and 3.3.
    """

    method: Literal["channels"] = "channels"
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the channels of each layer that is taken out, up to rounding."""
    multiple_of: Annotated[int, Field(ge=1)] = 8
    """Widths are rounded to multiples of it, as kernels like them (GPUs and depthwise convolutions on `onnxruntime`: of
    16); layers narrower than it are left as they are. Heads of attention are counted by their channels."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: that of the task's trainings, 0.05 unless it says otherwise (adamw 0.001): more is
    lost than by other stages."""

    def label(self) -> str:
        return f"channels{100 * self.sparsity:.3g}"

    def settings(self, context: Context) -> dict[str, Any]:
        return {"learning_rate": context.training.rate} if self.learning_rate is None else {}

    def settled(self, context: Context) -> Self:
        from qsweep.hub.export import example_of
        from qsweep.prune._channels import alike

        sparsity = alike(context.original(), example_of(context), self.sparsity, self.multiple_of)
        return self.model_copy(update={"sparsity": sparsity})

    def cut(self, model: nn.Module, context: Context) -> Coupling:
        from qsweep.hub.export import example_of
        from qsweep.prune._channels import zero_channels

        return zero_channels(model, example_of(context), self.sparsity, self.multiple_of)
