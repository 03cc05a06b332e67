"""The `prune` family: one file a method."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.prune.base import Pruning

if TYPE_CHECKING:
    Prune = Pruning
else:
    Prune = family(Pruning, __name__)

__all__ = ["Prune", "Pruning"]
