"""Fake quantization in one pass against the plain ops: Triton's kernels and the loops of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qsweep.quantize import _fake as plain
from qsweep.quantize import _fused as fused
from qsweep.quantize import _loops as loops

BLOCK = 2048  # of both
SPECIAL = [0.0, -0.0, 0.5, 1.5, -2.5, 1e30, -1e30, 4194305.0]

cases = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**16)
bits = st.sampled_from([2, 3, 4, 8])
scales = st.floats(2**-8, 4, width=32)
shapes = st.sampled_from([(1,), (7,), (BLOCK,), (BLOCK + 1,), (2, 3, 5, 4), (3, 2 * BLOCK + 5)])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
forms = st.sampled_from(["number", "tensor", "offset"])


@pytest.fixture(scope="module", params=["cuda", "loops"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """Triton's, in its interpreter unless there is a GPU, and the CPU's."""
    if request.param == "loops":
        request.getfixturevalue("compiler")
        return loops
    pytest.importorskip("triton")
    from qsweep.cuda import fake_quantize

    return fake_quantize


@pytest.fixture(scope="module")
def place(kernels: Any, device: str) -> str:
    return "cpu" if kernels is loops else device


def drawn(shape: tuple[int, ...], seed: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values, some on the edges between levels and far out, and the gradient that arrives at what is made of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * spread
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: values.numel()]
    if seed % 2:
        values = values.div(spread).mul(4).round().div(4).mul(spread)
    gradient = torch.randn(shape, generator=generator)
    if len(shape) == 4 and seed % 3:
        values = values.contiguous(memory_format=torch.channels_last)
    return values.to(dtype), gradient.to(dtype)


def run(call: Callable[..., Tensor], place: str, gradient: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Outputs, and gradients of `leaves`, on the CPU; `call` is given them on `place`."""
    given = [tensor.detach().to(place).requires_grad_() for tensor in leaves]
    outputs = call(*given)
    outputs.backward(gradient.to(place))  # type: ignore[no-untyped-call]
    return [outputs.detach().cpu(), *(leaf.grad.cpu() for leaf in given if leaf.grad is not None)]


def agree(found: list[Tensor], expected: list[Tensor], gradient: Tensor, span: float) -> None:
    """The first two to the bit, sums to the error of so many terms in float32, each at most `span` wide."""
    assert len(found) == len(expected)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)
    unit = 2**-22 if gradient.dtype is torch.float32 else 2**-7  # the plain ops take outputs rounded to bf16
    error = unit * span * gradient.float().abs().sum().item() + 1e-6
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, atol=error, rtol=0)


def on(place: str, bottom: float | Tensor) -> Any:
    return bottom.to(place) if isinstance(bottom, Tensor) else bottom


@cases
@given(shape=shapes, seed=seeds, bits=bits, scale=scales, dtype=dtypes, moving=st.booleans(), rectified=st.booleans())
def test_straight_through_is_that_of_the_plain_ops(
    kernels: Any,
    place: str,
    shape: Any,
    seed: int,
    bits: int,
    scale: float,
    dtype: torch.dtype,
    moving: bool,
    rectified: bool,
) -> None:
    steps, step, margins = 2**bits - 1, torch.tensor(scale), (0.0 if rectified else 0.5, 0.5)
    values, gradient = drawn(shape, seed, scale * steps / 3, dtype)
    number = -float(seed % (steps + 1))
    bottom = torch.tensor(number) if moving else number
    expected = run(lambda v: plain._StraightThrough.apply(v, step, bottom, steps, margins), "cpu", gradient, values)  # type: ignore[no-untyped-call]
    grid = (step.to(place), on(place, bottom), steps)
    found = run(lambda v: fused.straight_through(kernels, v, *grid, margins), place, gradient, values)
    agree(found, expected, gradient, 0)


