from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from qsweep.quantize.base import Calibration, Uniform
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.rounding import Nearest, Rounding
from qsweep.quantize.trained import Trained

if TYPE_CHECKING:
    from qsweep.hub.insert import Place
    from qsweep.quantize._fake import FakeActivation, FakeWeight


class LSQ(Trained):
    """Learned step size quantization: the scales of weights and activations are trained like weights.

    The gradient of a step is that of equation 3, times 1/sqrt(N * Qp) (section 2.2), N the weights or the features of
    one sample that share it. Asymmetric tensors that can be negative learn their offset, too (LSQ+); zero stays on the
    grid. Steps start from the calibrated grids, with the least squared error if no field says otherwise.

    Source: Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 5; Bhalgat et al., "LSQ+: Improving
    low-bit quantization through learnable offsets and better initialization" (2020), equations 3 to 6.
    """

    method: Literal["lsq"] = "lsq"
    version: ClassVar[int] = 11
    # The paper starts from 2 * mean|w| / sqrt(Qp). On a ResNet-20 with 8-bit activations that is 85.1 % (4 bits) and
    # 65.5 % (3 bits) before the first step of training, the least squared error 85.9 % and 70.3 %.
    weight_range: Literal["minmax", "mse"] = "mse"
    """What a step starts from: the largest weight, or the least squared error of the rounding."""
    calibration: Calibration = "mse"
    """How ranges follow from what calibration saw: where the steps of activations start."""
    rounding: Rounding = Nearest()
    """The integers that training starts from, as `ptq` chooses them: `nearest`, `adaround` or `gptq`. Each weight
    starts where it is, or at the edge of its integer's step."""

    @model_validator(mode="after")
    def _starts_where_rounding_can(self) -> LSQ:
        if self.rounding.by_outputs and (self.widths()[:-1] or self.weight_granularity == "tensor"):
            raise ValueError(
                "`rounding` must be `nearest` where `bits_schedule` begins with more bits, and where "
                "`weight_granularity` is `tensor`"
            )
        return self

    @property
    def looks_at_samples(self) -> bool:
        return super().looks_at_samples or self.rounding.by_outputs

    def starts_from(self) -> PTQ | None:
        if not self.rounding.by_outputs:
            return None
        shared = {name: getattr(self, name) for name in Uniform.model_fields if name != "method"}
        return PTQ(**shared, rounding=self.rounding)

    def label(self) -> str:
        """As of every training, with `-adaround` or `-gptq` for what it starts from."""
        return super().label() + (f"-{self.rounding.label()}" if self.rounding.by_outputs else "")

    def activation(self, place: Place) -> FakeActivation:
        from qsweep.quantize._fake_activations import LearnedStep

        return LearnedStep(self, place)

    def weight(self, place: Place) -> FakeWeight:
        from qsweep.quantize._fake_weights import LearnedStepWeight

        return LearnedStepWeight(self, place)
