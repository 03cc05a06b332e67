from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from qsweep.cuda import fake_quantize as fused
from qsweep.quantize import _fake as plain

BLOCK = 2048
SPECIAL = [0.0, -0.0, 0.5, 1.5, -2.5, 1e30, -1e30, 4194305.0]

cases = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**16)
bits = st.sampled_from([2, 3, 4, 8])
scales = st.floats(2**-8, 4, width=32)
shapes = st.sampled_from([(1,), (7,), (BLOCK,), (BLOCK + 1,), (2, 3, 5, 4), (3, 2 * BLOCK + 5)])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
forms = st.sampled_from(["number", "tensor", "offset"])


def drawn(shape: tuple[int, ...], seed: int, spread: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Values, some on the edges between levels and far out, and the gradient that arrives at what is made of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: values.numel()]
    if seed % 2:
        values = values.div(spread).mul(4).round().div(4).mul(spread)
    gradient = torch.randn(shape, generator=generator)
    if len(shape) == 4 and seed % 3:
        values = values.contiguous(memory_format=torch.channels_last)
    return values.to(dtype).to(device), gradient.to(dtype).to(device)


def run(call: Callable[..., Tensor], values: Tensor, gradient: Tensor, *learned: Tensor) -> list[Tensor]:
    """Outputs, and gradients of `values` and of what is learned."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (values, *learned)]
    outputs = call(*leaves)
    outputs.backward(gradient)  # type: ignore[no-untyped-call]
    return [outputs.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def agree(found: list[Tensor], expected: list[Tensor], gradient: Tensor, span: float) -> None:
    """The first two to the bit, sums to the error of so many terms in float32, each at most `span` wide."""
    assert len(found) == len(expected)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    unit = 2**-22 if gradient.dtype is torch.float32 else 2**-7  # the plain ops take outputs rounded to bf16
    error = unit * span * gradient.float().abs().sum().item() + 1e-6
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, atol=error, rtol=0)


@cases
@given(shape=shapes, seed=seeds, bits=bits, scale=scales, dtype=dtypes, moving=st.booleans(), rectified=st.booleans())
def test_straight_through_is_that_of_the_plain_ops(
    device: str, shape: Any, seed: int, bits: int, scale: float, dtype: torch.dtype, moving: bool, rectified: bool
) -> None:
    steps, step = 2**bits - 1, torch.tensor(scale, device=device)
    values, gradient = drawn(shape, seed, scale * steps / 3, dtype, device)
    bottom: Any = -float(seed % (steps + 1))
    bottom = torch.tensor(bottom, device=device) if moving else bottom
    assert fused.takes(values, step, bottom)
    expected = run(lambda v: plain.straight_through(v, step, bottom, steps, rectified=rectified), values, gradient)
    margins = (0.0 if rectified else 0.5, 0.5)
    agree(
        run(lambda v: fused.straight_through(v, step, bottom, steps, margins), values, gradient), expected, gradient, 0
    )


@cases
@given(
    shape=shapes,
    seed=seeds,
    bits=bits,
    scale=scales,
    dtype=dtypes,
    form=st.sampled_from(["number", "tensor", "offset"]),
)
def test_a_learned_step_is_that_of_the_plain_ops(
    device: str, shape: Any, seed: int, bits: int, scale: float, dtype: torch.dtype, form: str
) -> None:
    steps, step = 2**bits - 1, torch.tensor(scale, device=device)
    values, gradient = drawn(shape, seed, scale * steps / 3, dtype, device)
    bottom: Any = -float(seed % (steps + 1))
    offset = [torch.tensor(bottom * scale, device=device)] if form == "offset" else []
    bottom = bottom if form == "number" else torch.tensor(bottom, device=device)
    assert fused.takes(values, step, bottom)
    found, expected = (
        run(lambda v, s, *o, of=of: of.learned_step(v, s, bottom, steps, 0.25, *o), values, gradient, step, *offset)
        for of in (fused, plain)
    )
    agree(found, expected, gradient, 2 * steps)


@cases
@given(
    rows=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    columns=st.sampled_from([1, 9, 32, BLOCK + 3]),
    seed=seeds,
    bits=bits,
    form=st.sampled_from(["number", "one", "rows"]),
)
def test_a_learned_step_for_each_channel_or_group_is_that_of_the_plain_ops(
    device: str, rows: Any, columns: int, seed: int, bits: int, form: str
) -> None:
    steps, generator = 2**bits - 1, torch.Generator().manual_seed(seed)
    scale = (torch.rand(*rows, 1, generator=generator) + 0.1).to(device)
    scale = scale[:1, :1].expand(*rows, 1) if seed % 5 == 0 else scale
    values, gradient = drawn((*rows, columns), seed, steps / 3, torch.float32, device)
    fitted = torch.randint(-steps, 1, (*rows, 1), generator=generator).float().to(device)
    bottom: Any = {"number": -float(steps // 2), "one": fitted[:1, :1], "rows": fitted}[form]
    assert fused.takes(values, scale, bottom)
    for found, expected in (
        [
            run(lambda v, s, of=of: of.learned_step(v, s, bottom, steps, 0.25), values, gradient, scale)
            for of in (fused, plain)
        ],
        [
            run(lambda v: fused.straight_through(v, scale, bottom, steps, (0.5, 0.5)), values, gradient),
            run(lambda v: plain.straight_through(v, scale, bottom, steps), values, gradient),
        ],
    ):
        agree(found, expected, gradient, 4 * steps)


@cases
@given(shape=shapes, seed=seeds, bits=bits, dtype=dtypes, low=st.integers(-8, 0), learns=st.booleans())
def test_a_learned_clip_is_that_of_the_plain_ops(
    device: str, shape: Any, seed: int, bits: int, dtype: torch.dtype, low: int, learns: bool
) -> None:
    steps = 2**bits - 1
    ends = [torch.tensor(low / 3, device=device), torch.tensor(1.7, device=device)]
    scale = (ends[1] - ends[0]) / steps
    bottom: Any = (ends[0] / scale).round() if seed % 2 else -float(seed % (steps + 1))
    values, gradient = drawn(shape, seed, 2.0, dtype, device)
    found, expected = (
        run(
            lambda v, *e, of=of: of.learned_clip(v, *(e or ends), scale, bottom, steps),
            values,
            gradient,
            *ends * learns,
        )
        for of in (fused, plain)
    )
    agree(found, expected, gradient, 4)


def test_sums_are_the_same_bits_each_time(device: str) -> None:
    values, gradient = drawn((3, 4 * BLOCK + 7), 1, 3.0, torch.float32, device)
    step = torch.tensor(0.3, device=device)
    runs = [run(lambda v, s: fused.learned_step(v, s, -4.0, 15, 1.0), values, gradient, step) for _ in range(3)]
    assert all(torch.equal(one[2], runs[0][2]) for one in runs)


def test_values_that_are_not_numbers_stay_so(device: str) -> None:
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device)
    step = torch.tensor(0.5, device=device)
    for bottom in (-2.0, torch.tensor(-2.0, device=device)):
        found, expected = (of.learned_step(values, step, bottom, 3, 1.0) for of in (fused, plain))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[1:], expected[1:])


def test_what_the_kernels_are_not_for_is_told(device: str) -> None:
    values, step = torch.randn(4, 6, device=device), torch.tensor(0.5, device=device)
    assert fused.takes(values, step, 0.0)
    assert fused.takes(values, step.expand(4, 1), 0.0)
    assert not fused.takes(values.half(), step, 0.0)
    assert not fused.takes(values, step.expand(1, 6), 0.0)
    assert not fused.takes(values.bfloat16(), step.expand(4, 1), 0.0)  # float32 comes out of that
    assert not fused.takes(values.t(), step.expand(6, 1), 0.0)
    assert not fused.takes(values, step, step.expand(4, 1))
    assert not fused.takes(values[:0], step, 0.0)
