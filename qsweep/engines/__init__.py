"""The `target` family: one file an engine."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.engines.base import EngineConfig, Runner

if TYPE_CHECKING:
    Engine = EngineConfig
else:
    Engine = family(EngineConfig, __name__)

__all__ = ["Engine", "EngineConfig", "Runner"]
