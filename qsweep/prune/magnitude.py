from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qsweep.prune.base import Pruning

if TYPE_CHECKING:
    from torch import nn

    from qsweep.stage import Context


class Magnitude(Pruning):
    """Zero the weights of smallest magnitude, ranked over the whole network, then fine-tune the others.

    All weights of convolutions and linears take part, the first and the last layer's too; biases, batch norm and
    embeddings do not. The file gets smaller under compression; no engine skips single zeros, so latency stays.

    Source: Han et al., "Learning both Weights and Connections" (2015), section 3, with one global threshold; Zhu &
    Gupta, "To prune, or not to prune" (2017).
    """

    method: Literal["magnitude"] = "magnitude"
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the weights that are set to zero."""

    def label(self) -> str:
        return f"prune{100 * self.sparsity:.3g}"

    def cut(self, model: nn.Module, context: Context) -> None:
        from qsweep.prune._global import zero_smallest

        zero_smallest(model, self.sparsity)
