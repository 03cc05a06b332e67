from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from toy_task import Toy

from qsweep.errors import NotFinite, TaskFailure
from qsweep.prune._global import zero_smallest
from qsweep.prune.magnitude import Magnitude
from qsweep.stage import Context, stage_key
from qsweep.store import Store
from qsweep.tasks.base import Training
from qsweep.weights import weight_names

WEIGHTS = 4 * 9 + 2 * 64


def context(root: Path, **changes: Any) -> Context:
    plain = Context(
        task=Toy(),
        store=Store(root),
        key="fp32",
        seed=0,
        teacher=lambda: Toy().model().eval(),
        training=Training(batch_size=16),
    )
    return dataclasses.replace(plain, **changes)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Toy().model()


def zeros(pruned: nn.Module) -> int:
    return sum(int((pruned.get_parameter(name) == 0).sum()) for name in weight_names(pruned))


@given(sparsity=st.floats(0, 0.99))
def test_exactly_the_asked_share_of_weights_is_zero_and_they_were_the_smallest(sparsity: float) -> None:
    pruned = model()
    zero_smallest(pruned, sparsity)
    assert zeros(pruned) == round(sparsity * WEIGHTS)
    gone = [
        before.abs()[after == 0]
        for before, after in ((model().get_parameter(n), pruned.get_parameter(n)) for n in weight_names(pruned))
    ]
    left = [pruned.get_parameter(name).abs() for name in weight_names(pruned)]
    kept = torch.cat([weight[weight > 0] for weight in left])
    if zeros(pruned):
        assert torch.cat(gone).max() <= kept.min()


def test_equal_magnitudes_are_still_counted_exactly() -> None:
    pruned = model()
    for name in weight_names(pruned):
        nn.init.constant_(pruned.get_parameter(name), -1.0)
    zero_smallest(pruned, 0.25)
    assert zeros(pruned) == WEIGHTS // 4


def test_biases_and_batch_norm_are_not_pruned() -> None:
    pruned, before = model(), model()
    zero_smallest(pruned, 0.99)
    names = set(dict(pruned.named_parameters())) - set(weight_names(pruned))
    assert {"1.weight", "1.bias", "5.bias"} == names
    assert all(torch.equal(pruned.get_parameter(name), before.get_parameter(name)) for name in names)


@pytest.mark.parametrize("epochs", [0, 2])
def test_the_share_of_zeros_survives_fine_tuning(tmp_path: Path, epochs: int) -> None:
    pruned = Magnitude(sparsity=0.7, epochs=epochs).apply(model(), context(tmp_path))
    assert zeros(pruned) == round(0.7 * WEIGHTS)
    assert not pruned.training


def test_fine_tuning_moves_the_weights_that_are_left(tmp_path: Path) -> None:
    cut, tuned = (Magnitude(epochs=epochs).apply(model(), context(tmp_path)) for epochs in (0, 1))
    assert not torch.equal(cut.get_parameter("5.weight"), tuned.get_parameter("5.weight"))


def test_pruning_is_computed_once_and_gives_the_same_bits_to_all(tmp_path: Path) -> None:
    lines: list[str] = []
    stages = [Magnitude(epochs=2).apply(model(), context(tmp_path, progress=lines.append)) for _ in range(2)]
    assert len(lines) == 1 + 2
    for one, other in zip(stages[0].state_dict().values(), stages[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "changes",
    [{"key": "other"}, {"seed": 1}, {"training": Training(batch_size=32)}, {"training": Training(device="cuda")}],
)
def test_the_identity_of_a_result_holds_what_it_depends_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    stage = Magnitude()
    assert stage_key(stage, context(tmp_path, **changes)) != stage_key(stage, context(tmp_path))
    assert stage_key(Magnitude(sparsity=0.6), context(tmp_path)) != stage_key(stage, context(tmp_path))


def test_weights_that_are_not_finite_are_not_ranked(tmp_path: Path) -> None:
    broken = model()
    nn.init.constant_(broken.get_parameter("5.bias"), torch.nan)
    with pytest.raises(NotFinite, match=r"`5\.bias`"):
        Magnitude().apply(broken, context(tmp_path))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFailure, match="convolutions or linears"):
        Magnitude().apply(nn.Sequential(nn.Flatten()), context(tmp_path))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(sparsity: float) -> None:
    with pytest.raises(ValidationError):
        Magnitude(sparsity=sparsity)


@pytest.mark.parametrize(("sparsity", "label"), [(0.5, "prune50"), (0.0, "prune0"), (0.975, "prune97.5")])
def test_the_name_of_a_pruning_tells_its_percentage(sparsity: float, label: str) -> None:
    assert Magnitude(sparsity=sparsity).label() == label
