"""Steps of a plan that become one kernel: sums and functions joined to the layer that gives what they read, and sums to
the norm of the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import fx

from qsweep.cuda.steps import Add, Inner, Layer, Map, Norm, Operand, Step, reads, writes


def with_residuals(steps: list[Step], shapes: Mapping[fx.Node, torch.Size]) -> list[Step]:
    """Sums joined to the layer that gives one of their two sides, where nothing else reads that side and none is
    repeated."""
    readers = _readers(steps)
    places = {value.node: place for place, step in enumerate(steps) for value in writes(step)}
    found: list[Step | None] = list(steps)
    for place, step in enumerate(steps):
        if not isinstance(step, Add) or step.grid is None:
            continue
        if len({shapes[step.out], *(shapes[side.node] for side in (step.left, step.right))}) > 1:
            continue
        sides = sorted([(step.left, step.right), (step.right, step.left)], key=lambda pair: -places[pair[0].node])
        for own, other in sides:
            layer = found[places[own.node]]
            if isinstance(layer, Layer) and layer.residual is None and readers[own.node] == 1:
                found[places[own.node]] = None
                found[place] = _joined(layer, step, own, other)
                break
    return [step for step in found if step is not None]


def with_tables(steps: list[Step]) -> list[Step]:
    """Functions of a layer's integers joined to it, where nothing else reads these."""
    readers = _readers(steps)
    layers = {step.out: step for step in steps if isinstance(step, Layer) and step.grid is not None}
    taken = {
        step.given.node: step
        for step in steps
        if isinstance(step, Map) and step.given.node in layers and readers[step.given.node] == 1
    }
    found: list[Step] = []
    for step in steps:
        if isinstance(step, Layer) and step.out in taken:
            found.append(replace(step, then=taken[step.out]))
        elif not (isinstance(step, Map) and taken.get(step.given.node) is step):
            found.append(step)
    return found


def with_totals(steps: list[Step]) -> list[Step]:
    """Sums joined to the first layer norm of the same two values, in the place of whichever came first."""
    sums = {(step.left, step.right): step for step in steps if isinstance(step, Add) and step.grid is not None}
    norms: dict[Add, Norm] = {}
    for step in steps:
        if isinstance(step, Norm) and len(step.sides) == 2 and step.sides in sums:
            norms.setdefault(sums[step.sides], step)
    joined: dict[Step, Step] = {step: replace(norm, total=add) for add, norm in norms.items() for step in (add, norm)}
    return list(dict.fromkeys(joined.get(step, step) for step in steps))


def _readers(steps: list[Step]) -> dict[fx.Node, int]:
    """How often each integer value is read."""
    found: dict[fx.Node, int] = {}
    for step in steps:
        for node in reads(step):
            found[node] = found.get(node, 0) + 1
    return found


def _joined(layer: Layer, add: Add, own: Operand, other: Operand) -> Layer:
    inner = Inner(own.grid, layer.bounds)
    return replace(layer, out=add.out, grid=add.grid, bounds=add.bounds, inner=inner, residual=other)
