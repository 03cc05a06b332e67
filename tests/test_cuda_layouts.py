"""Chains of networks whose values lie in memory in ways that kernels do not like; see `test_cuda_chain.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from layout_networks import ConvNeXt, Deep, Drawn, Gated, NormedSequence, Summed, Viewed, Windowed
from networks import Noise, context
from torch import Tensor, nn

from qsweep.cuda.chain import Chain
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
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


@pytest.mark.parametrize("seed", range(24))
def test_drawn_networks_give_what_the_reference_gives(seed: int, tmp_path: Path, device: str) -> None:
    torch.manual_seed(seed)
    assert_equal(quantized(Drawn(seed), tmp_path, seed), 1 + seed % 3, device)
