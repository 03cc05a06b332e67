"""Which channels of a network go together: those that one cannot take out without the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import fx

from qsweep.hub.nodes import shape_seen

PINNED = 0
"""Stands for all channels that have to stay: inputs, outputs, what an op reads that is not followed."""
Role = Literal["gives", "shifts", "reads", "follows"]


@dataclass(frozen=True)
class Value:
    """A tensor of the graph whose channels are followed."""

    axis: int
    """Along which they lie."""
    channels: list[int]
    """For each index along it; one channel may have several, next to each other after a flatten."""
    silent: bool = True
    """Whether a channel is 0 here once the rows that give it are."""


@dataclass(frozen=True)
class Part:
    """A constant of the graph along one dimension."""

    name: str
    dim: int
    channels: list[int]
    role: Role
    """gives: weights of layers and factors of norms, by what comes out; shifts: biases; reads: weights, by what goes
    in; follows: what else has a number for each channel."""

    @property
    def silences(self) -> bool:
        """Whether a channel is 0 where its entries in all such parts are."""
        return self.role in ("gives", "shifts")


class Width(NamedTuple):
    """Channels that can stand for each other."""

    channels: list[int]
    each: int
    """Rows that one of them has in a weight: more than one in convolutions in groups, which have to stay equal."""


@dataclass(frozen=True)
class Coupling:
    """What is known of the channels of a graph, by number; PINNED is that of all that stay."""

    values: dict[fx.Node, Value]
    parts: list[Part]

    def widths(self) -> list[Width]:
        """The channels that can be taken out, those that the same rows give together."""
        given: dict[int, list[tuple[int, int]]] = {}
        for place, part in enumerate(self.parts):
            for channel, count in Counter(part.channels).items() if part.silences else ():
                given.setdefault(channel, []).append((place, count))
        found: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for channel in sorted(given.keys() - {PINNED}):
            found.setdefault(tuple(given[channel]), []).append(channel)
        return [Width(channels, rows[0][1]) for rows, channels in found.items()]


class Union:
    """Disjoint sets of numbers."""

    def __init__(self) -> None:
        self.parents: list[int] = []

    def fresh(self) -> int:
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def find(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def join(self, some: Sequence[int], others: Sequence[int]) -> None:
        """One by one; the least number stands for a set."""
        for one, other in zip(some, others, strict=True):
            first, second = sorted((self.find(one), self.find(other)))
            self.parents[second] = first


@dataclass
class Walk:
    """What is known of a graph from its begin to a node."""

    graph: fx.GraphModule
    union: Union = field(default_factory=Union)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    parts: dict[tuple[str, int], Part] = field(default_factory=dict)
    claimed: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)
    """Constants and who reads them as parts that are known."""

    def __post_init__(self) -> None:
        assert self.union.fresh() == PINNED

    def coupling(self) -> Coupling:
        for node in self.graph.graph.nodes:
            if node.op == "get_attr" and any((node, user) not in self.claimed for user in node.users):
                for part in self.parts.values():
                    self.fix(part.channels if part.name == node.target else [])

        def final(channels: list[int]) -> list[int]:
            return list(map(self.union.find, channels))

        return Coupling(
            {node: Value(value.axis, final(value.channels), value.silent) for node, value in self.values.items()},
            [Part(part.name, part.dim, final(part.channels), part.role) for part in self.parts.values()],
        )

    def fix(self, channels: list[int]) -> None:
        self.union.join(channels, [PINNED] * len(channels))

    def pin(self, node: fx.Node) -> None:
        self.fix(self.values[node].channels if node in self.values else [])

    def fresh(self, count: int) -> list[int]:
        return [self.union.fresh() for _ in range(count)]

    def claim(self, user: fx.Node, given: Any, dim: int, channels: list[int], role: Role) -> None:
        """`given`, None or a constant, has `channels` along `dim`."""
        if given is None:
            return
        name = str(given.target)
        self.claimed.add((given, user))
        before = self.parts.get((name, dim))
        self.union.join(before.channels if before else channels, channels)
        if before is None or not before.silences:
            self.parts[name, dim] = Part(name, dim, channels, role)


def place_of(node: fx.Node, value: Value) -> int:
    """Where the channels of `node` lie, counted from the right."""
    return len(shape_seen(node)) - value.axis


def size_at(node: fx.Node, place: int) -> int:
    """Along the dimension that is `place` from the right; 1 where there is none."""
    shape = shape_seen(node)
    return shape[-place] if place <= len(shape) else 1
