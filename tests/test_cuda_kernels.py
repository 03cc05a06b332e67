"""Every kernel against the integer contract of `qsweep.hub.integer`: equal, bit for bit.

In Triton's interpreter; with QSWEEP_GPU=1 in the environment on a GPU.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qsweep.errors import Refused
from qsweep.hub.integer import Accumulator, Bounds, Integers, Product, Sum
from qsweep.hub.integer import quantize as onto

pytest.importorskip("triton", reason="Triton cannot be installed here")

from qsweep.cuda import conv, depthwise, linear, pointwise, pool
from qsweep.cuda.arithmetic import Operand, Output, Requantize, Residual, Tile

SMALL = Tile(64, 32, 32)
"""The interpreter takes as long for each block, whatever its size."""
FULL, SHIFTED, PART = Output(0), Output(3), Output(-4, -100, 120)
UNBOUNDED = Bounds()
UNTOUCHED = 55


def integers(generator: torch.Generator, *shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)


def f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def halo(values: Tensor, padding: int, fill: int, channels: int) -> tuple[Tensor, Tensor]:
    """A buffer of `channels` that holds `values` (N, H, W, C) with pixels of `fill` around them, and its inner view.

    Channels past C hold what no result may depend on.
    """
    n, h, w, c = values.shape
    buffer = torch.full((n, h + 2 * padding, w + 2 * padding, channels), UNTOUCHED, dtype=values.dtype)
    buffer[..., :c] = fill
    inner = buffer[:, padding : padding + h, padding : padding + w, :c]
    inner.copy_(values)
    return buffer, inner


@dataclass(frozen=True)
class Case:
    """A convolution: what it computes and how it lies in memory."""

    size: tuple[int, int] = (8, 7)
    channels: int = 16
    out_channels: int = 24
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: int = 1
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    zero_point: int = -5
    output: Output | None = SHIFTED
    bounds: Bounds = UNBOUNDED
    residual: bool = False
    batch: int = 2
    tile: Tile | None = SMALL
    room: int | None = None
    """Channels of the input's buffer."""
    seed: int = 0

    def check(self, device: str) -> None:
        """Run it, and hold it against the reference arithmetic."""
        g = torch.Generator().manual_seed(self.seed)
        x = integers(g, self.batch, *self.size, self.channels)
        weight = integers(g, self.out_channels, self.channels // self.groups, *self.kernel, low=-127)
        bias = torch.randint(-3000, 3000, (self.out_channels,), generator=g)
        scale, weight_scale = f32(0.037), torch.rand(self.out_channels, generator=g) * 0.01 + 0.001
        centred = x.double().permute(0, 3, 1, 2) - self.zero_point
        sums = functional.conv2d(
            centred, weight.double(), bias.double(), self.stride, self.padding, self.dilation, self.groups
        )
        sums = Accumulator(sums, scale * weight_scale, bounds=self.bounds)
        folded = bias - self.zero_point * weight.long().flatten(1).sum(1)
        expected, numbers, residual = self.finish(sums, folded.int().to(device), g, device)
        self.run(x, weight, expected.permute(0, 2, 3, 1), numbers, residual, device)

    def finish(
        self, sums: Accumulator, bias: Tensor, g: torch.Generator, device: str
    ) -> tuple[Tensor, Requantize, Residual | None]:
        """The expected result (N, OC, OH, OW), and the numbers that the kernel gets."""
        if self.output is None:
            bounds = (self.bounds.low, self.bounds.high)
            return sums.real(), Requantize(bias, sums.step.to(device), None, bounds), None
        own_scale = (sums.sums * sums.step.view(-1, 1, 1)).abs().amax().float() / 150 + 1e-3
        grid = self.output
        if not self.residual:
            numbers = Requantize(bias, (sums.step / own_scale).to(device), grid)
            return onto(sums, float(own_scale), *grid).q, numbers, None
        own, scale, other, other_zero = Output(-7, -100, 90), own_scale * 1.37, own_scale * 0.71, 19
        added = integers(g, *sums.sums.shape)
        left = onto(sums, float(own_scale), *own)
        expected = onto(Sum(left, Integers(added.double(), other, other_zero)), float(scale), *grid).q
        _, values = halo(added.permute(0, 2, 3, 1), 1, 0, added.shape[1] + 5)
        residual = Residual(values.to(device), other_zero, float(other / scale), own, float(own_scale / scale))
        return expected, Requantize(bias, (sums.step / own_scale).to(device), grid), residual

    def run(
        self, x: Tensor, weight: Tensor, expected: Tensor, numbers: Requantize, residual: Residual | None, device: str
    ) -> None:
        n, h, w, c = expected.shape
        dtype = torch.float32 if self.output is None else torch.int8
        buffer = torch.full((n, h + 4, w + 4, c + 3), UNTOUCHED, dtype=dtype, device=device)
        out = buffer[:, 2:-2, 2:-2, : expected.shape[3]]
        module = depthwise if self.groups == self.channels == self.out_channels else conv
        packed = module.pack_weight(weight, self.groups, self.room).to(device)
        given, _ = halo(x, self.padding, self.zero_point, max(packed.shape[-1], self.room or self.channels))
        result = module.conv2d(
            given.to(device),
            packed,
            numbers,
            out,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            residual=residual,
            tile=self.tile,
        )
        assert result is out
        assert torch.equal(out.cpu().double(), expected.double())
        buffer[:, 2:-2, 2:-2, : expected.shape[3]] = UNTOUCHED
        assert (buffer == UNTOUCHED).all()


CASES = {
    "plain": Case(),
    "residual": Case(residual=True),
    "residual, ReLU": Case(residual=True, output=Output(-128)),
    "ReLU": Case(output=Output(-20, -20, 127)),
    "4 bits": Case(output=Output(2, -8, 7)),
    "2 bits, zero point at its end": Case(output=Output(-2, -2, 1)),
    "float32 results": Case(output=None),
    "float32 results, ReLU6": Case(output=None, bounds=Bounds(0.0, 6.0)),
    "odd sizes": Case(size=(5, 9), channels=13, out_channels=17),
    "strides": Case(size=(9, 11), stride=(2, 3)),
    "dilation": Case(size=(9, 10), dilation=(2, 3), padding=3),
    "wide kernel": Case(kernel=(1, 5), padding=2),
    "image": Case(channels=3, size=(11, 9), kernel=(7, 7), stride=(2, 2), padding=3),
    "one channel": Case(channels=1, kernel=(5, 5), padding=2),
    "room for more channels": Case(channels=13, room=48),
    "room of an image for 16 channels": Case(channels=3, room=16),
    "pointwise, room for more channels": Case(kernel=(1, 1), padding=0, channels=5, room=32),
    "groups with room for more channels": Case(channels=32, out_channels=32, groups=2, room=48),
    "depthwise, room for more channels": Case(channels=5, out_channels=5, groups=5, room=80),
    "a step is one tap": Case(channels=32, residual=True),
    "steps across taps": Case(channels=48, tile=Tile(64, 32, 64)),
    "pointwise in rows": Case(kernel=(1, 1), padding=0, channels=40),
    "pointwise, with strides": Case(kernel=(1, 1), padding=0, stride=(2, 2)),
    "groups of 16": Case(channels=32, out_channels=32, groups=2),
    "groups that are joined": Case(channels=32, out_channels=32, groups=8),
    "groups that are joined with more outputs": Case(channels=32, out_channels=64, groups=32),
    "groups that all become one": Case(channels=9, out_channels=6, groups=3),
    "columns past the end of a group": Case(channels=32, out_channels=40, groups=2),
    "depthwise": Case(channels=24, out_channels=24, groups=24),
    "depthwise, strides, dilation": Case(
        channels=20, out_channels=20, groups=20, kernel=(5, 3), stride=(2, 1), dilation=(1, 2), padding=2, size=(9, 10)
    ),
    **{
        f"depthwise, lines of {width}, step {step}": Case(
            channels=16, out_channels=16, groups=16, stride=(1, step), size=(3, width * step), residual=width == 6
        )
        for width, step in ((1, 1), (3, 1), (4, 1), (6, 1), (9, 1), (5, 2), (8, 3))
    },
    "depthwise, blocks of its own": Case(
        channels=40, out_channels=40, groups=40, kernel=(5, 5), padding=2, size=(9, 10), tile=Tile(16, 32, 32, 2)
    ),
    "depthwise, residual": Case(channels=16, out_channels=16, groups=16, residual=True, output=Output(-128)),
    "depthwise, float32 results": Case(channels=16, out_channels=16, groups=16, output=None),
    "split": Case(channels=32, tile=replace(SMALL, split=3)),
    "split, residual": Case(channels=32, residual=True, tile=replace(SMALL, split=4)),
    "split more often than there are steps": Case(channels=4, tile=replace(SMALL, split=8)),
    "split groups": Case(channels=32, out_channels=32, groups=2, tile=replace(SMALL, split=2)),
    "split, float32 results": Case(channels=32, output=None, tile=replace(SMALL, split=2)),
    "default blocks": Case(channels=64, tile=None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_convolution_equals_the_contract_and_writes_nothing_else(case: Case, device: str) -> None:
    case.check(device)


@pytest.mark.parametrize("zero_point", [-128, 0, 1, 16, 127])
@pytest.mark.parametrize("output", [Output(-128), Output(0), Output(127), Output(1)])
def test_zero_points_anywhere_on_the_grid_make_no_difference(zero_point: int, output: Output, device: str) -> None:
    Case(size=(4, 4), channels=4, out_channels=16, batch=1, zero_point=zero_point, output=output).check(device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = draw(st.integers(0, 3))
    size = [draw(st.integers(max(1, (k - 1) * d + 1 - 2 * padding), 9)) for k, d in zip(kernel, dilation, strict=True)]
    low = draw(st.integers(-128, 126))
    high = draw(st.integers(low + 1, 127))
    return Case(
        size=(size[0], size[1]),
        channels=groups * draw(st.integers(1, 20)),
        out_channels=groups * draw(st.integers(1, 20)),
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        zero_point=draw(st.integers(-128, 127)),
        output=draw(st.sampled_from([Output(draw(st.integers(low, high)), low, high)] * 4 + [None])),
        residual=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        tile=Tile(draw(st.sampled_from([32, 128])), 32, draw(st.sampled_from([32, 64])), split=draw(st.integers(1, 3))),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=cases())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_convolution_equals_the_contract(device: str, case: Case) -> None:
    case.check(device)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_the_end_of_int32_are_exact(sign: int, split: int, device: str) -> None:
    depth = 2**31 // (255 * 127) // 16 * 16
    zero_point = -128 if sign > 0 else 127
    x = torch.full((2, depth), 127 if sign > 0 else -128, dtype=torch.int8)
    x[1, ::2] = zero_point
    weight = torch.full((3, depth), 127, dtype=torch.int8)
    weight[1] = -127
    sums = (x.double() - zero_point) @ weight.double().T
    assert sums.abs().max() > 2**31 * 0.999
    bias = (-zero_point * weight.long().sum(1)).int().to(device)
    tile = Tile(16, 16, 4096, split=split) if device == "cpu" else Tile(16, 16, 128, split=split)
    scale = f32(1.7e7)
    out = torch.empty((2, 3), dtype=torch.int8, device=device)
    numbers = Requantize(bias, (torch.ones(3) / scale).to(device), Output(1))
    linear.linear(x.to(device), linear.pack_weight(weight).to(device), numbers, out, tile=tile)
    assert torch.equal(out.cpu().double(), onto(Accumulator(sums, torch.ones(3)), float(scale), *Output(1)).q)
    real = torch.empty((2, 3), device=device)
    numbers = Requantize(bias, torch.ones(3, device=device), None)
    linear.linear(x.to(device), linear.pack_weight(weight).to(device), numbers, real, tile=tile)
    assert torch.equal(real.cpu(), sums.float())


@dataclass(frozen=True)
class Matrix:
    """A static linear, as `Case` is a convolution."""

    rows: int = 5
    depth: int = 40
    columns: int = 19
    padded: bool = False
    residual: bool = False
    output: Output | None = PART
    split: int = 1
    weight_bits: int = 8

    def check(self, device: str) -> None:
        g = torch.Generator().manual_seed(self.rows * self.depth)
        limit = 2 ** (self.weight_bits - 1) - 1
        x = integers(g, self.rows, self.depth)
        weight = integers(g, self.columns, self.depth, low=-limit, high=limit)
        bias = torch.randint(-500, 500, (self.columns,), generator=g)
        step = torch.rand(self.columns, generator=g) * 0.01 + 0.001
        sums = Accumulator((x.double() - 9) @ weight.double().T + bias, step)
        folded = (bias - 9 * weight.long().sum(1)).int().to(device)
        case = Case(output=self.output, residual=self.residual)
        pixels = replace(sums, sums=sums.sums[:, :, None, None])
        expected, numbers, residual = case.finish(pixels, folded, g, device)
        if residual is not None:
            residual = replace(residual, values=residual.values[:, 0, 0])
        dtype = torch.float32 if self.output is None else torch.int8
        buffer = torch.full((self.rows, self.columns + 5), UNTOUCHED, dtype=dtype, device=device)
        given = torch.full((self.rows, self.depth + 32 - self.depth % 32), UNTOUCHED, dtype=torch.int8)
        given[:, : self.depth] = x
        four = self.weight_bits == 4
        packed = linear.pack_weight4(weight) if four else linear.pack_weight(weight)
        width = packed.shape[1] * (2 if four else 1) if self.padded else self.depth
        run = linear.linear_w4 if four else linear.linear
        tile = replace(SMALL, split=self.split)
        out = buffer[:, : self.columns]
        run(given.to(device)[:, :width], packed.to(device), numbers, out, residual=residual, tile=tile)
        assert torch.equal(out.cpu().double(), expected[:, :, 0, 0].double())
        assert (buffer[:, self.columns :] == UNTOUCHED).all()


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize(
    "matrix",
    [
        Matrix(),
        Matrix(padded=True),
        Matrix(rows=33, depth=64, columns=32, residual=True),
        Matrix(depth=13, residual=True, split=2),
        Matrix(rows=1, depth=200, split=3),
        Matrix(output=None),
        Matrix(output=None, depth=129, split=2, padded=True),
    ],
    ids=str,
)
def test_a_linear_equals_the_contract(matrix: Matrix, weight_bits: int, device: str) -> None:
    replace(matrix, weight_bits=weight_bits).check(device)


@given(
    rows=st.integers(1, 40), depth=st.integers(1, 150), columns=st.integers(1, 40), split=st.integers(1, 3),
    residual=st.booleans(), padded=st.booleans(), weight_bits=st.sampled_from([8, 4]),
)  # fmt: skip
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_linear_equals_the_contract(
    device: str, rows: int, depth: int, columns: int, split: int, residual: bool, padded: bool, weight_bits: int
) -> None:
    matrix = Matrix(rows, depth, columns, padded=padded, residual=residual, split=split, weight_bits=weight_bits)
    matrix.check(device)


def test_all_weights_of_4_bits_are_unpacked(device: str) -> None:
    weight = torch.arange(-8, 8, dtype=torch.int8).repeat(4, 1)
    packed = linear.pack_weight4(weight)
    assert packed.shape == (4, 16)
    x = torch.eye(16, dtype=torch.int8)
    numbers = Requantize(torch.zeros(4, dtype=torch.int32, device=device), torch.ones(4, device=device), FULL)
    out = torch.empty((16, 4), dtype=torch.int8, device=device)
    linear.linear_w4(x.to(device), packed.to(device), numbers, out, tile=SMALL)
    assert torch.equal(out.cpu().T, weight)


def rows_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `quantize_rows` is to give for finite rows."""
    scale = x.float().abs().amax(1) / 127
    scale = torch.where(scale < 2.0**-102, torch.ones_like(scale), scale)
    return (x.float() * (1 / scale)[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantized_rows(x: Tensor, device: str) -> tuple[Tensor, Tensor]:
    count, depth = x.shape
    rows = torch.full((count, -(-depth // 16) * 16), UNTOUCHED, dtype=torch.int8, device=device)
    scale = torch.empty((count,), device=device)
    linear.quantize_rows(x.to(device), rows, scale)
    return rows, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_get_their_own_grids(dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(6, 100, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    x[1] = 0
    x[2] *= 0.001
    q, scale = quantized_rows(x[:, :83], device)
    expected, expected_scale = rows_of(x[:, :83])
    assert torch.equal(q[:, :83].cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale)
    assert not q[:, 83:].any()


def test_rows_of_tiny_huge_and_undefined_values_keep_to_themselves(device: str) -> None:
    x = torch.tensor([[1e-45, -1e-40], [2e-29, 1e-29], [3e38, -3e38], [math.nan, 1], [math.inf, 1], [1, 2]])
    q, scale = quantized_rows(x, device)
    finite = [0, 1, 2, 5]
    expected, expected_scale = rows_of(x[finite])
    assert torch.equal(q[finite, :2].cpu(), expected)
    assert torch.equal(scale[finite].cpu(), expected_scale)
    assert scale[[3, 4]].isnan().all()
    out = torch.empty((6, 16), device=device)
    one, weight = torch.ones(16, device=device), torch.ones((16, 2), dtype=torch.int8)
    linear.linear_rows(q, scale, linear.pack_weight(weight).to(device), one, None, out, tile=SMALL)
    assert out[[3, 4]].isnan().all()
    assert out[finite].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_dynamic_linear_is_exact_but_for_its_float32_end(dtype: torch.dtype, with_bias: bool, device: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(19, 70, generator=g).to(dtype), integers(g, 21, 70, low=-127)
    scale, bias = torch.rand(21, generator=g) * 0.01, torch.randn(21, generator=g)
    out = torch.empty((19, 21), dtype=dtype, device=device)
    packed, given = linear.pack_weight(weight).to(device), bias.to(device) if with_bias else None
    linear.linear_rows(*quantized_rows(x, device), packed, scale.to(device), given, out, tile=SMALL)
    q, row_scale = rows_of(x)
    expected = (q.double() @ weight.double().T).float() * row_scale[:, None] * scale
    assert torch.equal(out.cpu(), (expected + bias if with_bias else expected).to(dtype))


GRIDS = [Output(0), Output(-128), Output(127), Output(3, -8, 7), Output(-1, -2, 1), Output(-128, -128, -120)]


OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's NumPy


@OVERFLOWS
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_floats_are_quantized_as_the_contract_says(grid: Output, device: str) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 9, 7, generator=g) * 5
    x[0, 0, 0, :6] = torch.tensor([math.inf, -math.inf, 3e38, 1e-45, -0.0, 1e-38])
    x[1] = (x[1] / 0.05).round() * 0.05 + 0.025  # near the middle between two levels
    buffer = torch.full((2, 11, 9, 4), UNTOUCHED, dtype=torch.int8, device=device)
    out, invalid = buffer[:, 1:-1, 1:-1, :3], torch.zeros(1, dtype=torch.int32, device=device)
    pointwise.quantize(x.to(device).permute(0, 2, 3, 1), 0.05, grid, out, invalid=invalid)
    assert torch.equal(out.cpu().permute(0, 3, 1, 2).double(), onto(x, 0.05, *grid).q)
    assert not invalid.any()
    out.fill_(UNTOUCHED)
    assert (buffer == UNTOUCHED).all()


@OVERFLOWS
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_images_of_few_channels_are_quantized_a_pixel_at_a_time(grid: Output, channels: int, device: str) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randn(2, channels, 9, 70, generator=g) * 5
    x[0, 0, 0, :4] = torch.tensor([math.inf, -math.inf, 3e38, -0.0])
    x[1, 0, 2, 3] = math.nan
    buffer = torch.full((2, 11, 73, 4), UNTOUCHED, dtype=torch.int8, device=device)
    out, invalid = buffer[:, 1:-1, 2:-1], torch.zeros(1, dtype=torch.int32, device=device)
    pointwise.quantize_images(x.to(device), 0.05, grid, out, invalid=invalid)
    found = out.cpu().permute(0, 3, 1, 2)
    assert found[1, 0, 2, 3] == grid.low
    x[1, 0, 2, 3] = -math.inf
    assert torch.equal(found[:, :channels].double(), onto(x, 0.05, *grid).q)
    assert (found[:, channels:] == 0).all()
    assert invalid.item() == 1
    out.fill_(UNTOUCHED)
    assert (buffer == UNTOUCHED).all()


@OVERFLOWS
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-127 * 1.01, 1e-30, 1e30, 3e38])
def test_extreme_scales_quantize_as_the_contract_says(scale: float, device: str) -> None:
    x = torch.cat([torch.linspace(-300, 300, 97) * f32(scale), torch.tensor([0.0, 1e-45, 3e38, -3e38, 1.0])])
    out = torch.empty(x.shape, dtype=torch.int8, device=device)
    pointwise.quantize(x.to(device), scale, Output(5), out)
    assert torch.equal(out.cpu().double(), onto(x, scale, *Output(5)).q)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-39, 1e-60])
def test_a_scale_without_a_finite_inverse_is_refused(scale: float, device: str) -> None:
    x, out = torch.zeros(4, device=device), torch.zeros(4, dtype=torch.int8, device=device)
    with pytest.raises(Refused, match="must be positive with a finite inverse"):
        pointwise.quantize(x, scale, FULL, out)
    with pytest.raises(Refused, match="must be positive with a finite inverse"):
        pointwise.rescale(out, 0.1, 0, scale, FULL, out)


def test_a_nan_is_the_lowest_level_and_is_told(device: str) -> None:
    x = torch.tensor([[1.0, math.nan], [-1.0, 2.0]], device=device)
    out, invalid = (
        torch.empty((2, 2), dtype=torch.int8, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    pointwise.quantize(x, 0.5, Output(3, -9, 100), out, invalid=invalid)
    assert out.tolist() == [[5, -9], [1, 7]]
    assert invalid.item() == 1
    pointwise.quantize(x, 0.5, Output(3, -9, 100), out)
    assert out.tolist() == [[5, -9], [1, 7]]


def every_integer() -> Tensor:
    return torch.arange(-128, 128).to(torch.int8)


def test_all_pairs_of_integers_add_as_the_contract_says(device: str) -> None:
    """Exhaustive, so that a fused multiply-add would show."""
    left, right = torch.meshgrid(every_integer(), every_integer(), indexing="ij")
    scales, scale = (f32(0.0371), f32(0.0529)), f32(0.0613)
    operands = Integers(left.double(), scales[0], -7), Integers(right.double(), scales[1], 100)
    given = [
        Operand(values.contiguous().to(device), zero_point, float(s / scale))
        for values, zero_point, s in zip((left, right), (-7, 100), scales, strict=True)
    ]
    for grid in (Output(11), Output(-128, -128, -100)):
        out = torch.empty((256, 256), dtype=torch.int8, device=device)
        pointwise.add(given[0], given[1], grid, out)
        assert torch.equal(out.cpu().double(), onto(Sum(*operands), float(scale), *grid).q)
    real = torch.empty((256, 256), device=device)
    given = [replace(side, multiplier=float(s)) for side, s in zip(given, scales, strict=True)]
    pointwise.add(given[0], given[1], None, real, bounds=(0.0, 6.0))
    assert torch.equal(real.cpu(), Sum(*operands, Bounds(0.0, 6.0)).real())


@pytest.mark.parametrize("zeros", [(-7, 100), (-128, 127), (127, -128)])
def test_all_pairs_of_integers_multiply_as_the_contract_says(zeros: tuple[int, int], device: str) -> None:
    left, right = torch.meshgrid(every_integer(), every_integer(), indexing="ij")
    scales, scale = (f32(0.0371), f32(0.0529)), f32(0.1613)
    operands = Integers(left.double(), scales[0], zeros[0]), Integers(right.double(), scales[1], zeros[1])
    numbers = left.contiguous().to(device), zeros[0], right.contiguous().to(device), zeros[1]
    step = scales[0] * scales[1]
    for grid in (Output(11), Output(-128, -128, -100)):
        out = torch.empty((256, 256), dtype=torch.int8, device=device)
        pointwise.multiply(*numbers, float(step / scale), grid, out)
        assert torch.equal(out.cpu().double(), onto(Product(*operands), float(scale), *grid).q)
    real = torch.empty((256, 256), device=device)
    pointwise.multiply(*numbers, float(step), None, real, bounds=(0.0, 6.0))
    assert torch.equal(real.cpu(), Product(*operands, Bounds(0.0, 6.0)).real())


@pytest.mark.parametrize("shape", [(2, 5, 1, 1), (2, 1, 6, 7), (1, 5, 6, 7), (2, 5, 6, 7)])
def test_what_is_repeated_is_multiplied_where_it_lies(shape: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-128, 128, (2, 5, 6, 7), generator=generator, dtype=torch.int8)
    gate = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    wanted = onto(Product(Integers(image.double(), f32(0.1), 3), Integers(gate.double(), f32(0.2), -9)), 0.9, *FULL)
    out = torch.empty((2, 6, 7, 16), dtype=torch.int8, device=device)[..., :5].permute(0, 3, 1, 2)
    image = image.to(device).contiguous(memory_format=torch.channels_last)
    multiplier = float(f32(0.1) * f32(0.2) / f32(0.9))
    last = [tensor.permute(0, 2, 3, 1) for tensor in (image, gate.to(device).expand(image.shape), out)]
    pointwise.multiply(last[0], 3, last[1], -9, multiplier, FULL, last[2])
    assert torch.equal(out.cpu().double(), wanted.q)


@given(
    scale=st.floats(2.0**-40, 2.0**40, width=32), out_scale=st.floats(2.0**-40, 2.0**40, width=32),
    zero_point=st.integers(-128, 127), grid=st.sampled_from(GRIDS),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True)
def test_all_integers_move_between_grids_as_the_contract_says(
    device: str, scale: float, out_scale: float, zero_point: int, grid: Output
) -> None:
    x = Integers(every_integer().double(), f32(scale), zero_point)
    out = torch.empty(256, dtype=torch.int8, device=device)
    pointwise.rescale(every_integer().to(device), scale, zero_point, out_scale, grid, out)
    assert torch.equal(out.cpu().double(), onto(x, out_scale, *grid).q)
    real = torch.empty(256, device=device)
    pointwise.dequantize(every_integer().to(device), scale, zero_point, real)
    assert torch.equal(real.cpu(), x.real())


def test_tables_and_copies_reach_parts_of_buffers(device: str) -> None:
    g = torch.Generator().manual_seed(5)
    x, table = integers(g, 2, 5, 6, 7).to(device), integers(g, 256).to(device)
    buffer = torch.full((2, 7, 8, 19), UNTOUCHED, dtype=torch.int8, device=device)
    first, second = buffer[:, 1:-1, 1:-1, :7], buffer[:, 1:-1, 1:-1, 7:14]
    pointwise.look_up(x, table, first)
    pointwise.copy(x, second)
    assert torch.equal(first, table[x.long() + 128])
    assert torch.equal(second, x)
    first.fill_(UNTOUCHED)
    second.fill_(UNTOUCHED)
    assert (buffer == UNTOUCHED).all()
    every = torch.empty(256, dtype=torch.int8, device=device)
    pointwise.look_up(every_integer().to(device), table, every)
    assert torch.equal(every, table)


WINDOWS = list(itertools.product([(2, 2), (3, 2)], [(2, 2), (1, 3)], [(0, 0), (1, 1)]))


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
def test_pools_equal_the_contract(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], device: str
) -> None:
    g = torch.Generator().manual_seed(6)
    x, grid, scale, out_scale = integers(g, 2, 7, 8, 19), Output(4, -30, 127), f32(0.03), f32(0.02)
    channels_first = x.permute(0, 3, 1, 2).double()
    given = x.to(device)
    expected = functional.max_pool2d(channels_first, kernel, stride, padding).permute(0, 2, 3, 1)
    out = torch.full((*expected.shape[:3], 24), UNTOUCHED, dtype=torch.int8, device=device)
    pool.max_pool2d(given, out[..., :19], kernel=kernel, stride=stride, padding=padding)
    assert torch.equal(out[..., :19].cpu().double(), expected)
    assert (out[..., 19:] == UNTOUCHED).all()

    count = kernel[0] * kernel[1]
    sums = functional.avg_pool2d(channels_first + 5, kernel, stride, padding, divisor_override=1)
    averages = Accumulator(sums, scale, count)
    windows = {"kernel": kernel, "stride": stride, "padding": padding}
    multiplier = float(scale / (out_scale * count))
    pool.avg_pool2d(given, -5, multiplier, grid, out[..., :19], **windows)
    expected = onto(averages, float(out_scale), *grid).q
    assert torch.equal(out[..., :19].cpu().double(), expected.permute(0, 2, 3, 1))
    real = torch.empty(expected.permute(0, 2, 3, 1).shape, device=device)
    pool.avg_pool2d(given, -5, float(scale / count), None, real, **windows)
    assert torch.equal(real.cpu(), averages.real().permute(0, 2, 3, 1))


def test_windows_past_the_end_and_with_holes_take_what_is_there(device: str) -> None:
    x = integers(torch.Generator().manual_seed(7), 1, 8, 8, 5, high=-100)
    expected = functional.max_pool2d(x.permute(0, 3, 1, 2).double(), 3, 2, 1, 2, ceil_mode=True).permute(0, 2, 3, 1)
    out = torch.empty(expected.shape, dtype=torch.int8, device=device)
    pool.max_pool2d(x.to(device), out, kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2))
    assert torch.equal(out.cpu().double(), expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 13)])
@pytest.mark.parametrize("zero_point", [-128, 127])
def test_averages_of_all_pixels_equal_the_contract(size: tuple[int, int], zero_point: int, device: str) -> None:
    x = integers(torch.Generator().manual_seed(8), 2, *size, 21)
    sums = (x.double() - zero_point).sum((1, 2))
    averages, out_scale = Accumulator(sums, f32(0.03), size[0] * size[1]), f32(0.011)
    _, view = halo(x, 1, UNTOUCHED, 32)
    given = view.to(device)
    out = torch.empty((2, 21), dtype=torch.int8, device=device)
    multiplier = float(averages.step / (out_scale * averages.count))
    pool.global_avg_pool(given, zero_point, multiplier, Output(-3), out)
    assert torch.equal(out.cpu().double(), onto(averages, float(out_scale), *Output(-3)).q)
    real = torch.empty((2, 21), device=device)
    pool.global_avg_pool(given, zero_point, float(averages.step / averages.count), None, real)
    assert torch.equal(real.cpu(), averages.real())


@pytest.mark.parametrize("times", [(2, 2), (1, 3), (8, 1)])
def test_pixels_are_repeated(times: tuple[int, int], device: str) -> None:
    x = integers(torch.Generator().manual_seed(10), 3, 5, 7, 19)
    _, given = halo(x, 1, UNTOUCHED, 32)
    out = torch.full((3, 5 * times[0], 7 * times[1], 32), UNTOUCHED, dtype=torch.int8, device=device)
    pointwise.repeat(given.to(device), out[..., :19])
    assert torch.equal(out[..., :19].cpu(), x.repeat_interleave(times[0], 1).repeat_interleave(times[1], 2))
    assert (out[..., 19:] == UNTOUCHED).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 13)])
def test_the_largest_of_all_pixels(size: tuple[int, int], device: str) -> None:
    x = integers(torch.Generator().manual_seed(9), 2, *size, 70, high=-100)
    _, view = halo(x, 1, UNTOUCHED, 80)
    out = torch.full((2, 80), UNTOUCHED, dtype=torch.int8, device=device)
    pool.global_max_pool(view.to(device), out[:, :70])
    assert torch.equal(out[:, :70].cpu(), x.amax((1, 2)))
    assert (out[:, 70:] == UNTOUCHED).all()


def test_4_bit_sums_that_could_overflow_are_refused() -> None:
    x, weight = torch.empty((1, 2**17), dtype=torch.int8), torch.empty((16, 2**16), dtype=torch.int8)
    numbers = Requantize(torch.zeros(16, dtype=torch.int32), torch.ones(16), FULL)
    with pytest.raises(Refused, match="fewer than 131072 inputs"):
        linear.linear_w4(x, weight, numbers, torch.empty((1, 16), dtype=torch.int8))


def test_tensors_of_more_than_2_31_elements_are_refused() -> None:
    x = torch.empty((2**16, 2**16), dtype=torch.int8, device="meta")
    with pytest.raises(Refused, match="fewer than 2\\^31 elements"):
        pointwise.copy(x[:, :16], x[:, :16])
