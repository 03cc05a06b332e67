"""Trainings of models with dead channels run without them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, Noise, network
from test_prune import context
from torch import Tensor, nn
from toy_task import Toy

import qsweep.train
from qsweep.distill.logits import Logits
from qsweep.errors import NotFinite
from qsweep.hub.narrow import narrowed
from qsweep.models import build
from qsweep.prune._channels import zero_channels
from qsweep.prune.channels import Channels


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


COUNTS = {"shortcut"}
"""Networks whose code names the number of channels."""


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "computed"])
def test_a_narrow_model_gives_the_same_and_is_as_wide_afterwards_as_it_was(name: str) -> None:
    model, inputs = network(name), Noise(8).inputs
    zero_channels(model, inputs[:2], 0.5, 1)
    outputs, before, wide = model(inputs), {k: v.clone() for k, v in model.state_dict().items()}, size(model)
    with narrowed(model, inputs[:2]):
        assert (size(model) < wide) == (name not in COUNTS)
        torch.testing.assert_close(model(inputs), outputs)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(model(inputs), outputs)


class Dense(nn.Module):
    """A chain of depthwise and dense convolutions, its last weight tied to the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.apart, self.one, self.two = nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.apart(torch.relu(self.norm(self.stem(x))))
        x = self.two(torch.relu(self.one(x)))
        logits: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits


def test_what_a_narrow_model_learns_is_in_the_wide_one() -> None:
    torch.manual_seed(0)
    model, inputs = Dense().eval(), torch.randn(4, 1, 8, 8)
    zero_channels(model, inputs[:2], 0.5, 1)
    wide = {key: value.clone() for key, value in model.state_dict().items()}
    with narrowed(model, inputs[:2]):
        assert (len(model.stem.weight), model.apart.groups, model.head.weight.shape[1]) == (4, 4, 8)
        assert model.one.weight is model.two.weight
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        outputs = model(inputs)
    assert (model.apart.groups, model.apart.in_channels) == (8, 8)
    assert model.one.weight is model.two.weight
    torch.testing.assert_close(model(inputs), outputs)
    for key, value in model.state_dict().items():
        assert value.shape == wide[key].shape
    gone = ~wide["stem.weight"].flatten(1).any(1)
    assert int(gone.sum()) == 4
    assert torch.equal(~model.stem.weight.flatten(1).any(1), gone)


def test_a_model_that_was_moved_while_it_was_narrow_is_wide_again() -> None:
    """As by a training on a GPU: each move makes buffers anew."""
    torch.manual_seed(0)
    model, inputs = Dense().eval(), torch.randn(2, 1, 8, 8)
    zero_channels(model, inputs, 0.5, 1)
    with narrowed(model, inputs):
        model.double().float()
        model.norm.running_mean.fill_(0.25)
        outputs = model(inputs)
    assert model.norm.running_mean.eq(0.25).sum() == 4
    torch.testing.assert_close(model(inputs), outputs)


def test_a_depthwise_convolution_that_had_one_channel_left_has_its_groups_again() -> None:
    torch.manual_seed(0)
    model, inputs = Dense().eval(), torch.randn(2, 1, 8, 8)
    zero_channels(model, inputs, 0.9, 1)
    outputs = model(inputs)
    with narrowed(model, inputs):
        assert (model.apart.groups, model.apart.in_channels) == (1, 1)
    assert (model.apart.groups, model.apart.in_channels) == (8, 8)
    assert torch.equal(model(inputs), outputs)


