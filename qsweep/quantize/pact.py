from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field

from qsweep.quantize.base import Calibration
from qsweep.quantize.trained import Trained

if TYPE_CHECKING:
    from qsweep.hub.insert import Place
    from qsweep.quantize._fake import FakeActivation, FakeWeight


class PACT(Trained):
    """Parameterized clipping: the ends of activation ranges are trained, with a pull towards zero.

    The gradient of an end is what arrives at the values beyond it (equation 3). Tensors that are never negative learn
    their upper end, as in the paper; of others, symmetric ones learn one for both sides and asymmetric ones both.
    Ends start from the calibrated ranges rather than from 10. Weights: the range of the weights of each step, gradients
    straight through.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks" (2018), section 3.
    """

    method: Literal["pact"] = "pact"
    version: ClassVar[int] = 11
    modes: ClassVar[tuple[str, ...]] = ("static",)
    clip_decay: Annotated[float, Field(ge=0)] = 2e-4
    """Weight of half the squared ends in the loss."""
    calibration: Calibration = "mse"
    """How ranges follow from what calibration saw: where the ends start."""

    def canonical(self) -> Self:
        return super().canonical().with_defaults(*["clip_decay"] * (self.activation_bits is None))

    def activation(self, place: Place) -> FakeActivation:
        from qsweep.quantize._fake_activations import LearnedClip

        return LearnedClip(self, place, self.clip_decay)

    def weight(self, place: Place) -> FakeWeight:
        from qsweep.quantize._fake_weights import RangeWeight

        return RangeWeight(self, place)
