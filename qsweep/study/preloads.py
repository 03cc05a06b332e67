"""What is imported once, before workers are forked."""

from __future__ import annotations

from qsweep.spec import Spec
from qsweep.study.points import working

_ALWAYS = (
    "torch",
    "torch._inductor.compile_fx",
    "sympy.physics.units",  # Inductor's compilation
    "qsweep.jobs",
)
"""What workers of `qsweep.jobs` need and what takes long to import."""


def preloads(spec: Spec) -> list[str]:
    """That, behind what the engines of `spec` need."""
    return list(dict.fromkeys([*(name for engine in working(spec) for name in engine.preload), *_ALWAYS]))
