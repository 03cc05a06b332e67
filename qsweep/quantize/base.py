from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from qsweep.stage import Context, Stage

if TYPE_CHECKING:
    from torch import nn

    from qsweep.hub.form import QuantizedModel


class Quantization(Stage):
    """Makes the hub form: a graph whose weights and activations lie on integer grids."""

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> QuantizedModel:
        """Return the hub form of `model`, which is not changed."""
