"""What runs on a CUDA device: on one where there is one, and refused with the reason everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Noise, context, network

from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.errors import Refused
from qsweep.hub.export import float_graph
from qsweep.machine import no_gpu

GPU = torch.cuda.is_available()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_float_engine_on_a_gpu_is_refused_at_load_where_there_is_none(tmp_path: Path) -> None:
    engine, found = Float(device="cuda"), context(tmp_path)
    assert engine.available() == no_gpu()
    assert "`device: cuda` needs a" in str(engine.available())
    engine.lower(float_graph(network("digits_cnn"), found), tmp_path, found.store)
    with pytest.raises(Refused, match="`device: cuda` needs a"):
        engine.load(tmp_path)


def test_an_engine_on_the_cpu_does_not_ask_for_a_gpu() -> None:
    assert Float().available() is None
    with pytest.raises(ValueError, match="cpu"):
        Inductor.model_validate({"device": "cuda"})


def test_a_gpu_has_fp16_among_its_baselines() -> None:
    names = [content.get("compress", {}).get("quantize", {}) for content in Float(device="cuda").baselines()]
    assert [name.get("dtype") for name in names] == [None, "bf16", "fp16", None]
    assert len(Float().baselines()) == 3


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("compile", "capture"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_float_engine_gives_the_models_outputs_on_a_gpu(compile: bool, capture: bool, tmp_path: Path) -> None:
    found, inputs = context(tmp_path), Noise(8).inputs
    engine = Float(device="cuda", batch_size=8, compile=compile, capture=capture)
    model = float_graph(network("digits_cnn"), found)
    engine.lower(model, tmp_path, found.store)
    run = engine.load(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(run(inputs.cuda()).cpu(), model.graph(inputs), rtol=2e-3, atol=2e-3)
    with pytest.raises(Refused, match="takes inputs"):
        run(inputs[:4].cuda())
