"""Equality of kernels with the reference, roofs of the device, and single convolutions against cuDNN."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import gpu_asked as asked
import torch
from gpu_asked import Shape
from gpu_clock import Bench, Call, reason
from gpu_fused import conv_relu
from gpu_models import HALVES, folded, quantized
from gpu_rows import Rows
from torch import Tensor, nn

from qsweep.cuda.arithmetic import Output, Requantize, Tile
from qsweep.cuda.bind import Binding
from qsweep.cuda.chain import Chain
from qsweep.cuda.linear import linear, pack_weight
from qsweep.cuda.plan import plan
from qsweep.cuda.tune import tune
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter


def module(shape: Shape) -> nn.Module:
    """The convolution with its ReLU, and what reads its result as integers."""
    conv = nn.Conv2d(shape.given, shape.out, shape.size, shape.stride, shape.size // 2, groups=shape.groups)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()


def linears(bench: Bench) -> QuantizedModel:
    """The middle of a transformer's layer."""
    width = 32 if bench.tiny else 384
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).eval()
    return quantized(folded(layers, width))


class Convolutions:
    """The integer graphs of all shapes: made once, for equality and for time."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.shapes = [shape.small() for shape in asked.SHAPES] if bench.tiny else list(asked.SHAPES)

    @cached_property
    def models(self) -> list[QuantizedModel]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [self._model(number, shape) for number, shape in enumerate(self.shapes)]

    def _model(self, number: int, shape: Shape) -> QuantizedModel:
        model = folded(module(shape), shape.given, shape.side, shape.side)
        return quantized(replace(model, example=model.example + (number - 5) / 3))

    def equality(self, rows: Rows) -> None:
        equal, wrong = 0, []
        for shape, model in zip(self.shapes, self.models, strict=True):
            found = differences(Chain(model, 2, self.bench.device, {}, keep=True), model, self.bench.device)
            equal += not found.wrong
            wrong += [f"{shape.name}: {text}" for text in found.wrong]
        rows.add(
            asked.EQUAL_CONVOLUTIONS,
            f"{equal} of {len(self.shapes)}" + "".join(f"; {text}" for text in wrong[:3]),
            not wrong,
        )

    def linear_equality(self, rows: Rows) -> None:
        model = linears(self.bench)
        found = differences(Chain(model, 2, self.bench.device, {}, keep=True), model, self.bench.device)
        rows.add(asked.EQUAL_LINEARS, told(found), not found.wrong)

    def speed(self, rows: Rows, roofs: Roofs, batch: int) -> None:
        """All shapes at `batch`; block shapes of all are compiled side by side first."""
        self.bench.need(8)
        count = min(batch, 2) if self.bench.tiny else batch
        names = [asked.convolution(shape, batch) for shape in asked.SHAPES]
        bound = {number: self._bound(number, count) for number, name in enumerate(names) if not rows.settled(name)}
        if self.bench.gpu:
            tune([product for binding in bound.values() for product in binding.products], self.bench.device)
        for number, binding in bound.items():
            name = names[number]
            with rows.guard(name):
                self.bench.need(2)
                measured = self._speed(roofs, number, count, binding)
                rows.add(name, measured, "WRONG" not in measured)

    def _bound(self, number: int, count: int) -> Binding:
        return Binding(plan(self.models[number], count), self.bench.device, keep=True)

    def _speed(self, roofs: Roofs, number: int, count: int, binding: Binding) -> str:
        shape, model = self.shapes[number], self.models[number]
        equal = self._fill(binding, model, count)
        calls: dict[str, Call] = {"int8": binding.products[0]} | baselines(shape, count, self.bench)
        times = self.bench.kernel_times(calls)
        best = min((other for other in times if other != "int8"), key=times.__getitem__)
        ratio = times[best] / times["int8"]
        floor = roofs.floor_ms(*shape.work(count))
        measured = f"{1e3 * times['int8']:.1f} µs, {ratio:.2f}x {best} ({1e3 * times[best]:.1f} µs)"
        measured += f", {floor / times['int8']:.0%} of the floor" if floor else ""
        return measured + ("" if equal else "; WRONG")

    def _fill(self, binding: Binding, model: QuantizedModel, batch: int) -> bool:
        """Launch everything once, so that buffers hold real numbers: kernels are faster on zeros. Whether the result is
        that of the reference."""
        (given,) = [node for node in model.graph.graph.nodes if node.op == "placeholder"]
        example = example_of(model.example, batch)
        binding.floats[given] = example.to(self.bench.device).contiguous()
        for launch in binding.launches:
            launch()
        expected = example_of(IntegerInterpreter(model.graph)(model.example), batch)
        return torch.equal(binding.floats[binding.plan.result].cpu(), expected)


def told(found: Differences) -> str:
    return "; ".join(found.wrong[:3]) or f"{found.tensors} of {found.tensors} int8 tensors and the output"


@dataclass
class Differences:
    """The int8 tensors of a chain beside the reference's, on the model's two examples."""

    wrong: list[str]
    """Which differ, one line each."""
    tensors: int
    first: float
    """Share of elements that differ in the first tensor behind a float op that is not exact; 0 where there is none."""
    all: float
    """The same of all tensors."""
    far: float
    """Share of all elements that are more than one level apart."""


def differences(chain: Chain, model: QuantizedModel, device: torch.device) -> Differences:
    reference = IntegerInterpreter(model.graph)
    reference.keep = True
    expected = reference(model.example)
    given = chain(model.example.to(device)).cpu()
    apart = {
        name: (found.cpu().int() - reference.tensors[name].int()).abs() for name, found in chain.integers().items()
    }
    shares = {name: (levels > 0).float().mean().item() for name, levels in apart.items()}
    wrong = [f"{name} differs in {share:.2%} of its elements" for name, share in shares.items() if share]
    exact = chain.integer_share == 1.0  # floating point on a GPU and on a CPU parts in the last bits
    if exact and not torch.equal(given, expected):
        wrong.append("the output differs")
    levels = torch.cat([found.flatten() for found in apart.values()])
    first = next(filter(None, shares.values()), 0.0)
    far, all_ = ((levels > least).float().mean().item() for least in (1, 0))
    return Differences(wrong, len(apart), first, all_, far)


def baselines(shape: Shape, batch: int, bench: Bench) -> dict[str, Call]:
    """The convolution with bias and ReLU in bf16 and fp16: PyTorch's ops, channels last and for depthwise ones, which
    cuDNN is slow at so, channels first, too; and cuDNN's fused one."""
    found: dict[str, Call] = {}
    formats = {"": torch.channels_last} | ({", channels first": torch.contiguous_format} if shape.groups > 1 else {})
    for label, dtype in HALVES.items():
        for layout, memory in formats.items():
            conv = module(shape)[:2].to(bench.device, dtype).to(memory_format=memory)
            x = torch.randn(batch, shape.given, shape.side, shape.side, device=bench.device).to(dtype)
            x = x.contiguous(memory_format=memory)
            found[f"{label} conv, relu{layout}"] = partial(conv, x)
            if bench.gpu and not layout:
                window = conv[0].stride, conv[0].padding, conv[0].dilation, conv[0].groups
                found[f"{label} cudnn fused"] = partial(conv_relu, x, conv[0].weight, conv[0].bias, *window)
    return {label: call for label, call in found.items() if _runs(call)}


