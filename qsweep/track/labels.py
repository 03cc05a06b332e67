"""Where names stand beside the points of a chart: not on each other, and not on points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_CHART = 530, 310
"""Width and height of a chart of the report within its axes, in pixels, on a screen that is 1400 wide."""
_LETTER, _LINE = 7.0, 13.0
"""Width of a letter and height of a line."""
_POINT = 8.0
"""Half of the width of a point, with its ring."""
PLACES = {
    "top center": (0, 1),
    "bottom center": (0, -1),
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top right": (1, 1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
    "bottom left": (-1, -1),
}
"""Plotly's names of where a text stands, the most usual first: to which side of its point, and whether above it."""


class Box(NamedTuple):
    """A rectangle, in pixels from the lower left."""

    left: float
    bottom: float
    right: float
    top: float


def placed(
    names: Sequence[str], points: Sequence[tuple[float, float]], seen: Sequence[tuple[float, float]]
) -> list[str]:
    """For each of `names` the place beside its point where it covers the least of what is there: names before it, all
    points that are `seen`, the edge. Points are shares of the chart's width and height, from the lower left."""
    taken = [around(point) for point in seen]
    chosen = []
    for name, point in zip(names, points, strict=True):
        boxes = {place: box_of(point, name, place) for place in PLACES}
        best = min(boxes, key=lambda place: _outside(boxes[place]) + sum(overlap(boxes[place], box) for box in taken))
        chosen.append(best)
        taken.append(boxes[best])
    return chosen


def around(point: tuple[float, float]) -> Box:
    x, y = point[0] * _CHART[0], point[1] * _CHART[1]
    return Box(x - _POINT, y - _POINT, x + _POINT, y + _POINT)


def box_of(point: tuple[float, float], name: str, place: str) -> Box:
    own, (side, height), width = around(point), PLACES[place], _LETTER * len(name)
    left = {1: own.right, 0: (own.left + own.right - width) / 2, -1: own.left - width}[side]
    bottom = {1: own.top, 0: (own.bottom + own.top - _LINE) / 2, -1: own.bottom - _LINE}[height]
    return Box(left, bottom, left + width, bottom + _LINE)


def overlap(one: Box, other: Box) -> float:
    """The area that both cover."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.top, other.top) - max(one.bottom, other.bottom)
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: Box) -> float:
    """The area that is not within the chart."""
    return (box.right - box.left) * (box.top - box.bottom) - overlap(box, Box(0, 0, *_CHART))