@cases
@given(shape=shapes, seed=seeds, bits=bits, scale=scales, dtype=dtypes, form=forms)
def test_a_learned_step_is_that_of_the_plain_ops(
    kernels: Any, place: str, shape: Any, seed: int, bits: int, scale: float, dtype: torch.dtype, form: str
) -> None:
    steps, step = 2**bits - 1, torch.tensor(scale)
    values, gradient = drawn(shape, seed, scale * steps / 3, dtype)
    number = -float(seed % (steps + 1))
    bottom = number if form == "number" else torch.tensor(number)
    learned = [values, step, *([torch.tensor(number * scale)] if form == "offset" else [])]

    def reference(v: Tensor, s: Tensor, o: Tensor | None = None) -> Tensor:
        return plain._LearnedStep.apply(v, s, o, bottom, steps, 0.25)  # type: ignore[no-any-return, no-untyped-call]

    def one_pass(v: Tensor, s: Tensor, o: Tensor | None = None) -> Tensor:
        return fused.learned_step(kernels, v, s, on(place, bottom), steps, 0.25, o)

    agree(run(one_pass, place, gradient, *learned), run(reference, "cpu", gradient, *learned), gradient, 2 * steps)


@cases
@given(
    rows=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    columns=st.sampled_from([1, 9, 32, BLOCK + 3]),
    seed=seeds,
    bits=bits,
    form=st.sampled_from(["number", "one", "rows"]),
)
def test_steps_of_channels_or_groups_are_those_of_the_plain_ops(
    kernels: Any, place: str, rows: Any, columns: int, seed: int, bits: int, form: str
) -> None:
    steps, generator = 2**bits - 1, torch.Generator().manual_seed(seed)
    scale = torch.rand(*rows, 1, generator=generator) + 0.1
    scale = scale[:1, :1].expand(*rows, 1) if seed % 5 == 0 else scale
    values, gradient = drawn((*rows, columns), seed, steps / 3, torch.float32)
    fitted = torch.randint(-steps, 1, (*rows, 1), generator=generator).float()
    bottom = -float(steps // 2) if form == "number" else fitted if form == "rows" else fitted[:1, :1]
    assert fused.fits(values, scale, bottom)

    def reference(v: Tensor, s: Tensor) -> Tensor:
        return plain._LearnedStep.apply(v, s, None, bottom, steps, 0.25)  # type: ignore[no-any-return, no-untyped-call]

    def one_pass(v: Tensor, s: Tensor) -> Tensor:
        return fused.learned_step(kernels, v, s, on(place, bottom), steps, 0.25, None)

    learned = values, scale
    agree(run(one_pass, place, gradient, *learned), run(reference, "cpu", gradient, *learned), gradient, 4 * steps)


@cases
@given(shape=shapes, seed=seeds, bits=bits, dtype=dtypes, low=st.integers(-8, 0), learns=st.booleans())
def test_a_learned_clip_is_that_of_the_plain_ops(
    kernels: Any, place: str, shape: Any, seed: int, bits: int, dtype: torch.dtype, low: int, learns: bool
) -> None:
    steps, ends = 2**bits - 1, [torch.tensor(low / 3), torch.tensor(1.7)]
    scale = (ends[1] - ends[0]) / steps
    bottom = (ends[0] / scale).round() if seed % 2 else -float(seed % (steps + 1))
    values, gradient = drawn(shape, seed, 2.0, dtype)
    learned = [values, *(ends if learns else [])]

    def reference(v: Tensor, *e: Tensor) -> Tensor:
        return plain._LearnedClip.apply(v, *(e or ends), scale, bottom, steps)  # type: ignore[no-any-return, no-untyped-call]

    def one_pass(v: Tensor, *e: Tensor) -> Tensor:
        low, high = e or tuple(end.to(place) for end in ends)
        return fused.learned_clip(kernels, v, low, high, scale.to(place), on(place, bottom), steps)

    agree(run(one_pass, place, gradient, *learned), run(reference, "cpu", gradient, *learned), gradient, 4)


def test_sums_are_the_same_bits_each_time_and_on_any_number_of_threads(kernels: Any, place: str) -> None:
    values, gradient = drawn((2, 12 * BLOCK + 7), 1, 3.0, torch.float32)
    found, learned = [], (values, torch.tensor(0.3), torch.tensor(-1.2))

    def one_pass(v: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return fused.learned_step(kernels, v, s, torch.tensor(-4.0, device=place), 15, 1.0, o)

    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(one_pass, place, gradient, *learned))
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def test_values_that_are_not_numbers_stay_so(kernels: Any, place: str) -> None:
    values, step = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]), torch.tensor(0.5)
    for bottom in (-2.0, torch.tensor(-2.0)):
        found = kernels.on_grid(values.to(place), step.to(place), on(place, bottom), 3).cpu()
        assert found.isnan().tolist() == [True, False, False, False]
        assert torch.equal(found[1:], plain._on_grid(values, step, bottom, 3)[0][1:])


