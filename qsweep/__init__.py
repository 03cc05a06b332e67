"""qsweep: find the compressed version of a PyTorch model to ship.

The public names are imported when they are first used: `import qsweep` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsweep.errors import QsweepError
    from qsweep.records import Metrics, Record
    from qsweep.ship.compress import compress
    from qsweep.ship.model import load
    from qsweep.ship.registry import promote
    from qsweep.ship.select import Selector
    from qsweep.spec import Compression, Spec, TrialConfig, load_spec
    from qsweep.sweep import run
    from qsweep.tasks import Samples, Task

__all__ = [
    "Compression",
    "Metrics",
    "QsweepError",
    "Record",
    "Samples",
    "Selector",
    "Spec",
    "Task",
    "TrialConfig",
    "compress",
    "load",
    "load_spec",
    "promote",
    "run",
]

_HOMES = {
    "errors": ("QsweepError",),
    "records": ("Metrics", "Record"),
    "ship": ("Selector", "compress", "load", "promote"),
    "spec": ("Compression", "Spec", "TrialConfig", "load_spec"),
    "sweep": ("run",),
    "tasks": ("Samples", "Task"),
}
_MODULES = {name: f"qsweep.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module `qsweep` has no attribute `{name}`")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
