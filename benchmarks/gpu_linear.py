"""Linears of few rows, which are bound by reading their weights: 8 and 4 bits against bf16."""

from __future__ import annotations

from functools import partial

import gpu_asked as asked
import torch
from gpu_clock import Bench, Call
from gpu_rows import Rows
from torch import Tensor

from qsweep.cuda.arithmetic import Output, Requantize
from qsweep.cuda.layers import Product
from qsweep.cuda.linear import linear, linear_w4, pack_weight, pack_weight4
from qsweep.cuda.tune import tune

_COPIES = 12
"""Weights that take turns, so that each has left the cache when it is read again."""


def linears(bench: Bench, rows: Rows) -> None:
    for count in asked.LINEAR_ROWS:
        name = asked.linear(count)
        if rows.settled(name):
            continue
        with rows.guard(name), torch.no_grad():
            bench.need(5)
            times, wrong = _measured(bench, min(count, 4) if bench.tiny else count)
            ratios = ", ".join(f"{label} {times['bf16'] / ms:.2f}x" for label, ms in times.items() if label != "bf16")
            measured = f"{ratios} of bf16's {1e3 * times['bf16']:.1f} µs" + "".join(f"; {text} WRONG" for text in wrong)
            rows.add(name, measured, not wrong)


def _measured(bench: Bench, count: int) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of one product by what computes it, and which of them are not what they should be."""
    side, copies = (64, 1) if bench.tiny else (asked.LINEAR_SIDE, _COPIES)
    generator = torch.Generator(bench.device).manual_seed(0)

    def integers(rows: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (rows, side), generator=generator, device=bench.device, dtype=torch.int8)

    x, weights = integers(count, -128, 128), [integers(side, -7, 8) for _ in range(copies)]
    half, halves = x.bfloat16() / 64, [weight.bfloat16() for weight in weights]
    scale, zeros = torch.full((side,), 1e-2, device=bench.device), torch.zeros(side, device=bench.device)
    requantize = Requantize(zeros.int(), scale, Output(3))
    packed, packed4 = [*map(pack_weight, weights)], [*map(pack_weight4, weights)]
    out8, out4, out = torch.empty_like(x), torch.empty_like(x), torch.empty_like(half)
    products = [
        Product("", f"{kernel.__name__} {count}x{side}x{side}", count, side, side, partial(kernel, x, weight[0], *rest))
        for kernel, weight, rest in (
            (linear, packed, (requantize, out8)),
            (linear_w4, packed4, (requantize, out4)),
        )
    ]
    if bench.gpu:
        tune(products, bench.device)
    tile8, tile4 = (product.tile for product in products)
    turns: dict[str, Call] = {
        "bf16": lambda: [torch.mm(half, weight.t(), out=out) for weight in halves],
        "int8": lambda: [linear(x, weight, requantize, out8, tile=tile8) for weight in packed],
        "int8, weights of 4 bits": lambda: [linear_w4(x, weight, requantize, out4, tile=tile4) for weight in packed4],
    }
    for call in turns.values():
        call()
    sums = (x.double() @ weights[-1].double().t()).float()
    expected = (sums * scale).clamp(-131, 124).round() + 3
    wrong = [label for label, found in (("int8", out8), ("4 bits", out4)) if not torch.equal(found.float(), expected)]
    times = bench.times({label: bench.replayed(call) for label, call in turns.items()})
    return {label: ms / copies for label, ms in times.items()}, wrong
