"""A few numbers of a split, by which another one is told apart: its samples are asked for anew in every process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qsweep.tasks.base import Samples

Seen = list[list[float]]
"""How many there are and some of the numbers, of inputs and of labels."""

_SAMPLES, _NUMBERS = 16, 4
"""So many samples are looked at, and so many numbers of each."""
_SAME = 1e-4
"""Of the largest: how far numbers may be apart that were computed on another number of threads."""


def seen(samples: Samples) -> Seen:
    found = []
    for part in samples:
        rows = part[:: -(-len(part) // _SAMPLES)]
        rows = rows.reshape(len(rows), -1)
        numbers = rows[:, :: max(1, rows.shape[1] // _NUMBERS)][:, :_NUMBERS]
        found.append([float(len(part)), *numbers.double().flatten().tolist()])
    return found


def alike(one: Iterable[Sequence[float]], other: Iterable[Sequence[float]]) -> bool:
    """Whether two may be of the same samples."""
    return all(map(_alike, one, other))


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    most = _SAME * max(map(abs, filter(math.isfinite, one[1:])), default=0.0)
    return len(one) == len(other) and all(
        a == b or abs(a - b) <= most or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True)
    )
