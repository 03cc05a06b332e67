from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from qsweep.stage import Context, Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class Distillation(Stage):
    """Trains the compressed model to follow the uncompressed one."""

    @property
    def trains(self) -> bool:
        """Whether the model is trained before it is quantized."""
        return True

    @abstractmethod
    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """Return `model`, changed in place, fine-tuned on `loss`. Zero weights of a pruned model stay zero."""

    @abstractmethod
    def loss(self, context: Context) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`loss(inputs, outputs, labels)`, also used by quantization-aware training of the same trial."""
