"""A step of quantization-aware training beside a step in floating point, on the GPU.

The graph has learned steps (LSQ, 8 bits) on every weight and activation that `qsweep.hub` would make integers: eager by
the fused kernels of `qsweep.cuda.fake_quantize`, compiled by plain ops, which the compiler fuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import gpu_asked as asked
import torch
from gpu_clock import Bench, Call
from gpu_models import build
from gpu_rows import Rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qsweep.cuda import fake_quantize
from qsweep.hub.export import export
from qsweep.hub.form import aten, attributes, nodes_of
from qsweep.hub.insert import Place, insert_observers

BATCH = 128
Rounding = Callable[[Tensor, Tensor, float, float, float], Tensor]
"""(values, scale, lowest level, levels less one, factor of the scale's gradient)."""


def plain(values: Tensor, scale: Tensor, bottom: float, steps: float, factor: float) -> Tensor:
    """LSQ in plain ops (Esser et al. 2020, arXiv:1902.08153, equations 1 to 5)."""
    scale = scale * factor + (scale - scale * factor).detach()
    clipped = (values / scale).clamp(bottom, bottom + steps)
    return ((clipped + (clipped.round() - clipped).detach()) * scale).to(values.dtype)


class _Fused(torch.autograd.Function):
    """The same by qsweep's kernels: one pass forward, one back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, bottom: float, steps: float, factor: float) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.numbers = bottom, steps, factor
        return fake_quantize.on_grid(values, scale, bottom, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (values, scale), (bottom, steps, factor) = ctx.saved_tensors, ctx.numbers
        if gradient.stride() != values.stride():
            gradient = torch.empty_like(values).copy_(gradient)
        grid = (values, scale, bottom, steps)
        passed, step, _ = fake_quantize.step_backward(gradient, *grid, (0.0, 0.0), sums=True, offset=False)
        return passed, step * factor, None, None, None


def fused(values: Tensor, scale: Tensor, bottom: float, steps: float, factor: float) -> Tensor:
    return cast(Tensor, _Fused.apply(values, scale, bottom, steps, factor))


class Activation(nn.Module):
    """A learned step, one for the tensor; that of the inputs stays, as in qsweep."""

    def __init__(self, place: Place, rounding: Rounding) -> None:
        super().__init__()
        self.scale, self.rounding = nn.Parameter(torch.tensor(0.05), requires_grad=not place.inputs), rounding
        self.bottom = 0.0 if place.nonnegative else -128.0

    def forward(self, values: Tensor) -> Tensor:
        factor = 1.0 / math.sqrt(values[0].numel() * 255)
        return self.rounding(values, self.scale, self.bottom, 255.0, factor)


class Weight(nn.Module):
    """A learned step for each output channel."""

    def __init__(self, weight: Tensor, rounding: Rounding) -> None:
        super().__init__()
        found = 2 * weight.detach().flatten(1).abs().mean(1, keepdim=True) / math.sqrt(127)
        self.scale, self.rounding = nn.Parameter(found), rounding

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.reshape(len(weight), -1)
        factor = 1.0 / math.sqrt(rows.shape[1] * 127)
        return self.rounding(rows, self.scale, -127.0, 254.0, factor).reshape(weight.shape)


def training_graph(model: nn.Module, side: int, rounding: Rounding | None) -> nn.Module:
    """The traced graph of `model` with batch norms that train; None: without fake quantization."""
    live = export(model, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    for node in nodes_of(live.graph, {aten.batch_norm.default}):
        node.update_arg(5, True)
    live.graph.recompile()
    if rounding is not None:
        weights = dict(attributes(live.graph))
        insert_observers(
            live,
            lambda place: Activation(place, rounding),
            lambda place: Weight(weights[place.layers[0]], rounding),
        )
    return live.graph


def stepper(model: nn.Module, inputs: Tensor, labels: Tensor, *, bf16: bool, compiled: bool) -> Call:
    """One step of SGD with momentum; data and weights are on the device, images channels last."""
    model.to(inputs.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    backend = "inductor" if inputs.is_cuda else "eager"
    run = torch.compile(model, backend=backend, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            outputs = run(inputs).float()
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def captured(step: Call) -> Call:
    """The whole step as one CUDA graph: what its kernels take, where issuing them one by one takes longer."""
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def small() -> nn.Module:
    """For a test."""
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(pooled, nn.Flatten(), nn.Linear(4, 10)).eval()


def steps(bench: Bench, rows: Rows) -> None:
    model, side = (small(), 8) if bench.tiny else build("ResNet-18", False)
    generator, count = torch.Generator().manual_seed(0), 2 if bench.tiny else BATCH
    inputs = torch.randn(count, 3, side, side, generator=generator).to(bench.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (count,), generator=generator).to(bench.device)

    def make(rounding: Rounding | None, bf16: bool, compiled: bool) -> Call:
        graph = training_graph(model, side, rounding)
        step = stepper(graph, inputs, labels, bf16=bf16, compiled=compiled)
        for _ in range(1 if bench.tiny else 3):
            step()
        return step

    with rows.guard([asked.QAT["eager"], asked.QAT_FP32]):
        bench.need(30)
        times = bench.times(
            {
                "qat": make(fused, True, False),
                "bf16": make(None, True, False),
                "fp32": make(None, False, False),
                "qat fp32": make(fused, False, False),
            }
        )
        ratio = times["qat"] / times["bf16"]
        rows.add(asked.QAT["eager"], f"{ratio:.2f} ({times['qat']:.1f} ms, {times['bf16']:.1f} ms)", ratio <= 1.3)
        ratio = times["qat fp32"] / times["fp32"]
        rows.add(asked.QAT_FP32, f"{ratio:.2f} ({times['qat fp32']:.1f} ms, {times['fp32']:.1f} ms)", True)
    with rows.guard(asked.QAT["captured"]):
        bench.need(15)
        times = bench.times({"qat": captured(make(fused, True, False)), "bf16": captured(make(None, True, False))})
        ratio = times["qat"] / times["bf16"]
        rows.add(asked.QAT["captured"], f"{ratio:.2f} ({times['qat']:.1f} ms, {times['bf16']:.1f} ms)", ratio <= 1.3)
    with rows.guard(asked.QAT["compiled"]):
        bench.need(70)
        times = bench.times({"qat": make(plain, True, True), "bf16": make(None, True, True)})
        ratio = times["qat"] / times["bf16"]
        rows.add(asked.QAT["compiled"], f"{ratio:.2f} ({times['qat']:.1f} ms, {times['bf16']:.1f} ms)", ratio <= 1.3)
