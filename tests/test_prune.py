from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import lowered
from pydantic import ValidationError
from torch import Tensor, nn
from toy_task import Toy

from qsweep.build import Clock, compress
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import NotFinite, TaskFailure
from qsweep.hub.export import export
from qsweep.measure.files import digests
from qsweep.prune import Pruning
from qsweep.prune._channels import alike, zero_channels
from qsweep.prune._global import zero_smallest
from qsweep.prune.channels import Channels
from qsweep.prune.magnitude import Magnitude
from qsweep.quantize.qat import QAT
from qsweep.spec import Compression
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
        original=lambda: Toy().model().eval(),
        training=Training(batch_size=16),
    )
    return dataclasses.replace(plain, **changes)


Method = Callable[..., Pruning]


@pytest.fixture(params=[Magnitude, partial(Channels, multiple_of=1)], ids=["magnitude", "channels"])
def method(request: pytest.FixtureRequest) -> Method:
    found: Method = request.param
    return found


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


def test_fine_tuning_moves_the_weights_that_are_left(method: Method, tmp_path: Path) -> None:
    cut, tuned = (method(epochs=epochs).apply(model(), context(tmp_path)) for epochs in (0, 1))
    assert not torch.equal(cut.get_parameter("5.weight"), tuned.get_parameter("5.weight"))


def test_pruning_is_computed_once_and_gives_the_same_bits_to_all(method: Method, tmp_path: Path) -> None:
    lines: list[str] = []
    stages = [method(epochs=2).apply(model(), context(tmp_path, progress=lines.append)) for _ in range(2)]
    assert len(lines) == 1 + 2
    for one, other in zip(stages[0].state_dict().values(), stages[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "changes",
    [{"key": "other"}, {"seed": 1}, {"training": Training(batch_size=32)}, {"training": Training(device="cuda")}],
)
def test_the_identity_of_a_result_holds_what_it_depends_on(
    method: Method, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stage = method()
    assert stage_key(stage, context(tmp_path, **changes)) != stage_key(stage, context(tmp_path))
    assert stage_key(method(sparsity=0.6), context(tmp_path)) != stage_key(stage, context(tmp_path))


def test_weights_that_are_not_finite_are_not_ranked(method: Method, tmp_path: Path) -> None:
    broken = model()
    nn.init.constant_(broken.get_parameter("5.bias"), torch.nan)
    with pytest.raises(NotFinite, match=r"`5\.bias`"):
        method().apply(broken, context(tmp_path))


def test_a_model_without_weights_is_refused(method: Method, tmp_path: Path) -> None:
    with pytest.raises(TaskFailure, match="pruning needs"):
        method().apply(nn.Sequential(nn.Flatten()), context(tmp_path))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(method: Method, sparsity: float) -> None:
    with pytest.raises(ValidationError):
        method(sparsity=sparsity)


@pytest.mark.parametrize(("sparsity", "label"), [(0.5, "50"), (0.0, "0"), (0.975, "97.5")])
def test_the_name_of_a_pruning_tells_its_percentage(sparsity: float, label: str) -> None:
    assert Magnitude(sparsity=sparsity).label() == f"prune{label}"
    assert Channels(sparsity=sparsity).label() == f"channels{label}"


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for pair in pairwise((1, *widths)) for layer in (nn.Conv2d(*pair, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 2)).eval()


NARROW = [(4, 0.5, 8, 4), (8, 0.9, 8, 8), (3, 0.99, 1, 1), (12, 0.5, 4, 8)]
IMAGES = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "left"),
    [
        (32, 0.3, 8, 24),
        (32, 0.3, 1, 22),
        (32, 0.99, 8, 8),
        (32, 0.0, 8, 32),
        (20, 0.1, 8, 16),
        (20, 0.0, 8, 20),
        *NARROW,
    ],
)
def test_layers_keep_a_multiple_of_channels_and_at_least_one(
    width: int, sparsity: float, multiple: int, left: int
) -> None:
    pruned = chain(width, 32)
    zero_channels(pruned, IMAGES, sparsity, multiple)
    assert int(pruned.get_parameter("0.weight").flatten(1).any(1).sum()) == left
    assert export(pruned, IMAGES).layers()[0].weight.shape[0] == left


