"""Weights that are quantized alone, on ONNX Runtime and OpenVINO: packed in linears, made real elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, Noise, made, network, shared
from onnx import helper, numpy_helper
from safetensors.torch import load_file
from test_recurrent import INPUTS as SOUNDS
from test_recurrent import Gated, Simple, Spoken
from test_words import Classifier, Tied, texts
from torch import Tensor, nn

from qsweep.engines import EngineConfig
from qsweep.engines._onnx import complete
from qsweep.engines._onnx_weights import PACKED_PRODUCT, pack_weights, rounding
from qsweep.engines.executorch import ExecuTorch
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.hub.form import QuantizedModel, stored_bits
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.ops import STORED
from qsweep.hub.save import load, save, structure
from qsweep.hub.simulate import simulation
from qsweep.hub.weights import real_weight
from qsweep.measure.files import file_sizes
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.spec import Compression

NOISE = Noise(20).inputs
TOKENS = torch.randn(20, 7, 96, generator=torch.Generator().manual_seed(0))
SCHEMES: list[dict[str, Any]] = [
    {"weight_bits": 8},
    {"weight_bits": 4},
    {"weight_bits": 4, "group_size": 32},
    {"weight_bits": 3, "weight_granularity": "tensor"},
    {"weight_bits": 2, "group_size": 64},
    {"weight_bits": 6, "weight_scheme": "asymmetric", "group_size": 32},
    {"weight_bits": 4, "weight_scheme": "asymmetric"},
    {"weight_bits": 2, "weight_scheme": "asymmetric", "group_size": 96},
]
ENGINES = ["onnxruntime", "openvino"]


class Mixer(nn.Module):
    """Linears of several widths over tokens, with and without bias, one of which runs twice; the last reads rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.same, self.odd = nn.Linear(96, 192), nn.Linear(192, 192, bias=False), nn.Linear(192, 75)
        self.norm, self.last = nn.LayerNorm(192), nn.Linear(75, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(x).relu())
        x = x + self.same(F.gelu(self.same(x)))
        found: Tensor = self.last(self.odd(x).relu().mean(1))
        return found


def engine_of(name: str, batch_size: int) -> EngineConfig:
    if name == "onnxruntime":
        return OnnxRuntime(batch_size=batch_size)
    pytest.importorskip("openvino", reason="OpenVINO cannot be installed here")
    from qsweep.engines.openvino import OpenVINO

    return OpenVINO(batch_size=batch_size)


def alone(model: nn.Module, key: str, inputs: Tensor, **fields: Any) -> QuantizedModel:
    config = PTQ.model_validate({"activation_bits": None, "calibration_samples": len(inputs)} | fields)
    return config.apply(model, shared(key, inputs))


def mixer(**fields: Any) -> QuantizedModel:
    return alone(made(Mixer), "mixer of tokens", TOKENS, **fields)


def lowered(model: QuantizedModel, folder: Path, name: str, batch_size: int) -> EngineConfig:
    engine = engine_of(name, batch_size)
    folder.mkdir(exist_ok=True)
    engine.lower(model, folder, shared("mixer of tokens", TOKENS).store)  # graphs of one structure are exported once
    return engine


def packed_products(folder: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == PACKED_PRODUCT]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fields", SCHEMES, ids=str)
def test_linears_read_packed_weights_and_give_what_the_simulation_gives(
    fields: dict[str, Any], engine: str, tmp_path: Path
) -> None:
    model = mixer(**fields)
    wanted = simulation(model)(TOKENS)
    config = lowered(model, tmp_path / "artifact", engine, len(TOKENS))
    found = config.load(tmp_path / "artifact")(TOKENS)
    # what linears read is rounded to 8 bits, in blocks; the grids of the weights are the same
    assert (found - wanted).std() < 0.015 * wanted.std()
    assert len(packed_products(tmp_path / "artifact")) == 5


