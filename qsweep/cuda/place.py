"""Where the integers of a plan lie: how wide their halos are, and which are parts of others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from qsweep.cuda.buffers import NO_HALO, Halo, Take, Value, allocate
from qsweep.cuda.plan import Plan
from qsweep.cuda.pointwise import DIMENSIONS
from qsweep.cuda.rooms import Rooms
from qsweep.cuda.steps import OF_IMAGES, Layer, Move, Norm, Operand, Quantize, Step, reads, writes
from qsweep.hub.kinds import CONVOLUTIONS, aten
from qsweep.hub.nodes import arguments

IMAGE_CHANNELS = 4
"""Room for channels where at most so many come and only dense convolutions read them: the kernel takes 4-byte loads."""


@dataclass
class Places:
    """Buffers of the integer values of `plan`, made when they are first asked for."""

    plan: Plan
    rooms: Rooms
    halos: dict[fx.Node, Halo] = field(init=False)
    homes: dict[fx.Node, tuple[fx.Node, int]] = field(init=False)
    """Values that are written into a concatenation, and at which channel."""
    found: dict[fx.Node, Value] = field(default_factory=dict)
    operands: dict[fx.Node, Operand] = field(init=False)
    writers: dict[fx.Node, Step] = field(init=False)
    readers: dict[fx.Node, list[Step]] = field(init=False)
    images: set[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        steps = self.plan.steps
        self.operands = {value.node: value for step in steps for value in writes(step)}
        self.writers = {value.node: step for step in steps for value in writes(step)}
        self.readers = {node: [] for node in self.operands}
        for step in steps:
            for node in self.operands.keys() & reads(step):
                self.readers[node].append(step)
        self.homes = _homes(self.plan, self.operands)
        self.halos = _halos(self.plan, self.homes)
        self.images = {node for node in self.operands if self._is_image(node)}

    def __getitem__(self, node: fx.Node) -> Value:
        """Where `node` lies, or is to be written."""
        if node not in self.found:
            self.found[node] = self._placed(node)
        return self.found[node]

    def _placed(self, node: fx.Node) -> Value:
        if node in self.homes:
            whole, start = self.homes[node]
            return self[whole].part(start, self.plan.shapes[node][1])
        order = self._transposed(node)
        if order is not None:  # so that what the transposition gives lies there in order
            moved = torch.Size([self.plan.shapes[node][dim] for dim in order])
            room = allocate(moved, self._take(node), channels=moved[-1], image=False)
            return Value(room.logical.permute([order.index(dim) for dim in range(len(order))]))
        return self.fresh(node, image=node in self.images)

    def _transposed(self, node: fx.Node) -> list[int] | None:
        """The order of dimensions that the only reader of `node` brings about; None where `node` is more than a step
        between floats and a transposition, as the heads of an attention are, and of more dimensions than kernels take.
        """
        if len(self.plan.shapes[node]) > DIMENSIONS:
            return None
        written = isinstance(self.writers[node], Quantize)
        reader = self.readers[node][0] if len(self.readers[node]) == 1 else None
        if not written or not isinstance(reader, Move):
            return None
        given, order = arguments(reader.node), list(range(len(self.plan.shapes[node])))
        if reader.node.target is aten.permute.default:
            return [dim % len(order) for dim in given["dims"]]
        if reader.node.target is aten.transpose.int:
            one, other = given["dim0"], given["dim1"]
            order[one], order[other] = order[other], order[one]
            return order
        return None

    def fresh(self, node: fx.Node, *, image: bool) -> Value:
        """A new buffer for `node`."""
        halo = self.halos.get(node, NO_HALO) if image else NO_HALO
        channels = IMAGE_CHANNELS if image and self.narrow(node) else 0
        return allocate(self.plan.shapes[node], self._take(node), halo=halo, channels=channels, image=image)

    def _take(self, node: fx.Node) -> Take:
        """What a padding copies into is the padding itself, wherever nothing is copied to."""
        own, zero_point = node.target is aten.pad.default, self.operands[node].grid.zero_point
        return lambda count, frame: self.rooms.take((node, False), count, frame=frame, fill=zero_point, own=own)

    def _is_image(self, node: fx.Node) -> bool:
        """Images have their channels last, but for what a layer norm gives; sequences do where convolutions give or
        read them."""
        if self._transposed(node) is not None or isinstance(self.writers[node], Norm):
            return False
        if len(self.plan.shapes[node]) != 3:
            return len(self.plan.shapes[node]) == 4
        around = [self.writers[node], *self.readers[node]]
        return any(isinstance(step, Layer) and step.node.target in CONVOLUTIONS for step in around)

    def narrow(self, node: fx.Node) -> bool:
        """Whether it is an image whose pixels take 4 bytes, no part of any other value."""
        dense = [isinstance(step, Layer) and is_dense(step) for step in self.readers[node]]
        return self.plan.shapes[node][1] <= IMAGE_CHANNELS and node not in self.homes and bool(dense) and all(dense)


def is_dense(layer: Layer) -> bool:
    """Whether it is a convolution of one group."""
    return layer.node.target in CONVOLUTIONS and arguments(layer.node)["groups"] == 1


def padding_of(node: fx.Node) -> Halo:
    """What a convolution pads with."""
    padding = [*arguments(node)["padding"]]
    if node.target is aten.conv1d.default:
        return Halo(0, 0, padding[0], padding[0])
    down, across = (*padding, *padding)[:2]
    return Halo(down, down, across, across)


def spatial_pad(node: fx.Node, rank: int) -> Halo | None:
    """What a pad op adds around images or sequences; None for any other op, and where channels are padded or cut."""
    if node.target is not aten.pad.default or rank not in (3, 4):
        return None
    left, right, top, bottom = (*arguments(node)["pad"], 0, 0, 0, 0)[:4]
    beyond = len(arguments(node)["pad"]) > 2 * (rank - 2)
    return None if beyond or min(left, right, top, bottom) < 0 else Halo(top, bottom, left, right)


def _halos(plan: Plan, homes: dict[fx.Node, tuple[fx.Node, int]]) -> dict[fx.Node, Halo]:
    """As wide as the readers of a value need, those of the whole that it is part of, and what pads it on the way."""
    found: dict[fx.Node, Halo] = {}

    def need(node: fx.Node, halo: Halo) -> None:
        found[node] = found.get(node, NO_HALO).wide_as(halo)
        if node in homes:
            need(homes[node][0], found[node])

    for step in reversed(plan.steps):
        if isinstance(step, Layer) and step.node.target in CONVOLUTIONS:
            need(step.given.node, padding_of(step.node))
        elif isinstance(step, Move):
            pad = spatial_pad(step.node, len(plan.shapes[step.out.node]))
            if pad is not None:
                need(step.given[0].node, pad.plus(found.get(step.out.node, NO_HALO)))
    return found


def _homes(plan: Plan, operands: dict[fx.Node, Operand]) -> dict[fx.Node, tuple[fx.Node, int]]:
    """Parts of concatenations along channels, later and so larger ones first: a part has one home."""
    written = {value.node for step in plan.steps if _writes_anywhere(step) for value in writes(step)}
    homes: dict[fx.Node, tuple[fx.Node, int]] = {}
    for step in reversed(plan.steps):
        if not isinstance(step, Move) or not joins_channels(step.node, len(plan.shapes[step.out.node])):
            continue
        start = 0
        for part in step.given:
            if part.node in written and part.node not in homes:
                homes[part.node] = step.out.node, start
            start += plan.shapes[part.node][1]
    return homes


def _writes_anywhere(step: Step) -> bool:
    """Whether the step's kernel can be told where to write: norms write rows; other moves are views of what they are
    given."""
    if isinstance(step, Norm):
        return False
    return not isinstance(step, Move) or step.node.target in OF_IMAGES | {aten.cat.default}


def joins_channels(node: fx.Node, rank: int) -> bool:
    """Whether it is a concatenation of images, or rows, along the second dimension."""
    return node.target is aten.cat.default and rank in (2, 4) and arguments(node)["dim"] in (1, 1 - rank)