class Multiplied(nn.Module):
    """A weight that is no layer's: its graph has it transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table, self.head = nn.Linear(4, 16), nn.Parameter(torch.randn(16, 6)), nn.Linear(6, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.head(torch.relu(self.stem(x)) @ self.table)))
        return logits


def test_channels_that_a_transposed_weight_reads_stay_and_others_go() -> None:
    torch.manual_seed(0)
    model, inputs = Multiplied().eval(), torch.randn(2, 4)
    coupling = zero_channels(model, inputs, 0.5, 1)
    outputs = model(inputs)
    with narrowed(model, inputs, coupling):
        assert (len(model.stem.weight), len(model.head.weight)) == (16, 4)
        torch.testing.assert_close(model(inputs), outputs)
    assert torch.equal(model(inputs), outputs)


def test_a_model_whose_code_counts_its_channels_stays_as_it_is() -> None:
    model = build("resnet20", 10, 3).eval()  # its shortcuts pad by a number
    inputs = torch.randn(2, 3, 32, 32)
    zero_channels(model, inputs, 0.5, 8)
    wide, outputs = size(model), model(inputs)
    with narrowed(model, inputs):
        assert size(model) == wide
        assert torch.equal(model(inputs), outputs)


class Slices(nn.Module):
    """Gives something else, without a word, where channels are missing; in training mode alone or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always, self.stem, self.head = always, nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.always:
            x = torch.cat([x[:, 4:], x[:, :4]], 1)
        elif self.training:
            x = x + torch.ones(1, 8, 1, 1)
        maps: Tensor = self.head(x)
        return maps.mean((2, 3))


@pytest.mark.parametrize("always", [True, False])
def test_a_model_that_would_be_another_one_stays_as_it_is(always: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Slices(always).eval(), torch.randn(2, 1, 8, 8)
    zero_channels(model, inputs, 0.5, 1)
    with narrowed(model, inputs):
        assert len(model.stem.weight) == 8


def test_nothing_is_looked_for_where_no_row_is_zero() -> None:
    """Such a model need not be traceable."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x if x.sum() > 0 else -x)
            return logits

    model = Branches().eval()
    with narrowed(model, torch.randn(2, 4)):
        assert size(model) == 10
    with torch.no_grad():
        model.head.weight[0] = 0
    with narrowed(model, torch.randn(2, 4)):
        assert size(model) == 10


def test_a_training_that_fails_leaves_the_model_as_wide_as_it_was() -> None:
    torch.manual_seed(0)
    model, inputs = Dense().eval(), torch.randn(2, 1, 8, 8)
    zero_channels(model, inputs, 0.5, 1)
    wide = size(model)

    def training() -> None:
        with narrowed(model, inputs):
            assert size(model) < wide
            raise NotFinite("the loss")

    with pytest.raises(NotFinite):
        training()
    assert size(model) == wide


def test_what_is_not_trained_is_not_narrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("qsweep.hub.narrow.narrowed", refused)
    found = context(tmp_path, original=lambda: Toy().model())
    for stage in (Channels(sparsity=0.5, multiple_of=1, epochs=0), Logits(epochs=0)):
        stage.apply(Toy().model(), dataclasses.replace(found, key=stage.method))


@contextmanager
def as_it_is(*_: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_trainings_of_narrow_and_wide_models_learn_the_same(
    optimizer: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the order in which sums are rounded."""
    torch.manual_seed(0)
    first, teacher, sizes = Toy().model(), Toy().model().eval(), []
    fit, settings = qsweep.train.fit, {"optimizer": optimizer, "device": device}

    def counted(model: nn.Module, *arguments: Any, **options: Any) -> None:
        sizes.append(size(model))
        fit(model, *arguments, **options)

    def trained(folder: Path) -> nn.Module:
        plain = context(folder, original=lambda: teacher)
        model, training = copy.deepcopy(first), plain.training.model_copy(update=settings)
        pruning = Channels(sparsity=0.5, multiple_of=1, learning_rate=0.01)
        for stage in (pruning, Logits(learning_rate=0.01)):
            model = stage.apply(model, dataclasses.replace(plain, training=training, key=stage.method))
        return model

    monkeypatch.setattr("qsweep.train.fit", counted)
    narrow = trained(tmp_path / "narrow")
    monkeypatch.setattr("qsweep.hub.narrow.narrowed", as_it_is)
    wide = trained(tmp_path / "wide")
    assert sizes == [size(first) - 2 * (9 + 2 + 32)] * 2 + [size(first)] * 2
    images = Toy().transform(Toy().samples("test").inputs)
    torch.testing.assert_close(narrow(images), wide(images), rtol=0, atol=1e-4 if device == "cpu" else 1e-2)
    assert not torch.allclose(narrow(images), first.eval()(images), rtol=1e-2, atol=1e-2)