@given(
    count=st.integers(1, 9), groups=st.integers(1, 4), group=st.sampled_from([1, 32, 40, 64, 96, 128, 256]),
    bits=st.integers(2, 8), asymmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_weights_are_those_of_the_artifact(
    count: int, groups: int, group: int, bits: int, asymmetric: bool, seed: int
) -> None:
    """Unpacked as the op's documentation has it: low bits first, and half of the levels less where none are given."""
    depth, random = groups * group, torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    width = next(width for width in (2, 4, 8) if width >= bits)
    block = next((block for block in (128, 64, 32) if group % block == 0), 32 if groups == 1 else None)
    if block is None:
        return
    integers = torch.randint(low, high + 1, (count, depth), generator=random, dtype=torch.int8)
    scale = torch.rand(count, groups, generator=random)
    offset = torch.randint(low, high + 1, (count, groups), generator=random, dtype=torch.int8) * asymmetric
    weights = {"w": integers, "w_scale": scale, "w_offset": offset}
    given = ["x", "w", "w_scale", *["w_offset"] * asymmetric]
    about = {"K": depth, "N": count, "bits": width, "block_size": block}
    node = helper.make_node(PACKED_PRODUCT, given, ["y"], domain="com.microsoft", **about)
    content = helper.make_model(helper.make_graph([node], "product", [], []))
    pack_weights(content, weights)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in content.graph.initializer}
    blocks, scales, *offsets = (torch.from_numpy(constants[name].copy()) for name in content.graph.node[0].input[1:])
    assert blocks.shape == (count, -(-depth // block), block * width // 8)

    def unpacked(values: Tensor) -> Tensor:
        shifts = torch.arange(0, 8, width)
        return ((values[..., None].int() >> shifts) & ((1 << width) - 1)).flatten(-2)

    levels = unpacked(blocks)
    zeros = unpacked(offsets[0])[:, : scales.shape[1]] if offsets else torch.full(scales.shape, 1 << (width - 1))
    real = ((levels - zeros[..., None]) * scales[..., None]).flatten(1)[:, :depth]
    wanted = (integers.float() - offset.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    assert torch.equal(real, wanted)


def test_scales_of_groups_take_two_bytes_and_runtimes_read_them_as_float32(tmp_path: Path) -> None:
    model = mixer(weight_bits=4, group_size=32)
    lowered(model, tmp_path, "onnxruntime", len(TOKENS))
    stored = load_file(tmp_path / "weights.safetensors")
    constants = {tensor.name: tensor for tensor in complete(tmp_path).graph.initializer}
    for name in ("wide.weight", "same.weight", "odd.weight"):
        assert stored[f"{name}_scale"].dtype == torch.float16
        scales = torch.from_numpy(numpy_helper.to_array(constants[f"{name}.block_scales"]).copy())
        assert torch.equal(scales, stored[f"{name}_scale"].float())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_no_packed_product_is_real(name: str, engine: str, tmp_path: Path) -> None:
    scheme = "asymmetric" if len(name) % 2 else "symmetric"
    model = alone(network(name), f"alone {name}", NOISE, weight_bits=3, weight_scheme=scheme)
    wanted = simulation(model)(NOISE)
    config = lowered(model, tmp_path / "artifact", engine, len(NOISE))
    found = config.load(tmp_path / "artifact")(NOISE)
    linears = {node.input[1] for node in packed_products(tmp_path / "artifact")}
    real = [node for node in nodes_of(model.graph, STORED) if str(source(node).target) not in linears]
    assert all(real_weight(model.graph, node).dim() > 2 for node in real) or name == "computed"
    within = 0.03 if linears else 1e-4
    torch.testing.assert_close(found, wanted, atol=within * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "fields", [{"weight_bits": 16}, {"group_size": 24}, {"group_size": 24, "weight_scheme": "asymmetric"}], ids=str
)
def test_grids_that_no_packed_product_takes_are_made_real(fields: dict[str, Any], engine: str, tmp_path: Path) -> None:
    model = mixer(**fields)
    config = lowered(model, tmp_path / "artifact", engine, len(TOKENS))
    wide = {node.input[1] for node in packed_products(tmp_path / "artifact")}
    assert wide <= {"odd.weight", "last.weight"}  # their groups are whole channels where 24 does not divide them
    found, wanted = config.load(tmp_path / "artifact")(TOKENS), simulation(model)(TOKENS)
    torch.testing.assert_close(found, wanted, atol=(0.03 if wide else 1e-4) * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Spoken, Gated, Simple])
def test_recurrent_layers_have_their_own(kind: type[nn.Module], engine: str, tmp_path: Path) -> None:
    model = alone(made(kind), f"alone {kind.__name__}", SOUNDS, weight_bits=4, group_size=4)
    config = lowered(model, tmp_path / "artifact", engine, len(SOUNDS))
    found, wanted = config.load(tmp_path / "artifact")(SOUNDS), simulation(model)(SOUNDS)
    torch.testing.assert_close(found, wanted, atol=0.03 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Classifier, partial(Tied, bias=False)], ids=["apart", "tied"])
def test_tables_are_read_as_rows_and_multiplied_packed(kind: Any, engine: str, tmp_path: Path) -> None:
    inputs = texts(40) % 50
    model = alone(made(kind), f"alone {kind}", inputs, weight_bits=4, group_size=16)
    config = lowered(model, tmp_path / "artifact", engine, len(inputs))
    found, wanted = config.load(tmp_path / "artifact")(inputs), simulation(model)(inputs)
    torch.testing.assert_close(found, wanted, atol=0.03 * wanted.std().item(), rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_products_that_round_count_as_integers_and_no_others(engine: str, tmp_path: Path) -> None:
    packed, wide = mixer(weight_bits=4, group_size=32), mixer(weight_bits=16)
    shares = []
    for number, model in enumerate((packed, wide)):
        folder = tmp_path / str(number)
        config = lowered(model, folder, engine, len(TOKENS))
        runner = config.load(folder)
        runner(TOKENS)
        shares.append(config.integer_macs(folder, runner, TOKENS) / (len(TOKENS) * model.macs))
    assert 0.95 < shares[0] <= 1  # OpenVINO makes linears of few outputs real
    assert shares[1] == 0


def test_a_product_that_computes_in_floats_is_told_from_one_that_rounds(tmp_path: Path) -> None:
    lowered(mixer(weight_bits=4), tmp_path / "artifact", "onnxruntime", len(TOKENS))
    content = complete(tmp_path / "artifact")

    def run(product: onnx.ModelProto, inputs: Tensor) -> Tensor:
        import onnxruntime

        (node,) = product.graph.node
        if node.name in exact:
            (level,) = (each for each in node.attribute if each.name == "accuracy_level")
            level.i = 1
        session = onnxruntime.InferenceSession(product.SerializeToString(), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {node.input[0]: inputs.numpy()})[0])

    exact: set[str] = set()
    names = set(rounding(content, run))
    assert len(names) == 5
    exact = set(sorted(names)[:2])
    assert set(rounding(content, run)) == names - exact


def test_what_is_exported_is_packed_too(tmp_path: Path) -> None:
    import onnxruntime

    model = mixer(weight_bits=4, group_size=32)
    config = lowered(model, tmp_path / "artifact", "onnxruntime", len(TOKENS))
    (tmp_path / "out").mkdir()
    config.export(tmp_path / "artifact", tmp_path / "out")
    parameters = sum(value.numel() for value in made(Mixer).parameters())
    assert (tmp_path / "out/model.onnx").stat().st_size < parameters  # a byte each would be as much, floats 4 times
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: TOKENS.numpy()})
    assert torch.equal(torch.from_numpy(found), config.load(tmp_path / "artifact")(TOKENS))


