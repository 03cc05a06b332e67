from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qsweep.quantize.base import Uniform
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class QAT(Uniform):
    """Quantization-aware training: fine-tune with the rounding in the forward pass.

    Starts from the PTQ state. Gradients pass straight through the rounding and stop at the ends of the grid (Bengio et
    al. 2013; Jacob et al. 2018, section 3). Batch norm stays live and is folded into the weights before they are
    rounded (Krishnamoorthi 2018, section 3.2.2), so the integers that were trained are the integers that are shipped.
    """

    method: Literal["qat"] = "qat"
    epochs: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Peak of a one-cycle schedule."""

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.quantize._training import trained

        return trained(self, model, context)