def test_what_kernels_are_not_for_is_told() -> None:
    values, step = torch.randn(4, 6), torch.tensor(0.5)
    assert fused.fits(values, step, 0.0)
    assert fused.fits(values, step.expand(4, 1), 0.0)
    assert not fused.fits(values.half(), step, 0.0)
    assert not fused.fits(values, step.expand(1, 6), 0.0)
    assert not fused.fits(values.bfloat16(), step.expand(4, 1), 0.0)  # float32 comes out of that
    assert not fused.fits(values.t(), step.expand(6, 1), 0.0)
    assert not fused.fits(values, step, step.expand(4, 1))
    assert not fused.fits(values[:0], step, 0.0)


def test_activations_and_weights_of_the_cpu_go_through_the_loops(compiler: None) -> None:
    step, many = torch.tensor(0.5), torch.randn(2, 8, 32, 32)
    assert fused.kernels_for(many, step, 0.0) is loops
    assert fused.kernels_for(many.contiguous(memory_format=torch.channels_last), step, step) is loops
    assert fused.kernels_for(many.reshape(16, -1), step.expand(16, 1), 0.0) is loops
    for other in (many[..., 1:], many.half()):
        assert fused.kernels_for(other, step, 0.0) is None
    assert fused.kernels_for(many, step.expand(2, 1, 1, 1), 0.0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 15, BLOCK, 3 * BLOCK + 17])
def test_extremes_are_those_of_the_tensor_and_nan_where_there_is_one(count: int, dtype: torch.dtype) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    assert [found.item() for found in fused.extremes(values)] == [values.min().item(), values.max().item()]
    values[count // 2] = -torch.inf
    assert fused.extremes(values)[0] == -torch.inf
    values[-1] = torch.nan
    assert all(found.isnan() for found in fused.extremes(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margins", [(0.5, 0.5), (0.0, 0.5)])
@pytest.mark.parametrize("bottom", [-4.0, 0.0, torch.tensor(-3.0)], ids=["signed", "unsigned", "moving"])
def test_what_a_compiled_step_lets_pass_is_what_an_eager_one_does(
    bottom: float | Tensor, margins: tuple[float, float], dtype: torch.dtype
) -> None:
    ends = torch.tensor([0.0, -0.5, 7.0, 7.5, -4.0, -4.5, 3.0, 3.5])
    ratio = torch.cat([ends, ends.nextafter(ends + 1), ends.nextafter(ends - 1), torch.linspace(-20, 20, 401)]).to(
        dtype
    )
    ratio = torch.cat([ratio, torch.tensor([1e30, -1e30, torch.inf, -torch.inf], dtype=dtype)])
    eager = plain._passed(torch.ones_like(ratio), ratio, bottom, 7, margins)
    assert torch.equal(plain._inside(ratio, bottom, 7, margins).to(dtype), eager)


def test_on_a_gpu_for_which_nothing_can_be_compiled_plain_ops_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsweep.quantize._fused.no_kernels", lambda: "no compiler")
    assert fused._of.__wrapped__("cuda") is None


def test_without_a_compiler_plain_ops_do_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values, step = torch.randn(2**15), torch.tensor(0.3)
    expected = plain.straight_through(values, step, -4.0, 7)
    monkeypatch.setenv("PATH", str(tmp_path))
    loops._library.cache_clear()
    try:
        assert fused.kernels_for(values, step, -4.0) is None
        assert torch.equal(plain.straight_through(values, step, -4.0, 7), expected)
    finally:
        loops._library.cache_clear()
