from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from qsweep.quantize.table import Table
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel

Granularity = Literal["scaled", "tensor", "channel"]


class Codebook(Table):
    """Weights shared by k-means: each is the index of one of 2^bits centres of its layer; no training, no calibration.

    Never a larger squared error than uniform levels of the same bits. Weights that are 0 stay 0. Raises NotFinite for
    weights that are not.
    Source: Han et al., "Deep Compression" (2016), section 3, equation 2, without its fine-tuning.
    """

    method: Literal["codebook"] = "codebook"
    granularity: Granularity = "scaled"
    """scaled: a table for each layer and a scale for each output channel; tensor: a table for each layer; channel: a
    table for each output channel, the most accurate, whose 2^(bits+1) bytes weigh more than the weights of a small
    layer."""

    def label(self) -> str:
        """Such as `codebook-w4`, with `-tensor` or `-channel` where a table is not `scaled`."""
        return super().label() + (f"-{self.granularity}" if self.granularity != "scaled" else "")

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.quantize._tables import codebook, weights_only

        return weights_only(self, model, context, partial(codebook, granularity=self.granularity))
