from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.quantize.base import Quantization
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


_SAMPLES = 256
"""Whose activations are looked at."""


class Cast(Quantization):
    """Weights and arithmetic in a shorter floating-point type; no calibration.

    fp16 ends at 65504: raises NotFinite for weights and biases beyond it, and for activations that are beyond it on
    training samples.
    """

    seeded: ClassVar[bool] = False
    method: Literal["cast"] = "cast"
    dtype: Literal["bf16", "fp16"] = "bf16"
    """bf16 has the range of float32 and 8 bits of precision, fp16 11 bits and numbers up to 65504."""

    @property
    def not_integer(self) -> str | None:
        return f"it computes in {self.dtype}"

    @property
    def in_float(self) -> bool:
        return True

    def label(self) -> str:
        return self.dtype

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.hub.export import float_graph
        from qsweep.quantize._calibrate import training_inputs
        from qsweep.quantize._finite import check_activations, check_range

        cast = float_graph(model, context).cast_to(self.dtype)
        check_range(cast)
        if self.dtype == "fp16":  # bf16 reaches as far as float32
            check_activations(cast, training_inputs(context, _SAMPLES, context.seed))
        return cast