def test_what_openvino_exports_computes_as_measured(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO cannot be installed here")
    import json

    model = mixer(weight_bits=4, group_size=32)
    config = lowered(model, tmp_path / "artifact", "openvino", len(TOKENS))
    (tmp_path / "out").mkdir()
    config.export(tmp_path / "artifact", tmp_path / "out")
    parameters = sum(value.numel() for value in made(Mixer).parameters())
    assert (tmp_path / "out/model.bin").stat().st_size < parameters
    settings = json.loads((tmp_path / "out/settings.json").read_text())["CPU"] | {"INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(tmp_path / "out/model.xml", "CPU", settings)
    found = torch.from_numpy(compiled(TOKENS.numpy())[0])
    torch.testing.assert_close(found, config.load(tmp_path / "artifact")(TOKENS), atol=1e-5, rtol=1e-5)


def test_fewer_bits_make_a_smaller_artifact(tmp_path: Path) -> None:
    sizes = []
    for bits in (8, 4, 2):
        lowered(mixer(weight_bits=bits, group_size=32), tmp_path / str(bits), "onnxruntime", len(TOKENS))
        sizes.append(file_sizes(tmp_path / str(bits))["size_bytes"])
    weights = sum(value.numel() for value in made(Mixer).parameters() if value.dim() == 2)
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.01)
    assert sizes[1] - sizes[2] == pytest.approx(weights / 4, rel=0.01)


def test_zero_points_that_are_all_0_are_not_stored(tmp_path: Path) -> None:
    sizes = []
    for scheme in ("symmetric", "asymmetric"):
        model = mixer(weight_bits=4, group_size=32, weight_scheme=scheme)
        (folder := tmp_path / scheme).mkdir()
        save(model, folder)
        again = load(folder)
        assert torch.equal(simulation(again)(TOKENS), simulation(model)(TOKENS))
        assert stored_bits(again.graph) == stored_bits(model.graph)
        sizes.append((folder / "weights.safetensors").stat().st_size)
    groups = (96 * 192 + 192 * 192 + 192 * 75) // 32 + 10
    assert sizes[1] - sizes[0] >= groups


def test_latencies_of_other_widths_are_not_one(tmp_path: Path) -> None:
    """Activations' widths decide where both are integers, those of weights where they alone are."""
    kernels = [structure(mixer(weight_bits=bits), widths=True) for bits in (4, 8, 8)]
    assert kernels[0] != kernels[1] == kernels[2]
    context = shared("mixer of tokens", TOKENS)
    both = [PTQ(weight_bits=bits, calibration_samples=20).apply(made(Mixer), context) for bits in (4, 8)]
    assert structure(both[0], widths=True) == structure(both[1], widths=True)


def test_weights_trained_alone_are_shipped_as_they_were_trained(tmp_path: Path) -> None:
    config = QAT(weight_bits=3, activation_bits=None, epochs=1, calibration_samples=20)
    model = config.apply(made(Mixer), shared("mixer of tokens", TOKENS))
    engine = lowered(model, tmp_path / "artifact", "onnxruntime", len(TOKENS))
    found, wanted = engine.load(tmp_path / "artifact")(TOKENS), simulation(model)(TOKENS)
    assert (found - wanted).std() < 0.015 * wanted.std()


@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_bits": 4, "group_size": 32}, {"weight_scheme": "asymmetric"}, {"weight_bits": 16}],
    ids=str,
)
def test_every_grid_of_weights_alone_is_taken(fields: dict[str, Any]) -> None:
    config = Compression(quantize=PTQ.model_validate({"activation_bits": None} | fields))
    assert OnnxRuntime().refuses(config) is None
    for engine in (Inductor(), ExecuTorch()):
        assert "`float`" in str(engine.refuses(config))


def test_tables_of_values_are_not(tmp_path: Path) -> None:
    assert "`float`" in str(OnnxRuntime().refuses(Compression(quantize=Codebook())))
