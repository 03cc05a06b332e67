"""Layer norms as kernels, and the sums that they read: in Triton's interpreter, or on a GPU with QSWEEP_GPU=1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from networks import Noise, context
from torch import Tensor, nn

from qsweep.cuda import pointwise
from qsweep.cuda.arithmetic import Operand, Output, Total
from qsweep.cuda.chain import Chain
from qsweep.cuda.norm import layer_norm
from qsweep.cuda.plan import plan
from qsweep.cuda.steps import Add, Norm
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, constant
from qsweep.quantize.ptq import PTQ


class Blocks(nn.Module):
    """Sums that a norm and the next sum read, of tokens or, `windows`, of pixels with their channels last; the second
    sum is normed twice, the third has a rectifier on the way to the next."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.windows = windows
        self.first, self.second, self.third = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 24)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(4))
        self.mixed, self.last, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 2, 4, 8) if self.windows else x.squeeze(1)
        one = self.first(tokens) + self.second(tokens)
        two = one + self.third(self.norms[0](one))
        three = two + self.mixed(self.norms[1](two)) + self.last(self.norms[2](two))
        return self.head(self.norms[3](three.relu())).flatten(1)


@pytest.mark.parametrize("windows", [False, True])
def test_a_norm_writes_the_sum_that_it_reads_as_a_sum_alone_would(windows: bool, tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 1, 8, 8)
    found = context(tmp_path, "model", task=Noise(inputs=inputs))
    model = PTQ(calibration_samples=40).apply(Blocks(windows).eval(), found)
    chain = Chain(model, 3, device, {}, keep=True)
    norms = [step for step in chain.plan.steps if isinstance(step, Norm)]
    assert [step.total is not None for step in norms] == [True, True, False, False]
    assert sum(isinstance(step, Add) for step in chain.plan.steps) == 2
    reference = IntegerInterpreter(model.graph)
    reference.keep = True
    expected = reference(inputs[:3])
    torch.testing.assert_close(chain(inputs[:3].to(device)).cpu(), expected, rtol=0, atol=0.05)
    (first, *_) = (step.total.out.name for step in norms if step.total is not None)
    assert torch.equal(chain.integers()[first].cpu(), reference.tensors[first])
    apart = Chain(model, 3, device, {})
    for start in (3, 0):  # values share memory
        apart(inputs[start : start + 3].to(device))
    assert torch.equal(apart(inputs[:3].to(device)), chain(inputs[:3].to(device)))


@pytest.mark.parametrize(("sides", "summed"), [(0, False), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("width", "many"), [(16, 8192), (24, 8192), (200, 8192), (200, 21), (1100, 21)])
def test_a_layer_norm_is_within_one_level_of_floating_point(
    sides: int, summed: bool, width: int, many: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qsweep.cuda.norm._MANY", many)
    generator = torch.Generator().manual_seed(width)
    rows = [torch.randint(-128, 128, (21, width + 8), generator=generator).to(torch.int8) for _ in range(3)]
    weight, bias = torch.randn(2, width, generator=generator)
    real = 3 * torch.randn(21, width, generator=generator) + 50
    given: Any = real.to(device)
    if sides:
        integers = [row[:, :width] for row in rows[:sides]]
        given = tuple(Operand(row.to(device), 7, 0.03) for row in integers)
        real = sum(((row.float() - 7) * 0.03 for row in integers), torch.zeros(21, width))
    out, invalid = rows[2].to(device), torch.zeros(1, dtype=torch.int32, device=device)
    parts = weight.to(device) / 0.04, bias.to(device) / 0.04
    sums = torch.full((21, width + 4), 99, dtype=torch.int8, device=device)
    total = Total(0.7, 0.3, Output(11, -128, 90), sums[:, :width]) if summed else None
    layer_norm(given, *parts, 1e-5, Output(-5, -100, 127), out[:, :width], invalid, total=total)
    if summed:
        alone = torch.full_like(sums, 99)
        left, right = (replace(one, multiplier=by) for one, by in zip(given, (0.7, 0.3), strict=True))
        pointwise.add(left, right, Output(11, -128, 90), alone[:, :width])
        assert torch.equal(sums, alone)
        assert len(sums[:, :width].unique()) > 50
    wanted = torch.nn.functional.layer_norm(real, (width,), weight, bias)
    wanted = ((wanted / 0.04).round() - 5).clamp(-100, 127)
    difference = (out[:, :width].cpu() - wanted).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 2e-3
    assert torch.equal(out[:, width:].cpu(), rows[2][:, width:])
    assert not invalid.any()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize(
    ("odd", "epsilon", "noticed"), [(math.nan, 1e-5, 1), (math.inf, 1e-5, 1), (2.0, 0.0, 0), (1.0, 0.0, 1)]
)
def test_what_makes_nans_of_a_row_is_noticed(odd: float, epsilon: float, noticed: int, device: str) -> None:
    """A NaN, an infinity, and without an epsilon a row of equal numbers; what a block has too many are no rows."""
    rows, one = torch.ones(3, 16, device=device), torch.ones(16, device=device)
    rows[:, 1] = 2.0
    rows[1, 1:5] = odd
    invalid = torch.zeros(1, dtype=torch.int32, device=device)
    layer_norm(rows, one, one, epsilon, Output(0), torch.zeros(3, 16, dtype=torch.int8, device=device), invalid)
    wanted = torch.nn.functional.layer_norm(rows.cpu(), (16,), eps=epsilon).isnan().any()
    assert invalid.item() == wanted.item() == noticed


def test_a_norm_whose_weights_are_not_finite_is_left_to_floating_point(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    model = PTQ(calibration_samples=40).apply(
        Blocks(False).eval(), context(tmp_path, "model", task=Noise(inputs=torch.randn(40, 1, 8, 8)))
    )
    kept = sum(isinstance(step, Norm) for step in plan(model, 3).steps)
    norm = next(node for node in model.graph.graph.nodes if node.target is aten.layer_norm.default)
    weight = constant(model.graph, arguments(norm)["weight"])
    assert weight is not None
    weight.data[3] = math.inf
    assert sum(isinstance(step, Norm) for step in plan(model, 3).steps) == kept - 1
    inputs = torch.randn(3, 1, 8, 8)
    found, expected = Chain(model, 3, device, {})(inputs.to(device)), IntegerInterpreter(model.graph)(inputs)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0.05)
