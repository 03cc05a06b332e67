from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from qsweep.quantize.trained import Trained

if TYPE_CHECKING:
    from qsweep.hub.insert import Place
    from qsweep.quantize._fake import FakeActivation, FakeWeight


class QAT(Trained):
    """Quantization-aware training with gradients straight through the rounding; ranges follow the data.

    Weights: the range of the weights of each step. Activations: moving averages of the ends of the batches before. The
    gradient of a value x is the one that arrives where low - 1/2 < x / scale + zero_point < high + 1/2, where it rounds
    to a level of the grid, else 0.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013); Jacob et al.,
    "Quantization and Training of Neural Networks" (2018), section 3.
    """

    method: Literal["qat"] = "qat"
    version: ClassVar[int] = 11

    def activation(self, place: Place) -> FakeActivation:
        from qsweep.quantize._fake_activations import MovingRange

        return MovingRange(self, place)

    def weight(self, place: Place) -> FakeWeight:
        from qsweep.quantize._fake_weights import RangeWeight

        return RangeWeight(self, place)
