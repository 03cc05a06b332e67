"""A step of quantization-aware training beside a step in floating point, on the GPU: needs no requirements of qsweep's.

The graph has learned steps (LSQ, 8 bits) on every weight and activation that `qsweep.hub` would make integers, by the
fused kernels of `qsweep.cuda.fake_quantize`. ReLUs and norms are those of the float model: `gpu_training` measures what
qsweep makes of them.
"""

from __future__ import annotations

import math
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
from qsweep.hub.insert import Place, insert_observers
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import attributes, nodes_of
from qsweep.optimizers import DeviceSGD
from qsweep.replay import Recorded, own_stream

BATCH = 128


class _Fused(torch.autograd.Function):
    """LSQ (Esser et al. 2020, arXiv:1902.08153, equations 1 to 5): one pass forward, one back."""

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

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.05), requires_grad=not place.inputs)
        self.bottom = 0.0 if place.nonnegative else -128.0

    def forward(self, values: Tensor) -> Tensor:
        return fused(values, self.scale, self.bottom, 255.0, 1.0 / math.sqrt(values[0].numel() * 255))


class Weight(nn.Module):
    """A learned step for each output channel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        found = 2 * weight.detach().flatten(1).abs().mean(1, keepdim=True) / math.sqrt(127)
        self.scale = nn.Parameter(found)

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.reshape(len(weight), -1)
        return fused(rows, self.scale, -127.0, 254.0, 1.0 / math.sqrt(rows.shape[1] * 127)).reshape(weight.shape)


def training_graph(model: nn.Module, side: int, *, quantized: bool) -> nn.Module:
    """The traced graph of `model` with batch norms that train, with fake quantization or without."""
    live = export(model, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    for node in nodes_of(live.graph, {aten.batch_norm.default}):
        node.update_arg(5, True)
    live.graph.recompile()
    if quantized:
        weights = dict(attributes(live.graph))
        insert_observers(live, Activation, lambda place: Weight(weights[place.layers[0]]))
    return live.graph


def stepper(model: nn.Module, inputs: Tensor, labels: Tensor, *, captured: bool) -> Call:
    """One step of SGD with momentum under autocast; data and weights are on the device, images channels last."""
    model.to(inputs.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = DeviceSGD([{"params": list(model.parameters())}], lr=1e-4, momentum=0.9, nesterov=True)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            outputs = model(inputs).float()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(outputs, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    run = Recorded(step, len(inputs), optimizer.renew) if captured and inputs.is_cuda else step
    return lambda: run(inputs, labels)


def small() -> nn.Module:
    """For a test."""
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(pooled, nn.Flatten(), nn.Linear(4, 10)).eval()


def steps(bench: Bench, rows: Rows) -> None:
    model, side = (small(), 8) if bench.tiny else build("ResNet-18", False)
    generator, count = torch.Generator().manual_seed(0), 2 if bench.tiny else BATCH
    inputs = torch.randn(count, 3, side, side, generator=generator).to(bench.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (count,), generator=generator).to(bench.device)

    def make(quantized: bool, captured: bool) -> Call:
        step = stepper(training_graph(model, side, quantized=quantized), inputs, labels, captured=captured)
        for _ in range(1 if bench.tiny else 5):
            step()
        return step

    for mode, row in asked.QAT.items():
        with rows.guard(row), own_stream(bench.device):
            bench.need(15)
            times = bench.times({"qat": make(True, mode == "captured"), "bf16": make(False, mode == "captured")})
            ratio = times["qat"] / times["bf16"]
            met = mode == "eager" or ratio <= 1.3
            rows.add(row, f"{ratio:.2f} ({times['qat']:.1f} ms, {times['bf16']:.1f} ms)", met)