@given(st.lists(st.integers(2, 40), min_size=1, max_size=2), st.floats(0, 0.999), st.integers(1, 16))
@settings(max_examples=12, deadline=None)
def test_sparsities_that_leave_the_same_channels_are_one(widths: list[int], sparsity: float, multiple: int) -> None:
    def left(sparsity: float) -> list[int]:
        pruned = chain(*widths, 32)
        zero_channels(pruned, IMAGES, sparsity, multiple)
        return [int(value.flatten(1).any(1).sum()) for name, value in pruned.named_parameters() if value.dim() == 4]

    one = alike(chain(*widths, 32), IMAGES, sparsity, multiple)
    assert left(one) == left(sparsity)
    assert alike(chain(*widths, 32), IMAGES, one, multiple) == one
    other = sparsity + (one - sparsity) / 2
    assert alike(chain(*widths, 32), IMAGES, other, multiple) == one


def test_what_differs_in_its_sparsity_alone_is_trained_once(tmp_path: Path) -> None:
    said: list[str] = []
    found = context(tmp_path, progress=said.append)
    artifacts = []
    for sparsity in (0.48, 0.5, 0.52, 0.1):
        config = Compression(prune=Channels(sparsity=sparsity, multiple_of=2), quantize=QAT())
        quantized = compress(config, model(), found, Clock())
        lowered(OnnxRuntime(), quantized, tmp_path / str(sparsity))
        artifacts.append(digests(tmp_path / str(sparsity)))
    trained = [line for line in said if line.startswith("epoch")]
    assert len(trained) == 2 * 2, said
    assert artifacts[0] == artifacts[1] == artifacts[2] != artifacts[3]


def test_the_channels_with_the_smallest_weights_go_first() -> None:
    pruned = chain(4, 8)
    with torch.no_grad():
        pruned.get_parameter("0.weight")[:] = torch.tensor([-3.0, 0.1, 2.0, -0.2]).reshape(4, 1, 1, 1)
        pruned.get_parameter("0.bias").zero_()
    zero_channels(pruned, IMAGES, 0.5, 1)
    assert pruned.get_parameter("0.weight").flatten().tolist() == [-3.0, 0.0, 2.0, 0.0]


def test_channels_go_from_weights_biases_and_norms_and_none_of_it_comes_back(tmp_path: Path) -> None:
    pruned = Channels(sparsity=0.5, multiple_of=1, epochs=2).apply(model(), context(tmp_path))
    gone = ~pruned.get_parameter("0.weight").flatten(1).any(1)
    assert int(gone.sum()) == 2
    for name in ("1.weight", "1.bias"):
        assert torch.equal(pruned.get_parameter(name) == 0, gone)
    images = Toy().transform(Toy().samples("test").inputs)
    slim = export(pruned, images[:2])
    assert [list(layer.weight.shape) for layer in slim.layers()] == [[2, 1, 3, 3], [2, 32]]
    torch.testing.assert_close(slim.graph(images), pruned(images))


def test_fine_tuning_goes_at_the_rate_of_the_task_unless_the_stage_has_its_own(tmp_path: Path) -> None:
    training = Training(batch_size=16, learning_rate=0.2)
    stages = [Channels(multiple_of=1, learning_rate=rate) for rate in (None, 0.2, 0.1)]
    usual, same, other = (stage.apply(model(), context(tmp_path, training=training)) for stage in stages)
    assert torch.equal(usual.get_parameter("5.weight"), same.get_parameter("5.weight"))
    assert not torch.equal(usual.get_parameter("5.weight"), other.get_parameter("5.weight"))


class OwnWeights(nn.Module):
    """A layer that is no module: nothing keeps its bias at zero in a training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(F.linear(x.flatten(1), self.weight, self.bias)))
        return logits


class Turned(nn.Module):
    """A square weight of a module that is multiplied as it lies: the graph has it transposed, under its name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.turned, self.head = nn.Linear(16, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(F.relu(self.stem(x.flatten(1))) @ self.turned.weight))
        return logits


def test_a_weight_that_lies_transposed_is_neither_cut_nor_asked_by_the_wrong_dimension() -> None:
    torch.manual_seed(0)
    model = Turned()
    with torch.no_grad():
        model.stem.weight.fill_(1.0)
        model.stem.weight[4:] = 0.5
        model.turned.weight[:, :4] = 100.0  # of what it gives, not of what it reads
    zero_channels(model, IMAGES, 0.5, 1)
    assert model.stem.weight.any(1).tolist() == [True] * 4 + [False] * 4
    assert bool((model.turned.weight != 0).all())


def test_channels_of_layers_that_are_no_modules_stay() -> None:
    with pytest.raises(TaskFailure, match="channel pruning needs"):
        zero_channels(OwnWeights(), IMAGES, 0.5, 1)
