"""Chains of networks whose values lie in memory in ways that kernels do not like; see `test_cuda_chain.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from layout_networks import (
    Bordered,
    ConvNeXt,
    Deep,
    Drawn,
    Gated,
    Mixed,
    NormedParts,
    NormedSequence,
    Odd,
    Series,
    Spectrogram,
    Summed,
    Tokens,
    Transposed,
    Upsampled,
    Viewed,
    Windowed,
)
from networks import Noise, context
from test_decoders import DECODERS
from torch import Tensor, nn

from qsweep.cuda.chain import Chain
from qsweep.cuda.steps import RowLayer, Rows
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import NEAREST
from qsweep.quantize.ptq import PTQ


def quantized(model: nn.Module, folder: Path, seed: int = 0, **fields: Any) -> QuantizedModel:
    inputs = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    method = PTQ.model_validate({"calibration_samples": 20} | fields)
    return method.apply(model.eval(), context(folder, "model", task=Noise(inputs=inputs)))


def assert_equal(model: QuantizedModel, batch: int, device: str, tolerance: float = 0.0) -> None:
    """On several inputs in turn: values share memory."""
    chain, reference = Chain(model, batch, device, {}), IntegerInterpreter(model.graph)
    for seed in range(3):
        inputs = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        found: Tensor = chain(inputs.to(device)).cpu()
        torch.testing.assert_close(found, reference(inputs), rtol=0, atol=tolerance)


KINDS = [
    Bordered, ConvNeXt, Deep, Gated, NormedParts, NormedSequence, Series, Spectrogram, Summed, Upsampled, Viewed,
    Windowed, *DECODERS,
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_gives_what_the_reference_gives(
    kind: type[nn.Module], batch: int, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    exact = kind in (Bordered, Spectrogram, Summed, Upsampled, Viewed, *DECODERS)
    assert_equal(quantized(kind(), tmp_path), batch, device, tolerance=0.0 if exact else 0.02)


@pytest.mark.parametrize(("size", "islands"), [((16, 48), []), ((21, 30), [str(NEAREST)])], ids=str)
def test_pixels_that_are_repeated_stay_integers_where_that_is_a_whole_number_of_times(
    size: tuple[int, int], islands: list[str], tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    model = quantized(Upsampled(size), tmp_path)
    assert_equal(model, 2, device)
    assert Chain(model, 2, device, {}).plan.islands == islands


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_one_number_set_their_own_grids(batch: int, tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    assert_equal(quantized(Series(), tmp_path, activation_mode="token"), batch, device, tolerance=0.02)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("normed", "mode"), [(False, "token"), (True, "token"), (True, "static")])
def test_tokens_that_lie_as_an_image_does_are_read_as_rows(
    normed: bool, mode: str, batch: int, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    model = quantized(Tokens(normed), tmp_path, activation_mode=mode)
    assert_equal(model, batch, device, tolerance=0.02)
    steps = Chain(model, batch, device, {}).plan.steps
    made, layers = (sum(isinstance(step, kind) for step in steps) for kind in (Rows, RowLayer))
    assert (made, layers) == ((2, 4) if mode == "token" else (0, 0))  # query, key and value read the same


@pytest.mark.parametrize(
    ("kind", "integer", "real"),
    [(Transposed, 64 * 9 * 8 + 225 * 8 * 4, 64 * 8 * 8), (Mixed, 2 * 8 * 8 * 8 + 8 * 4, 2 * 8 * 8 * 8)],
)
def test_whatever_op_multiplies_counts_against_the_share_of_integers(
    kind: type[nn.Module], integer: int, real: int, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    model = quantized(kind(), tmp_path)
    assert Chain(model, 2, device, {}).plan.macs == (2 * integer, 2 * (integer + real))


@pytest.mark.parametrize("bits", [4, 8])
def test_linears_of_any_width_load_16_bytes_at_a_time(bits: int, tmp_path: Path, device: str) -> None:
    """Past a row lies its room up to the next multiple of 16, or what else a concatenation has: weights there are 0."""
    torch.manual_seed(0)
    model = quantized(Odd(), tmp_path, weight_bits=bits)
    assert_equal(model, 3, device)
    products = {product.name: product.kind for product in Chain(model, 3, device, {})._binding.products}
    read = {name.removesuffix(".weight"): int(re.findall(r"x(\d+)", kind)[1]) for name, kind in products.items()}
    assert read == {"left": 64, "right": 64, "deep": 32, "part": 32, "head": 64}
    assert all(kind.startswith("linear_w4" if bits == 4 else "linear ") for kind in products.values())


@pytest.mark.parametrize("seed", range(16))
def test_drawn_networks_give_what_the_reference_gives(seed: int, tmp_path: Path, device: str) -> None:
    torch.manual_seed(seed)
    assert_equal(quantized(Drawn(seed), tmp_path, seed), 1 + seed % 3, device)