@torch.no_grad()
def _runs(call: Call) -> bool:
    """Whether it does: not every shape has a fused kernel."""
    try:
        call()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError:
        return False
    return True


@dataclass
class Roofs:
    """Bytes and operations a second that this device reached."""

    bytes: float = 0.0
    bf16: float = 0.0

    def floor_ms(self, operations: float, bytes: float) -> float | None:
        """The larger of moving the bytes and of computing at twice the bf16 rate."""
        if not self.bytes or not self.bf16:
            return None
        return 1e3 * max(bytes / self.bytes, operations / (2 * self.bf16))


TILES = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(128, 128, 128, 8, 3),
    Tile(256, 128, 64, 8, 4),
    Tile(64, 256, 128, 4, 3),
)
"""Block shapes tried for the large square product."""


def roofs(bench: Bench, rows: Rows, found: Roofs) -> None:
    """Copy bandwidth (bytes read and written), and matrix rates on random numbers."""
    size, side = (1 << 16, 64) if bench.tiny else (1 << 31, 8192)
    with rows.guard(asked.COPY):
        bench.need(5)
        source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
        target = torch.empty_like(source)
        ms = bench.times({"copy": lambda: target.copy_(source)})["copy"]
        found.bytes = 2e3 * size / ms
        rows.add(asked.COPY, f"{found.bytes / 1e12:.2f} TB/s", True)
    operations = 2.0 * side**3
    with rows.guard(asked.BF16):
        bench.need(5)
        a, b = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        ms = bench.times({"bf16": lambda: torch.mm(a, b.t(), out=out)})["bf16"]
        found.bf16 = 1e3 * operations / ms
        rows.add(asked.BF16, f"{found.bf16 / 1e12:.0f} T/s at {side}³", True)
    if rows.settled(asked.INT8, asked.MATRIX):  # floors need the others
        return
    with rows.guard(asked.MATRIX):
        bench.need(15)
        _matrix(bench, rows, side, operations)


