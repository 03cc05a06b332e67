"""Chains of networks whose values lie in memory in ways that kernels do not like; see `test_cuda_chain.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import torch.nn.functional as F
from layout_networks import ConvNeXt, Deep, Drawn, Gated, NormedSequence, Summed, Viewed, Windowed
from networks import Noise, context
from torch import Tensor, nn

from qsweep.cuda.chain import Chain
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter, integer_macs
from qsweep.quantize.ptq import PTQ


def quantized(model: nn.Module, folder: Path, seed: int = 0) -> QuantizedModel:
    inputs = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return PTQ(calibration_samples=20).apply(model.eval(), context(folder, "model", task=Noise(inputs=inputs)))


def assert_equal(model: QuantizedModel, batch: int, device: str, tolerance: float = 0.0) -> None:
    """On several inputs in turn: values share memory."""
    chain, reference = Chain(model, batch, device, {}), IntegerInterpreter(model.graph)
    for seed in range(3):
        inputs = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        found: Tensor = chain(inputs.to(device)).cpu()
        torch.testing.assert_close(found, reference(inputs), rtol=0, atol=tolerance)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [ConvNeXt, Deep, Gated, NormedSequence, Summed, Viewed, Windowed])
def test_any_layout_gives_what_the_reference_gives(
    kind: type[nn.Module], batch: int, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    exact = kind in (Viewed, Summed)
    assert_equal(quantized(kind(), tmp_path), batch, device, tolerance=0.0 if exact else 0.02)


class Transposed(nn.Module):
    """Most of its work has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.first(x))))).mean((2, 3))


class Mixed(nn.Module):
    """Its attention is a sum that names its indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        weights = torch.einsum("btd,bsd->bts", self.first(x), self.second(x)).softmax(-1)
        logits: Tensor = self.last(torch.einsum("bts,bsd->btd", weights, x).mean(1))
        return logits


@pytest.mark.parametrize(
    ("kind", "integer", "real"),
    [(Transposed, 64 * 9 * 8 + 256 * 8 * 4, 256 * 8 * 8), (Mixed, 2 * 8 * 8 * 8 + 8 * 4, 2 * 8 * 8 * 8)],
)
def test_whatever_op_multiplies_counts_against_the_share_of_integers(
    kind: type[nn.Module], integer: int, real: int, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    model = quantized(kind(), tmp_path)
    wanted = integer / (integer + real)
    assert Chain(model, 2, device, {}).integer_share == pytest.approx(wanted)
    assert integer_macs(IntegerInterpreter(model.graph), torch.randn(2, 1, 8, 8)) == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_networks_give_what_the_reference_gives(seed: int, tmp_path: Path, device: str) -> None:
    torch.manual_seed(seed)
    assert_equal(quantized(Drawn(seed), tmp_path, seed), 1 + seed % 3, device)
