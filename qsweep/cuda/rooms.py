"""Memory that values share: once the last step that reads one has run, its room is another's."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qsweep.cuda.plan import Plan
from qsweep.cuda.products import PRODUCTS
from qsweep.cuda.steps import OF_IMAGES, Float, Move, Rows, Step, reads, real_reads, writes, writes_real
from qsweep.hub.kinds import COMPUTE

Key = tuple[fx.Node, bool]
"""A value: its node, and whether it is the real one."""
_FOREVER = sys.maxsize
_SLACK = 64
"""Bytes past the end, for the channels past the last one of a part of a buffer."""
_WASTE = 2
"""A room is not given to values that need less than its size over this."""


def last_reads(plan: Plan, *, together: bool) -> dict[Key, int]:
    """The number of the last step that reads each value; `together`: or any other that may lie in the same memory.

    Ops that move integers, and those that PyTorch runs, may give views of what they are given.
    """
    last: dict[Key, int] = {}
    written: set[Key] = set()
    others: defaultdict[Key, set[Key]] = defaultdict(set)
    for number, step in enumerate(plan.steps):
        given = [*((node, False) for node in reads(step)), *((node, True) for node in real_reads(step))]
        real, out = writes_real(step), [(value.node, False) for value in writes(step)]
        out += [(step.out, False)] if isinstance(step, Rows) else []
        out += [] if real is None else [(real, True)]
        last |= dict.fromkeys([*given, *out], number)
        written.update(out)
        if together and _may_be_views(step):
            for one in written.intersection(given):
                others[one].update(out)
                for made in out:
                    others[made].add(one)
    last[plan.result, True] = _FOREVER
    return _joined(last, others)


def _may_be_views(step: Step) -> bool:
    if isinstance(step, Move):
        return step.node.target not in OF_IMAGES
    return isinstance(step, Float) and step.node.target not in PRODUCTS | COMPUTE


def _joined(last: dict[Key, int], others: dict[Key, set[Key]]) -> dict[Key, int]:
    """The greatest number among all that hang together."""
    found: dict[Key, int] = {}
    for key in last:
        if key in found:
            continue
        group, ends = {key}, [key]
        while ends:
            ends = [other for end in ends for other in others.get(end, ()) if other not in group]
            group.update(ends)
        found |= dict.fromkeys(group, max(last[one] for one in group))
    return found


@dataclass
class Rooms:
    """Memory for the values of `plan`, step by step; `shared`: false gives each value its own."""

    plan: Plan
    device: torch.device
    shared: bool
    bytes: int = 0
    """Of all rooms together."""
    _last: dict[Key, int] = field(init=False)
    _taken: list[tuple[int, Hashable, Tensor]] = field(default_factory=list)
    _free: defaultdict[Hashable, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """By frame."""

    def __post_init__(self) -> None:
        self._last = last_reads(self.plan, together=True)

    def begin(self, step: int) -> None:
        """What the steps before number `step` have read for the last time is free."""
        for last, frame, room in self._taken:
            if last < step:
                self._free[frame].append(room)
        self._taken = [taken for taken in self._taken if taken[0] >= step]

    def take(self, key: Key, count: int, *, frame: Hashable = None, fill: int = 0, own: bool = False) -> Tensor:
        """int8 (`count`,) for the value `key`, in steps from now to the last that reads it.

        `frame`: where pixels around an image hold `fill`, what tells their places; no other values come there. `own`:
        all of it holds `fill`, and is never shared.
        """
        shared = self.shared and not own
        frame = None if frame is None else (frame, fill)
        room = self._fitting(frame, count) if shared else None
        if room is None:
            room = torch.full((count + _SLACK,), fill, dtype=torch.int8, device=self.device)
            self.bytes += room.numel()
        if shared and self._last[key] < _FOREVER:
            self._taken.append((self._last[key], frame, room))
        return room[:count]

    def _fitting(self, frame: Hashable, count: int) -> Tensor | None:
        """The smallest free room for so many bytes."""
        free = self._free[frame]
        fits = [place for place, room in enumerate(free) if count <= room.numel() - _SLACK <= _WASTE * count]
        return free.pop(min(fits, key=lambda place: free[place].numel())) if fits else None


@dataclass(frozen=True)
class Forget:
    """Lets go of what PyTorch has computed, so that its memory is free for what comes."""

    floats: dict[fx.Node, Any]
    nodes: list[fx.Node]

    def __call__(self) -> None:
        for node in self.nodes:
            del self.floats[node]