def _matrix(bench: Bench, rows: Rows, side: int, operations: float) -> None:
    a, b = (torch.randint(-127, 128, (side, side), device=bench.device, dtype=torch.int8) for _ in range(2))
    bias = torch.zeros(side, dtype=torch.int32, device=bench.device)
    requantize = Requantize(bias, torch.full((side,), 1e-4, device=bench.device), Output(3))
    out, packed = torch.empty_like(a), pack_weight(b)

    def product(tile: Tile) -> Call:
        return lambda: linear(a, packed, requantize, out, tile=tile)

    calls: dict[str, Any] = {"torch._int_mm": lambda: torch._int_mm(a, b.t())}
    expected = ((calls["torch._int_mm"]().float() * requantize.multiplier).clamp(-131, 124).round() + 3).to(torch.int8)
    failed, equal = [], True
    for tile in (Tile(32, 32, 32),) if bench.tiny else TILES:
        label = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
        try:
            product(tile)()
        except Exception as error:  # a block shape that this GPU has too little shared memory for
            failed.append(reason(error))
            continue
        calls[label] = product(tile)
        equal = equal and torch.equal(out, expected)
    if len(calls) == 1:
        raise RuntimeError(failed[0])
    times = bench.times(calls)
    roof = times.pop("torch._int_mm")
    best = min(times, key=times.__getitem__)
    rows.add(asked.INT8, f"{operations / roof / 1e9:.0f} T/s at {side}³", True)
    share = roof / times[best]
    measured = f"{share:.0%}: {operations / times[best] / 1e9:.0f} T/s, blocks {best}" + ("" if equal else "; WRONG")
    rows.add(asked.MATRIX, measured, equal and share >= 0.7)


def summary(rows: Rows) -> None:
    """The target over all wide convolutions, those measured earlier too."""
    wide = [
        asked.convolution(shape, n)
        for shape in asked.SHAPES
        for n in asked.CONVOLUTION_BATCHES
        if shape.wide and n >= 32
    ]
    if ratios := [*rows.ratios(wide).values()]:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        span = f"({min(ratios):.2f} to {max(ratios):.2f}){rows.signs(wide)}"
        measured = f"{mean:.2f}x over {len(ratios)} of {len(wide)} {span}"
        rows.add(asked.WIDE, measured, mean >= 1.3 and len(ratios) == len(wide))


def example_of(tensor: Tensor, batch: int) -> Tensor:
    """`batch` samples out of two, in an order without a period: one that is taken for another shows."""
    return tensor[torch.randint(2, (batch,), generator=torch.Generator().manual_seed(0))]
