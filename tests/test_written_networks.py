"""Networks as people write them run on every engine: what is integer equals the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from networks import Noise, assert_close, context, made
from test_odd_networks import INPUTS, outputs
from torch import nn
from written_networks import WRITTEN, Attended, Clips, Related, Rotated

from qsweep.engines import EngineConfig
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.hub.export import export, float_graph
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import aten
from qsweep.quantize.ptq import PTQ

Quantized = Callable[[type[nn.Module]], QuantizedModel]
SMALL = INPUTS[:3]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    @cache
    def once(kind: type[nn.Module]) -> QuantizedModel:
        found = context(tmp_path_factory.mktemp("written"), task=Noise(inputs=INPUTS))
        return PTQ(calibration_samples=20).apply(made(kind), found)

    return once


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_reference_is_the_model_within_quantization(kind: type[nn.Module], quantized: Quantized) -> None:
    wanted = made(kind)(INPUTS).detach()
    difference = IntegerInterpreter(quantized(kind).graph)(INPUTS) - wanted
    assert difference.std() < 0.03 * wanted.std()


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_float_baseline_is_the_model(kind: type[nn.Module], tmp_path: Path) -> None:
    live = float_graph(made(kind), context(tmp_path, task=Noise(inputs=INPUTS)))
    found = outputs(Float(batch_size=20, compile=False), live, tmp_path)
    torch.testing.assert_close(found, made(kind)(INPUTS).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", WRITTEN)
def test_gradients_are_those_of_the_model(kind: type[nn.Module]) -> None:
    model = made(kind)
    graph = export(model, INPUTS[:2]).graph
    for one in (model, graph):
        one(INPUTS).square().mean().backward()
    wanted, found = dict(model.named_parameters()), dict(graph.named_parameters())
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name].grad, parameter.grad)


RUNS = [(Related, Inductor), *((kind, OnnxRuntime) for kind in (Attended, Clips, Rotated, Related))]


@pytest.mark.parametrize(("kind", "engine"), RUNS)
def test_runtimes_give_what_the_reference_gives(
    kind: type[nn.Module], engine: type[EngineConfig], quantized: Quantized, tmp_path: Path
) -> None:
    wanted = IntegerInterpreter(quantized(kind).graph)(INPUTS)
    assert_close(outputs(engine(batch_size=20), quantized(kind), tmp_path), wanted)


@pytest.mark.parametrize("products", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WRITTEN)
def test_the_chain_gives_what_the_reference_gives(
    kind: type[nn.Module], products: torch.dtype, quantized: Quantized, device: str
) -> None:
    pytest.importorskip("triton")
    from qsweep.cuda.chain import Chain

    chain = Chain(quantized(kind), len(SMALL), device, {}, products=products)
    within = 0.02 if products == torch.float32 else 0.06
    for inputs in (SMALL, -SMALL):
        assert_close(chain(inputs.to(device)).cpu(), IntegerInterpreter(quantized(kind).graph)(inputs), within)
    made_once = aten.sym_size.int, aten.arange.default, aten.zeros.default, aten.index.Tensor
    assert not set(map(str, made_once)).intersection(chain.plan.islands)
