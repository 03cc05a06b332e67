"""The `distill` family: one file a method."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.distill.base import Distillation

if TYPE_CHECKING:
    Distill = Distillation
else:
    Distill = family(Distillation, __name__)

__all__ = ["Distill", "Distillation"]
