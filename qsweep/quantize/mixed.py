from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from qsweep.config import Listed
from qsweep.quantize.base import Bits
from qsweep.quantize.ptq import PTQ, PostTraining
from qsweep.stage import Context

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class Mixed(PostTraining):
    """Post-training quantization with bits by layer, within a budget.

    Every layer is scored at every candidate width by what the model suffers when that layer alone is rounded; an
    integer programme then picks a width for each layer, the sum of scores least and the cost within the budget (Yao et
    al. 2021, "HAWQ-V3", section 3.4). The scores do not depend on the budget: they are computed once for all of
    `average_bits: {choice: [3, 4, 5]}`, and each budget is a trial with metrics of its own. `layer_bits` and
    `edge_bits` settle the layers they name beforehand.
    """

    method: Literal["mixed"] = "mixed"
    version: ClassVar[int] = PTQ.version  # what it ends in
    average_bits: Annotated[float, Field(ge=2, le=16)] = 4.0
    """The budget: no more than what all layers of so many bits would cost."""
    budget: Literal["bytes", "bit_operations"] = "bytes"
    """What costs: the bits of the weights, or multiply-accumulates times weight bits times activation bits. Not time:
    every engine runs all widths of up to 8 bits on the same int8 kernels."""
    candidates: Annotated[Listed[tuple[Bits, ...]], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """The widths a layer may have."""
    sensitivity: Literal["fisher", "output_error", "kl"] = "fisher"
    """How a layer's width is scored. fisher: the squared error of its weights, each weighted by its Fisher information
    (Li et al. 2021, "BRECQ", section 3.3); the quickest, and it needs labels. output_error: the squared error of the
    model's outputs. kl: the Kullback-Leibler divergence of their softmax."""
    sensitivity_samples: Annotated[int, Field(ge=1)] = 256
    """Training samples that the scores are computed on."""

    @field_validator("candidates")
    @classmethod
    def _rising(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(widths)) < len(widths):
            raise ValueError("must be different widths")
        return tuple(sorted(widths))

    def canonical(self) -> Self:
        return super().canonical().model_copy(update={"calibration_seed": self.calibration_seed})  # scores draw with it

    @model_validator(mode="after")
    def _possible(self) -> Mixed:
        if self.average_bits < min(self._widths()):
            raise ValueError(f"`average_bits` must be at least the least of `candidates` (got {self.average_bits:g})")
        return self

    def _widths(self) -> tuple[int, ...]:
        return *self.candidates, *self.layer_bits.values()

    def _width(self) -> str:
        return f"{self.average_bits:g}"

    def label(self) -> str:
        """As `ptq`, with the average of bits; `-bops`, `-kl` and the like for what is not the default."""
        flags = ["bops"] if self.budget == "bit_operations" else []
        if self.sensitivity != type(self).model_fields["sensitivity"].default:
            flags.append(self.sensitivity)
        return "-".join([super().label(), *flags])

    def with_bits(self, bits: dict[str, int]) -> PTQ:
        """The PTQ that gives each weight named its bits."""
        shared = set(PostTraining.model_fields) - {"method", "layer_bits"}
        fields = {name: getattr(self, name) for name in shared}
        return PTQ(**fields, layer_bits=self.layer_bits | {escape(name): width for name, width in bits.items()})

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.quantize._layer_bits import chosen

        bits = chosen(self, model, context)
        context.progress("bits by layer: " + ", ".join(f"{name} {width}" for name, width in bits.items()))
        return self.with_bits(bits).apply(model, context)
