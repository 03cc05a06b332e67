from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qsweep.quantize.table import Table
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class APoT(Table):
    """Weights rounded to sums of few powers of two, which lie closer together near 0, as weights do; no training.

    The scale of each output channel is the one of least squared error. Weights that are 0 stay 0. Raises NotFinite for
    weights that are not.
    Source: Li, Dong and Wang, "Additive Powers-of-Two Quantization" (2020), section 2.2, eq. 5 and 6 with k = 2.
    """

    method: Literal["apot"] = "apot"

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.quantize._tables import apot, weights_only

        return weights_only(self, model, context, apot)
