"""Channels that go together: which of a network can be taken out, and that nothing else changes when they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Noise, context, network
from torch import Tensor, nn

from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.errors import TaskFailure
from qsweep.hub.channels import couple
from qsweep.hub.export import export, traced
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.prune._channels import zero_channels
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A layer of eight channels, what is done with them, a linear of what that gives."""

    def __init__(self, body: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.body, self.layers = body, nn.ModuleList(layers)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            self.head = nn.Linear(self._before(INPUTS[:2]).shape[1], 4)

    def _before(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.stem(x)), *self.layers).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self._before(x))
        return logits


def conv(inputs: int, outputs: int, size: int = 3, **rest: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **rest)


class Own(nn.Module):
    """Parameters that are no layer's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.rand(*shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


def gated(x: Tensor, down: nn.Module, up: nn.Module) -> Tensor:
    return x * torch.sigmoid(up(F.relu(down(x.mean((2, 3), keepdim=True)))))


def halves(x: Tensor, wide: nn.Module) -> Tensor:
    one, other = wide(x).chunk(2, 1)
    return one * torch.sigmoid(other)


def tokens(x: Tensor, norm: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return rows + down(F.gelu(up(norm(rows))))


def attention(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
    """As timm writes it: four heads of two."""
    rows = x.flatten(2).transpose(1, 2)
    q, k, v = qkv(rows).reshape(-1, 64, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    given = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 64, 8)
    return rows + out(given)


def spelled_out(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, norm: nn.Module, masked: bool) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    queries, keys, values = (layer(rows).view(-1, 64, 4, 2).transpose(1, 2) for layer in (q, k, v))
    scores = norm(queries) @ keys.transpose(2, 3) / 2**0.5
    if masked:
        scores = scores + torch.ones(64, 64).triu(1) * -1e4
    given: Tensor = scores.softmax(-1) @ values
    return given.transpose(1, 2).flatten(2)


def of_dimensions(x: Tensor, qkv: nn.Module) -> Tensor:
    """Attention over channels: what is cut into heads is summed over."""
    q, k, v = qkv(x.flatten(2).transpose(1, 2)).chunk(3, 2)
    return F.scaled_dot_product_attention(q, k, v)


def widened(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))


def shuffled(x: Tensor) -> Tensor:
    return x.reshape(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)


def twice(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(F.relu(layer(x)))


FOLLOWED: dict[str, tuple[Callable[..., Tensor], list[nn.Module], list[int]]] = {
    "flattened": (lambda x: x.flatten(1), [], [8]),
    "chain": (lambda x, a: F.relu(a(x)), [conv(8, 12)], [8, 12]),
    "norm": (lambda x, a, n: F.silu(n(a(x))), [conv(8, 12, bias=False), nn.BatchNorm2d(12)], [8, 12]),
    "learned slope": (lambda x, a, p, b: b(p(a(x))), [conv(8, 12), nn.PReLU(), conv(12, 6)], [8, 12, 6]),
    "learned slopes": (lambda x, a, p, b: b(p(a(x))), [conv(8, 12), nn.PReLU(12), conv(12, 6)], [8, 12, 6]),
    "sum": (lambda x, a, b: x + b(F.relu(a(x))), [conv(8, 12), conv(12, 8)], [8, 12]),
    "difference": (lambda x, a: x - a(x) / 2, [conv(8, 8)], [8]),
    "concatenation": (lambda x, a: torch.cat([x, a(x), x], 1), [conv(8, 6)], [8, 6]),
    "concatenated pixels": (lambda x, a: torch.cat([x, a(x)], 2), [conv(8, 8)], [8]),
    "depthwise": (lambda x, a, b: b(F.hardswish(a(x))), [conv(8, 8, groups=8), conv(8, 6, 1)], [8, 6]),
    "depthwise, two each": (lambda x, a: a(x), [conv(8, 16, groups=8)], [8]),
    "groups": (lambda x, a, b: b(F.relu(a(x))), [conv(8, 12, groups=2), conv(12, 6)], [4, 6, 6]),
    "gate": (gated, [conv(8, 4, 1), conv(4, 8, 1)], [8, 4]),
    "halves": (halves, [conv(8, 12)], [8, 6]),
    "transposed": (lambda x, a, b: b(F.relu(a(x))), [nn.ConvTranspose2d(8, 6, 2, stride=2), conv(6, 4)], [8, 6, 4]),
    "pools": (lambda x: torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1), [], [8]),
    "pool of all": (lambda x, a: a(F.adaptive_avg_pool2d(x, 1).flatten(1)), [nn.Linear(8, 6)], [8, 6]),
    "upsampled": (lambda x, a: a(F.interpolate(x, scale_factor=2)), [conv(8, 6)], [8, 6]),
    "padded": (lambda x, a: a(F.pad(x, (1, 1, 1, 1))), [conv(8, 6)], [8, 6]),
    "zeros for channels": (widened, [conv(8, 16, stride=2)], [8, 8]),
    "factors": (lambda x, g: g(x), [Own(8, 1, 1)], [8]),
    "factors of pixels": (lambda x, g: g(x), [Own(1, 8, 8)], [8]),
    "a map for all": (lambda x, a: x * torch.sigmoid(a(x)), [conv(8, 1)], [8]),
    "channels last": (lambda x, a: a(x.permute(0, 2, 3, 1)), [nn.Linear(8, 6)], [8, 6]),
    "sizes": (lambda x, a: a(x.reshape(-1, 8, 64).transpose(1, 2)).reshape(-1, 64 * 6), [nn.Linear(8, 6)], [8, 6]),
    "tokens": (tokens, [nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)], [12]),
    "rows": (lambda x, a, n: F.relu(n(a(x.flatten(1)))), [nn.Linear(512, 12), nn.BatchNorm1d(12)], [8, 12]),
    "signals": (lambda x, a: F.relu(a(x.flatten(2))), [nn.Conv1d(8, 6, 3)], [8, 6]),
    "shared": (twice, [conv(8, 8)], [8]),
    "attention": (attention, [nn.Linear(8, 24), nn.Linear(8, 8)], [8, 4]),
    "attention, spelled out": (
        partial(spelled_out, masked=False),
        [*(nn.Linear(8, 8) for _ in range(3)), nn.LayerNorm(2)],
        [8, 4],
    ),
    "masked": (partial(spelled_out, masked=True), [*(nn.Linear(8, 8) for _ in range(3)), nn.LayerNorm(2)], [8, 4]),
    "slices": (lambda x, a: a(x[:, 2:-2]) + x[:, -4:] * x[:, :4], [conv(4, 4)], [4]),
    "shuffled": (lambda x, a: a(shuffled(x)), [conv(8, 6)], [4, 6]),
    "one pixel": (lambda x, a: a(x[:, :, 0]), [nn.Conv1d(8, 6, 3)], [8, 6]),
    "softmax of pixels": (lambda x, a: a(x) * x.softmax(3), [conv(8, 8)], [8]),
    "scaled": (lambda x, a: a(x * 2 + 0), [conv(8, 6)], [8, 6]),
}
"""What follows the first layer, and the widths out of which channels can be taken."""
STAYING: dict[str, tuple[Callable[..., Tensor], list[nn.Module], list[int]]] = {
    "constant": (lambda x, a: a(x + 1), [conv(8, 6)], [6]),
    "not zero at zero": (lambda x, a: a(torch.sigmoid(x)), [conv(8, 6)], [6]),
    "padded with ones": (lambda x, a: a(F.pad(x, (1, 1, 1, 1), value=1.0)), [conv(8, 6)], [6]),
    "norm without factors": (lambda x, a, n: a(n(x)), [conv(8, 6), nn.BatchNorm2d(8, affine=False)], [6]),
    "layer norm": (lambda x, a, n: a(n(x.flatten(1))), [nn.Linear(512, 6), nn.LayerNorm(512)], [6]),
    "group norm": (lambda x, a, n: a(n(x)), [conv(8, 6), nn.GroupNorm(2, 8)], [6]),
    "softmax": (lambda x, a: a(x.softmax(1)), [conv(8, 6)], [6]),
    "attention without heads": (of_dimensions, [nn.Linear(8, 24)], [8]),
    "layer norm of rows": (lambda x, a, n: a(n(x)), [conv(8, 6), nn.LayerNorm(8)], [6]),
    "every other": (lambda x, a: a(x[:, ::2]), [conv(4, 6)], [6]),
    "added parameters": (lambda x, g, a: a(x + g.value), [Own(8, 1, 1), conv(8, 6)], [6]),
    "with the inputs": (lambda x, a: a(x + F.pad(x.new_ones(1, 3, 8, 8), (0, 0, 0, 0, 5, 0))), [conv(8, 6)], [6]),
}
"""Where the first layer has to stay as wide as it is."""


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    body, layers, _ = {**FOLLOWED, **STAYING}[name]
    model = Net(body, *layers)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for value in (module.running_mean, module.bias):
                nn.init.normal_(value)  # type: ignore[arg-type]
    return model.eval()


def widths_of(model: QuantizedModel) -> list[int]:
    return sorted(len(width.channels) for width in couple(model).widths())


def params(model: QuantizedModel) -> int:
    return sum(parameter.numel() for parameter in model.graph.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", [*FOLLOWED, *STAYING])
def test_channels_that_nothing_else_reads_are_taken_out_and_the_outputs_stay(name: str) -> None:
    model, widths = net(name), sorted({**FOLLOWED, **STAYING}[name][2])
    before = traced(model, INPUTS[:2])
    assert widths_of(before) == widths
    zero_channels(model, INPUTS[:2], 0.5, 1)
    after = export(model, INPUTS[:2])
    torch.testing.assert_close(after.graph(INPUTS), model(INPUTS))
    assert params(after) < params(before)
    assert widths_of(after) == [(width + 1) // 2 for width in widths]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: Net(lambda x: x[:, 3]), INPUTS),
        (lambda: Net(lambda x: x.sum(1)), INPUTS),
        (lambda: network("computed"), Noise(8).inputs),
    ],
)
def test_a_model_whose_channels_all_have_to_stay_is_refused(model: Callable[[], nn.Module], inputs: Tensor) -> None:
    with pytest.raises(TaskFailure, match="channel pruning needs"):
        zero_channels(model(), inputs[:2], 0.5, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "computed"])
def test_empty_channels_of_every_network_are_taken_out_and_the_outputs_stay(name: str) -> None:
    model, inputs = network(name), Noise(8).inputs
    before = params(traced(model, inputs[:2]))
    zero_channels(model, inputs[:2], 0.5, 1)
    after = export(model, inputs[:2])
    torch.testing.assert_close(after.graph(inputs), model(inputs))
    assert params(after) < before


def test_what_is_left_is_trained_quantized_and_run_on_integers(tmp_path: Path) -> None:
    model, found = network("depthwise"), context(tmp_path)
    inputs = found.task.samples("train").inputs[:20]
    zero_channels(model, inputs[:2], 0.5, 1)
    for config in (PTQ(calibration_samples=20), QAT(epochs=1, calibration_samples=20)):
        made = config.apply(model, found)
        assert [len(layer.weight) for layer in made.layers()] == [4, 12, 12, 4, 10]
        folder = tmp_path / config.method
        folder.mkdir()
        engine = OnnxRuntime(batch_size=20)
        engine.lower(made, folder, found.store)
        wanted = IntegerInterpreter(made.graph)(inputs)
        torch.testing.assert_close(engine.load(folder)(inputs), wanted, atol=0.02 * wanted.std().item(), rtol=0)
