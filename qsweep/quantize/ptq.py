from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from qsweep.quantize.base import Grids, Uniform
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class PostTraining(Grids):
    """What a trained model can be given without training: fields that `ptq` and `mixed` share."""


class PTQ(PostTraining, Uniform):
    """Post-training static quantization: fit every grid to what calibration saw, train nothing.

    Source: Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.
    """

    method: Literal["ptq"] = "ptq"

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.hub.convert import convert
        from qsweep.quantize._calibrate import calibrated

        return convert(calibrated(self, model, context))
