from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from qsweep.stage import Context, Stage

if TYPE_CHECKING:
    from torch import nn


class Pruning(Stage):
    """Removes weights. Zeros made here stay zero through every later stage."""

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Return `model`, changed in place, with some weights of its convolutions and linears exactly zero."""
