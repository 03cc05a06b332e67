from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.quantize.base import Calibration
from qsweep.quantize.trained import Trained

if TYPE_CHECKING:
    from qsweep.hub.insert import Place
    from qsweep.quantize._fake import FakeActivation, FakeWeight


class DoReFa(Trained):
    """Weights bent by tanh before they are rounded, so that large ones do not set the scale; activations clipped.

    What is shipped are the rounded values of tanh(w), whose scale keeps max|tanh(w)| where equation 9 divides by it: a
    model that is trained already starts near where it was, the nearer the smaller its weights are (tanh(1) is 0.76).
    As the integer contract wants a level at zero, there are 2^b - 1 of them rather than 2^b. Activations are clipped
    to the calibrated ranges, which stay fixed, rather than to [0, 1]; gradients are not quantized.
    `weight_granularity: tensor` is the paper's one scale a layer.

    Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients"
    (2016), sections 2.3 and 2.4, equations 5, 9 and 11.
    """

    method: Literal["dorefa"] = "dorefa"
    version: ClassVar[int] = 9
    calibration: Calibration = "mse"
    """How ranges follow from what calibration saw: where activations are clipped."""

    def activation(self, place: Place) -> FakeActivation:
        from qsweep.quantize._fake_activations import FixedClip

        return FixedClip(self, place)

    def weight(self, place: Place) -> FakeWeight:
        from qsweep.quantize._fake_weights import TanhWeight

        return TanhWeight(self, place)
