"""What no model and no data should have: every method fails with a type and a message, or gives what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Noise, context, network
from test_quantize import METHODS, real, small
from torch import Tensor, nn

from qsweep.errors import DataError, NotFinite, Refused
from qsweep.hub.nodes import constant
from qsweep.hub.simulate import simulation
from qsweep.quantize import Quantization
from qsweep.quantize.base import Grids
from qsweep.quantize.cast import Cast
from qsweep.quantize.trained import Trained

INPUTS = Noise(50).inputs
GRIDS = [method for method in METHODS if issubclass(method, Grids)]


class Awkward(nn.Module):
    """A layer of one channel, one that is used twice, a channel of zeros and one of equal weights, and a dead ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 1, 3, padding=1)
        self.twice = nn.Conv2d(1, 1, 3, padding=1)
        self.dead = nn.Conv2d(1, 2, 1)
        self.head = nn.Linear(192, 10)
        self.dead.weight.data.zero_()
        self.dead.bias.data.fill_(-1.0)  # type: ignore[union-attr]
        self.head.weight.data[2] = 0.0
        self.head.weight.data[3] = 0.05

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(self.one(x)))) + 1.0)
        logits: Tensor = self.head(torch.cat([x, F.relu(self.dead(x))], 1).flatten(1))
        return logits


def awkward() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Awkward().eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where float graphs are kept for all methods."""
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(params=METHODS, ids=lambda method: method.__name__)
def method(request: pytest.FixtureRequest) -> type[Quantization]:
    found: type[Quantization] = request.param
    return found


def test_one_channel_shared_weights_constant_and_zero_channels_are_no_trouble(
    method: type[Quantization], root: Path
) -> None:
    made = small(method).apply(awkward(), context(root, "awkward"))
    one, first, second, dead, head = made.layers()
    assert torch.equal(real(made, first), real(made, second))
    assert len(real(made, one)) == 1
    assert (real(made, dead) == 0).all()
    assert (real(made, head)[2] == 0).all()
    outputs = simulation(made)(INPUTS)
    assert outputs.isfinite().all()
    bias = constant(made.graph, head.node.args[2])
    assert bias is not None
    torch.testing.assert_close(outputs[:, 2], bias[2].to(outputs.dtype).expand(len(INPUTS)), atol=1e-2, rtol=0)
    if not issubclass(method, Trained):
        assert len(real(made, head)[3].unique()) == 1
        wanted = awkward()(INPUTS).detach()
        torch.testing.assert_close(outputs, wanted, atol=0.2 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_a_typed_failure(method: type[Quantization], value: float, root: Path) -> None:
    model = network("mlp")
    next(model.parameters()).data[0, 0] = value
    with pytest.raises(NotFinite, match=r"weight|activation|finite"):
        small(method).apply(model, context(root, f"weights {value}"))


@pytest.mark.parametrize("grids", GRIDS, ids=lambda method: method.__name__)
def test_activations_that_are_not_finite_are_a_typed_failure(grids: type[Grids], root: Path) -> None:
    inputs = Noise().inputs.clone()
    inputs[3, 0, 2, 2] = torch.nan
    where = context(root, "mlp", task=Noise(inputs=inputs), seed=1)
    with pytest.raises(NotFinite, match="on the calibration samples"):
        small(grids, calibration_samples=200).apply(network("mlp"), where)


def test_without_samples_there_is_a_typed_failure(method: type[Quantization], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`train`: must hold samples .*\(got none\)"):
        small(method).apply(network("mlp"), context(tmp_path, task=Noise(inputs=torch.empty(0, 1, 8, 8))))


def test_three_samples_are_enough(method: type[Quantization], root: Path) -> None:
    made = small(method).apply(network("mlp"), context(root, "few", task=Noise(inputs=INPUTS[:3])))
    assert simulation(made)(INPUTS).isfinite().all()


@pytest.mark.parametrize("grids", GRIDS, ids=lambda method: method.__name__)
def test_a_group_size_divides_some_layer_and_others_keep_one_scale_a_channel(grids: type[Grids], root: Path) -> None:
    config = small(grids, activation_bits=None, group_size=64)  # channels of 64 and of 32 weights
    made = config.apply(network("mlp"), context(root, "mlp"))
    assert simulation(made)(INPUTS).isfinite().all()
    with pytest.raises(Refused, match=r"`group_size`: must divide .* of some layer \(got 7; they have 32, 64\)"):
        small(grids, activation_bits=None, group_size=7).apply(network("mlp"), context(root, "mlp"))


def test_a_model_without_a_layer_is_refused(method: type[Quantization], root: Path) -> None:
    model, config = nn.Sequential(nn.ReLU(), nn.Flatten()), small(method)
    if isinstance(config, Cast):  # has nothing to look for
        assert config.apply(model, context(root, "nothing")).layers() == []
        return
    with pytest.raises(Refused, match="must have a convolution or a linear"):
        config.apply(model, context(root, "nothing"))


@pytest.mark.parametrize("trained", [method for method in METHODS if issubclass(method, Trained)], ids=str)
def test_a_loss_that_is_not_finite_is_a_typed_failure(trained: type[Trained], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"learning_rate": 1e30, "epochs": 2}
    with pytest.raises(NotFinite, match="training loss"):
        small(trained, **fields).apply(network("mlp"), context(tmp_path))
