from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from qsweep.quantize.base import Grids, Uniform
from qsweep.quantize.rounding import Nearest, Rounding
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class PostTraining(Grids):
    """What a trained model can be given without training: fields that `ptq` and `mixed` share."""

    modes: ClassVar[tuple[str, ...]] = ("static", "dynamic", "token")
    equalize: bool = False
    """Cross-layer equalization (Nagel et al. 2019, section 4.1, equations 11 to 13): channels between two layers with
    nothing but ReLU or pooling between them get one range, which tells most for weights with one scale a tensor. ReLU6
    does not let it through."""
    smooth: Annotated[float, Field(gt=0, lt=1)] | None = None
    """SmoothQuant (Xiao et al. 2023, section 4, equation 4): the share, alpha, of the activations' outliers that moves
    into the weights behind layer norms; 0.5 is usual. null: none."""
    rounding: Rounding = Nearest()
    """How weights get their levels: `nearest`, `adaround` or `gptq`, or the method with its fields, such as `{method:
    adaround, iterations: 200}`. The last two tell most at 4 bits and less, and look at up to 1024 of the
    calibration samples, as many as fit in 512 MiB; GPTQ takes about a third of AdaRound's time."""
    bias_correction: bool = False
    """Add to every bias what rounding takes from the mean output of its channel on the calibration samples (Nagel et
    al. 2019, section 4.2)."""

    @property
    def looks_at_samples(self) -> bool:
        return super().looks_at_samples or self.rounding.by_outputs or self.bias_correction or self.smooth is not None

    def label(self) -> str:
        """As of every grid, with `-cle`, `-smooth0.5`, `-adaround` and `-bc` for what is on."""
        flags = [(self.equalize, "cle"), (self.smooth, f"smooth{self.smooth}")]
        flags += [(self.rounding.by_outputs, self.rounding.label()), (self.bias_correction, "bc")]
        return "-".join([super().label(), *(name for on, name in flags if on)])


class PTQ(PostTraining, Uniform):
    """Post-training static quantization: fit every grid to what calibration saw, train nothing.

    The order is: equalize and smooth, calibrate, round, correct the biases.
    Source: Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.
    """

    version: ClassVar[int] = 8
    method: Literal["ptq"] = "ptq"

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.hub.convert import convert
        from qsweep.quantize._bias import correct
        from qsweep.quantize._calibrate import calibrated
        from qsweep.quantize._rounding import round_weights

        observed = calibrated(self, model, context)
        if self.rounding.by_outputs:
            round_weights(self, observed, context)
        if self.bias_correction:
            correct(self, model, context, observed)
        return convert(observed)
