"""Models of words: numbers of words come as float32, and the model makes indices and a mask of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Noise, context
from torch import Tensor, nn

from qsweep.engines.base import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.simulate import simulation
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ

WORDS, LENGTH = 5000, 12


class Classifier(nn.Module):
    """A block of a transformer over the words of a text; 0 is no word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Parameter(0.1 * torch.randn(1, LENGTH, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, numbers: Tensor) -> Tensor:
        words = numbers.long()
        there = (words != 0).float().unsqueeze(2)
        x = self.words(words) + self.places
        read = self.block(x, src_key_padding_mask=words == 0) * there
        return self.head(read.sum(1) / there.sum(1))


def texts(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    return torch.where(torch.arange(LENGTH) < lengths, numbers, 0).float()


def quantized(folder: Path) -> tuple[QuantizedModel, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = Classifier().eval(), texts(40)
    found = context(folder, task=Noise(inputs=inputs))
    return PTQ(calibration_samples=40).apply(model, found), model, inputs


@pytest.mark.parametrize(
    "engine", [Reference, Inductor, OnnxRuntime, None], ids=["reference", "inductor", "ort", "cuda"]
)
def test_integers_run_on_every_engine(engine: type[EngineConfig] | None, tmp_path: Path, device: str) -> None:
    model, plain, inputs = quantized(tmp_path)
    expected = IntegerInterpreter(model.graph)(inputs)
    with torch.no_grad():
        assert nn.functional.cosine_similarity(expected, plain(inputs)).min() > 0.98
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        found = Chain(model, len(inputs), device, {}, products=torch.float32)(inputs.to(device)).cpu()
    else:
        found_in = context(tmp_path, task=Noise(inputs=inputs))
        config = engine(batch_size=len(inputs))
        (tmp_path / "artifact").mkdir()
        config.lower(model, tmp_path / "artifact", found_in.store)
        found = config.load(tmp_path / "artifact")(inputs)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_numbers_of_words_are_not_rounded_to_half_precision(dtype: str, tmp_path: Path) -> None:
    _, plain, inputs = quantized(tmp_path)
    graph = float_graph(plain, context(tmp_path, task=Noise(inputs=inputs)))
    with torch.no_grad():
        found = simulation(graph.cast_to(dtype))(inputs)
        torch.testing.assert_close(found, plain(inputs), atol=0.05, rtol=0)


def test_words_are_trained_with_quantization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = texts(64)
    found = context(tmp_path, task=Noise(inputs=inputs))
    model = LSQ(epochs=1, calibration_samples=40, learning_rate=0.01).apply(Classifier(), found)
    assert IntegerInterpreter(model.graph)(inputs).isfinite().all()
