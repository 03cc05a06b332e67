from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from qsweep.stage import Context, Stage

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel

Scheme = Literal["symmetric", "asymmetric"]


class Quantization(Stage):
    """Makes the hub form: a graph whose weights and activations lie on integer grids."""

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        """Return the hub form of `model`, which is not changed."""


class Uniform(Quantization):
    """Equally spaced levels: symmetric weights per output channel, activations per tensor."""

    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    """Under 8 bits the kernels stay int8 and the file gets smaller."""
    activation_bits: Annotated[int, Field(ge=4, le=8)] = 8
    activation_scheme: Scheme = "asymmetric"
    """Symmetric fixes zero at the middle of the grid (at its lower end for tensors that are never negative, such as a
    ReLU's output); asymmetric fits the grid to the range seen."""
    calibration_samples: Annotated[int, Field(ge=1)] = 512
    """Training samples, drawn with the sweep's seed, whose activations set the ranges."""

    def label(self) -> str:
        return f"{self.method}-w{self.weight_bits}s-a{self.activation_bits}{self.activation_scheme[0]}"
