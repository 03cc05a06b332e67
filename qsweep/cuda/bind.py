"""The steps of a plan as launches of kernels on buffers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from qsweep.cuda import linear, pointwise, pool
from qsweep.cuda.buffers import NO_HALO, Halo, Value, as_rows, channels_last, up
from qsweep.cuda.layers import Product, product, row_product
from qsweep.cuda.moves import copy, inner_last, move, windows
from qsweep.cuda.norm import layer_norm
from qsweep.cuda.numbers import normed, output_of, product_ratio, ratio, side, table, total_of
from qsweep.cuda.place import IMAGE_CHANNELS, Places, padding_of
from qsweep.cuda.plan import Plan
from qsweep.cuda.products import PRODUCTS, for_products
from qsweep.cuda.rooms import Forget, Rooms, last_reads
from qsweep.cuda.steps import (
    OF_IMAGES,
    Dequantize,
    Float,
    Layer,
    Map,
    Move,
    Multiply,
    Norm,
    Operand,
    Pair,
    Pool,
    Quantize,
    RowLayer,
    Rows,
    Step,
    writes,
)
from qsweep.hub.kinds import LINEARS, QUANTIZE, SIZE, aten
from qsweep.hub.nodes import arguments, constant, source
from qsweep.hub.ops import STORED
from qsweep.hub.weights import real_weight

Launch = Callable[[], Any]


@dataclass
class Binding:
    """`launches` compute `plan` once: from `floats` of the input's node to `floats` of the result's."""

    plan: Plan
    device: torch.device
    attention: torch.dtype = torch.float32
    """Of what products of two activations read; layers that give nothing else write it themselves."""
    keep: bool = False
    """Whether every value has memory of its own, until the next run."""
    rooms: Rooms = field(init=False)
    places: Places = field(init=False)
    launches: list[Launch] = field(default_factory=list)
    floats: dict[fx.Node, Any] = field(default_factory=dict)
    """Real values by node; those that PyTorch computes are new in every run."""
    invalid: Tensor = field(init=False)
    """int32 (1,): not 0 where a NaN was quantized."""
    _images: dict[fx.Node, Value] = field(default_factory=dict)
    _matrices: dict[fx.Node, Value] = field(default_factory=dict)
    _rows: dict[fx.Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Integers and scales."""

    def __post_init__(self) -> None:
        self.rooms = Rooms(self.plan, self.device, shared=not self.keep)
        self.places = Places(self.plan, self.rooms)
        self.invalid = torch.zeros(1, dtype=torch.int32, device=self.device)
        last = last_reads(self.plan, together=False)
        ends: defaultdict[int, list[fx.Node]] = defaultdict(list)
        for step in self.plan.steps:
            if isinstance(step, Float):
                ends[last[step.node, True]].append(step.node)
        for number, step in enumerate(self.plan.steps):
            self.rooms.begin(number)
            self._bind(step)
            self.launches += [Forget(self.floats, ends[number])] if number in ends and not self.keep else []

    @property
    def products(self) -> list[Product]:
        """The launches whose block shape can be chosen."""
        return [launch for launch in self.launches if isinstance(launch, Product)]

    def _bind(self, step: Step) -> None:
        match step:
            case Quantize():
                self.launches.append(partial(self._quantize, step, self.places[step.out.node]))
            case Layer():
                self.launches.append(self._layer(step))
            case Rows():
                self._quantize_rows(step)
            case RowLayer():
                out = self._real(step.node)
                self.launches.append(row_product(self.plan.graph, step, *self._rows[step.rows], out))
            case Pair():
                self._pair(step)
            case Pool():
                self._pool(step)
            case Map():
                self._map(step)
            case Move():
                given = self.places[step.given[0].node]
                if step.node.target in OF_IMAGES:
                    given = self._image(step.given[0], NO_HALO)
                self.launches += move(step, given, self.places)
            case Norm():
                self._norm(step)
            case Dequantize():
                self._dequantize(step)
            case Float():
                self.launches.append(self._float(step.node))

    def _quantize(self, step: Quantize, value: Value) -> None:
        given, grid, out = self.floats[step.given], step.out.grid, value.logical
        if self.places.narrow(step.out.node) and given.dim() == 4:
            pixels = value.around(NO_HALO, IMAGE_CHANNELS)
            pointwise.quantize_images(given, grid.scale, output_of(grid), pixels, invalid=self.invalid)
            return
        out, given = inner_last(out, given, by=given)
        pointwise.quantize(given, grid.scale, output_of(grid), out, invalid=self.invalid)

    def _layer(self, step: Layer) -> Product:
        written = writes(step)
        out = self.places[written[0].node].logical if written else self._real(step.out)
        if step.node.target in LINEARS:
            given, other = self._matrix(step.given), step.residual and self._matrix(step.residual)
        else:
            given = self._image(step.given, padding_of(step.node))
            other = step.residual and self._image(step.residual, NO_HALO)
        return product(self.plan.graph, step, given, other.logical if other else None, out)

    def _quantize_rows(self, step: Rows) -> None:
        depth = self.plan.shapes[step.given][-1]
        count = self.plan.shapes[step.given].numel() // depth
        room = self.rooms.take((step.out, False), count * (up(depth) + torch.float32.itemsize))
        rows, scale = room[: count * up(depth)].view(count, -1), room[count * up(depth) :].view(torch.float32)
        self._rows[step.out] = rows, scale
        self.launches.append(
            lambda: linear.quantize_rows(as_rows(self.floats[step.given]), rows, scale, high=step.high)
        )

    def _pair(self, step: Pair) -> None:
        out = self.places[step.out].logical if step.grid else self._real(step.out)
        left, right = (self.places[each.node].logical.expand(out.shape) for each in (step.left, step.right))
        output = output_of(step.grid, step.bounds) if step.grid else None
        bounds = step.bounds.low, step.bounds.high

        def run() -> None:
            to, one, other = inner_last(out, left, right)
            if isinstance(step, Multiply):
                sides = one, step.left.grid.zero_point, other, step.right.grid.zero_point
                pointwise.multiply(*sides, product_ratio(step), output, to, bounds=bounds)
            else:
                terms = side(step.left, one, step.grid), side(step.right, other, step.grid)
                pointwise.add(*terms, output, to, bounds=bounds)

        self.launches.append(run)

    def _pool(self, step: Pool) -> None:
        out = self.places[step.out].logical if step.grid else self._real(step.out)
        given, grid, pixels = self._image(step.given, NO_HALO).pixels, step.given.grid, channels_last(out)
        multiplier = ratio(grid.scale, step.grid.scale if step.grid else 1.0, step.count)
        numbers = grid.zero_point, multiplier, output_of(step.grid, step.bounds) if step.grid else None
        if step.node.target is aten.adaptive_avg_pool2d.default:
            self.launches.append(partial(pool.global_avg_pool, given, *numbers, pixels[:, 0, 0]))
        else:
            kernel, stride, padding = windows(step.node)
            self.launches.append(
                partial(pool.avg_pool2d, given, *numbers, pixels, kernel=kernel, stride=stride, padding=padding)
            )
        if step.grid is None:
            self.launches.append(partial(out.clamp_, step.bounds.low, step.bounds.high))

    def _map(self, step: Map) -> None:
        found = table(step.node, step.given.grid, step.out.grid).to(self.device)
        given, out = self.places[step.given.node].logical, self.places[step.out.node].logical

        def run() -> None:
            to, values = inner_last(out, given, by=given)
            pointwise.look_up(values, found, to)

        self.launches.append(run)

    def _norm(self, step: Norm) -> None:
        sizes, width = arguments(step.node), self.plan.shapes[step.node][-1]
        parts = [part.to(self.device) for part in normed(self.plan.graph, step)]
        sides = tuple(side(operand, self._row_view(operand, width), None) for operand in step.sides)
        grid, out = step.out.grid, self.places[step.out.node].logical.view(-1, width)
        rest = (*parts, sizes["eps"], output_of(grid), out, self.invalid)
        add = step.total
        total = total_of(add, self.places[add.out].logical.view(-1, width)) if add is not None else None

        def run() -> None:
            layer_norm(sides or as_rows(self.floats[source(step.node)]), *rest, total=total)

        self.launches.append(run)

    def _row_view(self, operand: Operand, width: int) -> Tensor:
        """The integers as rows (M, width); copied once where they do not lie so."""
        values = self.places[operand.node].logical
        try:
            rows = values.view(-1, width)
        except RuntimeError:
            rows = values
        if rows.dim() == 2 and rows.stride(1) == 1:
            return rows
        return self._copied(operand.node, Value(values), self._matrices, image=False).logical.view(-1, width)

    def _dequantize(self, step: Dequantize) -> None:
        given, grid = self.places[step.given.node].logical, step.given.grid
        like = torch.empty_like(given, device="meta")
        like = like if like.dim() <= pointwise.DIMENSIONS else like.contiguous()
        out = self._room(step.out, like.numel(), torch.float32).as_strided(like.shape, like.stride())
        self.floats[step.out] = out

        def run() -> None:
            to, values = inner_last(out, given)
            pointwise.dequantize(values, grid.scale, grid.zero_point, to)

        self.launches.append(run)

    def _real(self, node: fx.Node) -> Tensor:
        """A buffer for the float value of `node`, images with their channels last."""
        shape = self.plan.shapes[node]
        room = self._room(node, shape.numel(), self.attention if for_products(node) else torch.float32)
        if len(shape) == 4:
            room = room.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        elif len(shape) == 3:
            room = room.view(shape[0], shape[2], shape[1]).transpose(1, 2)
        else:
            room = room.view(shape)
        self.floats[node] = room
        return room

    def _room(self, node: fx.Node, count: int, dtype: torch.dtype) -> Tensor:
        """(`count`,) for the real value of `node`."""
        return self.rooms.take((node, True), count * dtype.itemsize).view(dtype)

    def _image(self, operand: Operand, halo: Halo) -> Value:
        """Where `operand` lies channels last and with `halo`; copied there once if it does not."""
        value = self.places[operand.node]
        if value.halo.holds(halo) and value.channels_together:
            return value
        return self._copied(operand.node, value, self._images, image=True)

    def _matrix(self, operand: Operand) -> Value:
        """Where the rows of `operand` lie one number beside the other; copied there once if they do not."""
        value = self.places[operand.node]
        return value if value.rows_together else self._copied(operand.node, value, self._matrices, image=False)

    def _copied(self, node: fx.Node, value: Value, copies: dict[fx.Node, Value], *, image: bool) -> Value:
        if node not in copies:
            copies[node] = self.places.fresh(node, image=image)
            self.launches.append(copy(value.logical, copies[node].logical))
        return copies[node]

    def _float(self, node: fx.Node) -> Launch:
        """An op run by PyTorch; constants among its arguments are brought to the device once."""
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target  # layouts are ours
        for given in node.all_input_nodes:
            self._constant(given)
        narrow = node.target in PRODUCTS and self.attention != torch.float32
        wide_again = narrow and any(user.target is not QUANTIZE for user in node.users)

        def run() -> None:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._argument)
            if narrow:
                args = fx.node.map_aggregate(args, self._narrowed)
            result = target(*args, **kwargs)
            self.floats[node] = result.to(torch.float32) if wide_again else result

        return run

    def _narrowed(self, value: Any) -> Any:
        return value.to(self.attention) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return (
                self.plan.shapes[source(value)][cast(int, value.args[1])]
                if value.target is SIZE
                else self.floats[value]
            )
        return self.device if isinstance(value, torch.device) else value

    def _constant(self, node: fx.Node) -> None:
        """See that the value of `node`, if no input goes into it, is there for all runs."""
        if node in self.floats or node not in self.plan.fixed:
            return
        value = real_weight(self.plan.graph, node) if node.target in STORED else constant(self.plan.graph, node)
        if value is None:
            self._float(node)()
        else:
            self.floats[node] = value.detach().to(self.device)
