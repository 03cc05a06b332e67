"""The `quantize` family: one file a method."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.quantize.base import Quantization

if TYPE_CHECKING:
    Quantize = Quantization
else:
    Quantize = family(Quantization, __name__)

__all__ = ["Quantization", "Quantize"]
