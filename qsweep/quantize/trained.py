from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator

from qsweep.config import Listed
from qsweep.quantize.base import Bits, Uniform
from qsweep.stage import Context
from qsweep.tasks.base import Precision, Schedule

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel
    from qsweep.hub.insert import Place
    from qsweep.quantize._fake import FakeActivation, FakeWeight
    from qsweep.quantize.ptq import PTQ


class Trained(Uniform):
    """Fine-tunes with the rounding in the forward pass. A method is a pair of fake quantizers.

    Starts from the PTQ state that the other fields describe. Batch norm stays live and is folded into the scales, so
    the integers that were trained are the integers that are shipped. A training that was killed goes on from its last
    whole epoch. Raises, beside what every quantization does, NotFinite for a loss that is not, and TaskFailure for a
    model that `task.training.compile` cannot take or whose parameters are all frozen.
    """

    modes: ClassVar[tuple[str, ...]] = ("static", "token")
    epochs: Annotated[int, Field(ge=1)] = 1
    """Over the train split."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.01, with the optimizer adamw 0.0003."""
    schedule: Schedule = "one_cycle"
    """one_cycle warms up from a 25th of the rate in the first 30 % of the steps; cosine begins at its highest."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """null: that of the task's training. Scales and clips of grids have none of it."""
    bits_schedule: Listed[tuple[Bits, ...]] = ()
    """Bits to train at before `weight_bits`, highest first, such as [8, 4]; the epochs are split over all of them, and
    each has a schedule of its own. Activations are lowered alike, not under `activation_bits`."""
    precision: Precision = "fp32"
    """Of convolutions and linears in training; bf16 is quicker where the processor multiplies it in hardware (AMX,
    GPUs), slower elsewhere. Weights, scales and what is shipped are float32 either way."""

    @model_validator(mode="after")
    def _an_epoch_for_each_width(self) -> Trained:
        widths = self.widths()
        if widths != sorted(set(widths), reverse=True):
            raise ValueError(f"`bits_schedule` must be falling (got {list(self.bits_schedule)})")
        if self.epochs < len(widths):
            raise ValueError(f"`epochs` must be at least {len(widths)}, one for each of the bits {widths}")
        return self

    def canonical(self) -> Self:
        return super().canonical().model_copy(update={"bits_schedule": tuple(self.widths()[:-1])})

    def widths(self) -> list[int]:
        """Weight bits in the order of training; those of the schedule that are not above `weight_bits` are left out."""
        return [*(bits for bits in self.bits_schedule if bits > self.weight_bits), self.weight_bits]

    def epochs_at(self) -> list[int]:
        """Epochs for each of `widths`, as even as can be, the last ones the longer."""
        count = len(self.widths())
        return [(self.epochs + place) // count for place in range(count)]

    def starts_from(self) -> PTQ | None:
        """What chooses the integers that training starts from; None: the nearest levels."""
        return None

    @abstractmethod
    def activation(self, place: Place) -> FakeActivation:
        """The fake quantizer of the tensor at `place`."""

    @abstractmethod
    def weight(self, place: Place) -> FakeWeight:
        """The fake quantizer of the weight at `place`."""

    def label(self) -> str:
        epochs = [f"e{self.epochs}"] if self.epochs != 1 else []
        return "-".join([super().label(), *epochs, *(str(bits) for bits in self.widths()[:-1])])

    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        from qsweep.quantize._training import trained

        return trained(self, model, context)
