"""`nn.EmbeddingBag`: rows of a table summed, averaged or bounded, as recommenders look categories up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Noise, context, shared
from torch import Tensor, nn

from qsweep.engines.base import EngineConfig
from qsweep.engines.executorch import ExecuTorch
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.openvino import OpenVINO
from qsweep.errors import ExportFailure
from qsweep.hub.export import export
from qsweep.hub.form import stored_bits
from qsweep.hub.integer import IntegerInterpreter
from qsweep.quantize._training import prepared, start
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ

ROWS, LENGTH = 50, 4
OFFSETS = {
    "table": lambda ids: None,
    "steps": lambda ids: torch.arange(0, ids.numel(), ids.shape[1]),
    "product": lambda ids: torch.arange(ids.shape[0]) * LENGTH,
}


class Bag(nn.Module):
    """Two linears behind a bag of the numbers of a sample."""

    def __init__(self, mode: str, offsets: str = "table", *, weighted: bool = False, **fields: Any) -> None:
        super().__init__()
        self.bag, self.offsets, self.weighted = nn.EmbeddingBag(ROWS, 16, mode=mode, **fields), offsets, weighted
        nn.init.normal_(self.bag.weight)  # that of the padding, too
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, numbers: Tensor) -> Tensor:
        ids, weights = numbers.long(), numbers / ROWS if self.weighted else None
        offsets = OFFSETS[self.offsets](ids)
        if offsets is not None:
            ids, weights = ids.flatten(), None if weights is None else weights.flatten()
        return self.layers(self.bag(ids, offsets, weights))  # type: ignore[no-any-return]


def ids(count: int, most: int = ROWS) -> Tensor:
    numbers = torch.randint(0, most, (count, LENGTH), generator=torch.Generator().manual_seed(0)).float()
    numbers[3] = 2
    return numbers


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("fields", [{}, {"padding_idx": 2}, {"padding_idx": 2 - ROWS}], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_length_are_what_pytorch_gives(mode: str, fields: dict[str, Any], offsets: str) -> None:
    torch.manual_seed(0)
    numbers = ids(20, most=6)
    for weighted in (False, True) if mode == "sum" else (False,):
        model = Bag(mode, offsets, weighted=weighted, **fields).eval()
        with torch.no_grad():
            torch.testing.assert_close(export(model, numbers[:2]).graph(numbers), model(numbers))


@pytest.mark.parametrize("offsets", ["ids", "last"])
def test_bags_of_lengths_that_data_tell_are_refused(offsets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OFFSETS, "ids", lambda ids: ids[:, 0].sort().values)
    monkeypatch.setitem(OFFSETS, "last", lambda ids: torch.arange(0, ids.numel() + 1, LENGTH))
    model = Bag("sum", offsets, include_last_offset=offsets == "last")
    with pytest.raises(ExportFailure, match=r"self\.bag\(.*all bags must have one length.*`padding_idx`"):
        export(model, ids(4)[:2])


@pytest.mark.parametrize(
    ("engine", "mode"),
    [(OnnxRuntime, "mean"), (OnnxRuntime, "max"), (OpenVINO, "mean"), (OpenVINO, "max"), (Inductor, "mean"),
     (ExecuTorch, "sum"), (None, "mean"), (None, "max")],
)  # fmt: skip
def test_engines_look_them_up_in_tables_of_few_bits(
    engine: type[EngineConfig] | None, mode: str, tmp_path: Path, device: str
) -> None:
    torch.manual_seed(0)
    numbers = ids(40)
    model = Bag(mode, padding_idx=2).eval()
    made = PTQ(embedding_bits=4, calibration_samples=40).apply(model, shared(f"40 bags, {mode}", numbers))
    assert stored_bits(made.graph)["bag.weight"] == 4
    expected = IntegerInterpreter(made.graph)(numbers)
    with torch.no_grad():
        assert nn.functional.cosine_similarity(expected, model(numbers)).min() > 0.95
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        found = Chain(made, len(numbers), device, {}, products=torch.float32)(numbers.to(device)).cpu()
    else:
        config = engine(batch_size=len(numbers))
        if (reason := config.available()) is not None:
            pytest.skip(reason)
        found_in = context(tmp_path, task=Noise(inputs=numbers))
        (tmp_path / "artifact").mkdir()
        config.lower(made, tmp_path / "artifact", found_in.store)
        found = config.load(tmp_path / "artifact")(numbers)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_their_tables_are_trained_with_quantization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    numbers, model = ids(64), Bag("mean", padding_idx=2)
    found = context(tmp_path, task=Noise(inputs=numbers))
    config = LSQ(epochs=1, calibration_samples=40, learning_rate=0.1)
    live = prepared(config, model, found)
    start(live.graph, 2, None)
    live.graph(numbers[4:]).square().sum().backward()
    table = next(value for name, value in live.graph.named_parameters() if name.startswith("bag."))
    used = torch.zeros(ROWS, dtype=torch.bool)
    used[numbers[4:].long().unique()] = True
    used[2] = False  # what fills bags up teaches nothing
    assert table.grad is not None
    assert torch.equal(table.grad.abs().sum(1) > 0, used)
    assert IntegerInterpreter(config.apply(model, found).graph)(numbers).isfinite().all()
