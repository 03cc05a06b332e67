"""From a finished sweep to production: choose, bundle, register, load, export, apply again."""

from qsweep.ship.compress import compress
from qsweep.ship.export import export
from qsweep.ship.model import LoadedModel, load
from qsweep.ship.registry import Promotion, promote
from qsweep.ship.select import Selector, best
from qsweep.track.bundle import Manifest, bundle, verify

__all__ = [
    "LoadedModel", "Manifest", "Promotion", "Selector", "best", "bundle", "compress", "export", "load", "promote",
    "verify",
]  # fmt: skip
