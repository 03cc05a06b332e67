from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_networks import ConvNeXt, Mixed, Tokens, Transposed, Windowed
from networks import NETWORKS, Function, Noise, assert_close, context, digits, network
from test_quantize import METHODS, small
from torch import Tensor, nn

from qsweep.config import members
from qsweep.engines import EngineConfig
from qsweep.engines._onnx import complete
from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.errors import BundleError, ExportFailure, Refused
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, QUANTIZE
from qsweep.hub.nodes import nodes_of, set_constant
from qsweep.hub.simulate import simulation
from qsweep.quantize import Quantization
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Compression
from qsweep.stage import Context
from qsweep.store import Store

ENGINES: tuple[type[EngineConfig], ...] = members(EngineConfig, "qsweep.engines")
INTEGER = [engine for engine in ENGINES if engine is not Float]
GRIDS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_bits": 4, "activation_bits": 6, "activation_scheme": "symmetric"},
    {"weight_bits": 2, "activation_bits": 4},
    {"weight_bits": 3, "activation_bits": 2, "weight_granularity": "tensor", "edge_bits": 8},
    {"weight_bits": 4, "activation_bits": 3, "sum_grid": "own"},
)
COUNT = 50


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@dataclass(frozen=True)
class Case:
    model: QuantizedModel
    found: Context
    inputs: Tensor


def case(name: str, root: Path, **fields: Any) -> Case:
    """A quantized network; those of one name share export and calibration through the store under `root`."""
    if name == "digits":
        model, found, _ = digits()
        inputs = found.task.transform(found.task.samples("validation").inputs)
    else:
        model, found = network(name), context(root, name)
        inputs = Noise(COUNT).inputs
    return Case(PTQ.model_validate({"calibration_samples": 200} | fields).apply(model, found), found, inputs)


def integer_share(engine: EngineConfig, folder: Path, case: Case) -> float:
    found = engine.integer_macs(folder, engine.load(folder), case.inputs)
    return found / (len(case.inputs) * case.model.macs)


def lowered(engine: EngineConfig, case: Case, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    engine.lower(case.model, folder, case.found.store)
    return folder


def reference(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and every integer tensor counted from its lowest level."""
    interpreter = IntegerInterpreter(case.model.graph)
    interpreter.keep = True
    outputs = interpreter(case.inputs)
    lows = [grid_of(node).low for node in nodes_of(case.model.graph, {QUANTIZE})]
    return outputs, [value.int() - low for value, low in zip(interpreter.tensors.values(), lows, strict=True)]


def onnx_tensors(folder: Path, inputs: Tensor) -> dict[str, Tensor]:
    """Every integer tensor of ONNX Runtime, counted from its lowest level, in the order of the quantize nodes, by its
    name in the artifact."""
    import onnx
    import onnxruntime

    content = complete(folder)
    bounded = {node.input[0]: node.output[0] for node in content.graph.node if node.op_type == "Clip"}
    nodes = [node for node in content.graph.node if node.op_type == "QuantizeLinear"]
    nodes.sort(key=lambda node: int(node.input[2].removeprefix("grid").removesuffix(".zero_point")))
    quantized = [node.output[0] for node in nodes]
    names = [bounded.get(name, name) for name in quantized]
    for name in names:
        content.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[1:]
    return {name: torch.from_numpy(value).int() for name, value in zip(names, found, strict=True)}


def assert_equal_everywhere(case: Case, folder: Path) -> None:
    engine = OnnxRuntime(batch_size=len(case.inputs))
    lowered(engine, case, folder)
    assert [each.name for each in complete(folder).graph.output] == ["outputs"]
    outputs, tensors = reference(case)
    others = list(onnx_tensors(folder, case.inputs).values())
    assert len(tensors) == len(others) >= 3
    for ours, theirs in zip(tensors, others, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(outputs, engine.load(folder)(case.inputs))


def test_a_graph_is_decomposed_for_onnx_only_where_it_has_to_be(tmp_path: Path, decompositions: list[Any]) -> None:
    for name, layer, times in (("known", nn.Conv2d(1, 4, 3), 0), ("unknown", nn.ConvTranspose2d(1, 4, 3), 1)):
        model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        (tmp_path / name).mkdir()
        graph, engine = float_graph(model, context(tmp_path, name)), OnnxRuntime(batch_size=2)
        decompositions.clear()
        engine.lower(graph, tmp_path / name, Store(tmp_path / "store"))
        assert len(decompositions) == times
        torch.testing.assert_close(engine.load(tmp_path / name)(graph.example), model(graph.example))


@pytest.mark.parametrize("fields", GRIDS, ids=["w8a8", "w4a6 symmetric", "w2a4", "w3a2 tensor", "w4a3 own sums"])
@pytest.mark.parametrize("name", ["digits", *NETWORKS])
def test_onnxruntime_equals_the_reference_on_every_integer_tensor(
    name: str, fields: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    assert_equal_everywhere(case(name, root, **fields), tmp_path)


SCHEMES = st.fixed_dictionaries(
    {
        "weight_bits": st.integers(2, 8),
        "activation_bits": st.integers(2, 8),
        "activation_scheme": st.sampled_from(["symmetric", "asymmetric"]),
        "weight_granularity": st.sampled_from(["channel", "tensor"]),
        "weight_range": st.sampled_from(["minmax", "mse"]),
        "calibration": st.sampled_from(["minmax", "moving_average", "percentile", "entropy", "mse"]),
        "sum_grid": st.sampled_from(["shared", "own"]),
        "edge_bits": st.sampled_from([None, 8]),
        "rounding": st.sampled_from(["nearest", "gptq"]),
        "equalize": st.booleans(),
        "bias_correction": st.booleans(),
    }
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["digits_cnn", "depthwise", "mlp"]), fields=SCHEMES)
def test_onnxruntime_equals_the_reference_whatever_the_scheme(name: str, fields: dict[str, Any], root: Path) -> None:
    with TemporaryDirectory() as folder:
        assert_equal_everywhere(case(name, root, **fields), Path(folder))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_that_onnxruntime_takes_equals_the_reference(
    method: type[Quantization], root: Path, tmp_path: Path
) -> None:
    config = small(method)
    if OnnxRuntime().refuses(Compression(quantize=config)) is not None:
        pytest.skip("refused")
    found = context(root, "shortcut")
    made = config.apply(network("shortcut"), found)
    assert_equal_everywhere(Case(made, found, Noise(COUNT).inputs), tmp_path / "artifact")


def test_onnxruntime_equals_the_reference_on_a_trained_resnet20(data: Path, tmp_path: Path) -> None:
    from qsweep.models import build, load_checkpoint

    model = build("resnet20", 10, 3).eval()
    load_checkpoint(model, data / "checkpoints" / "resnet20_cifar10.safetensors")
    inputs = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = context(tmp_path, task=Noise(inputs=inputs))
    assert_equal_everywhere(Case(PTQ().apply(model, found), found, inputs), tmp_path / "artifact")


@pytest.mark.parametrize("engine", [Reference(), OnnxRuntime()], ids=lambda engine: str(engine.engine))
def test_an_artifact_takes_batches_of_any_size(engine: EngineConfig, root: Path, tmp_path: Path) -> None:
    found = case("digits_cnn", root)
    run = engine.load(lowered(engine, found, tmp_path))
    whole = run(found.inputs)
    assert torch.equal(torch.cat([run(found.inputs[:1]), run(found.inputs[1:8]), run(found.inputs[8:])]), whole)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("engine", [Reference(batch_size=COUNT), OnnxRuntime(batch_size=COUNT)], ids=lambda e: e.engine)
def test_every_layer_runs_on_integers(engine: EngineConfig, name: str, root: Path, tmp_path: Path) -> None:
    found = case(name, root)
    assert integer_share(engine, lowered(engine, found, tmp_path), found) == 1.0


@pytest.mark.parametrize("fields", GRIDS, ids=["w8a8", "w4a6 symmetric", "w2a4", "w3a2 tensor", "w4a3 own sums"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_simulation_is_within_one_level_of_the_reference(name: str, fields: dict[str, Any], root: Path) -> None:
    found = case(name, root, **fields)
    _, tensors = reference(found)
    wrong = layer_by_layer(found, tensors, lambda graph, values: graph(*values))
    assert wrong <= 1e-3


def layer_by_layer(
    case: Case, tensors: list[Tensor], call: Callable[[torch.fx.GraphModule, list[Tensor]], Tensor]
) -> float:
    """Share of integers that differ, each layer fed with the reference's own inputs; asserts that none does by 2."""
    nodes = nodes_of(case.model.graph, {QUANTIZE})
    values = {node: tensor + grid_of(node).low for node, tensor in zip(nodes, tensors, strict=True)}
    wrong = total = 0
    for node in nodes:
        piece, given = between(case.model.graph, node)
        if given:
            found = call(piece, [values[source].to(torch.int8) for source in given])
            difference = (found.int() - values[node]).abs()
            assert difference.max() <= 1
            wrong, total = wrong + int((difference > 0).sum()), total + difference.numel()
    return wrong / total


def between(graph: torch.fx.GraphModule, end: torch.fx.Node) -> tuple[torch.fx.GraphModule, list[torch.fx.Node]]:
    """The part of `graph` from the quantized values before `end` to `end`, and those values; none for the input's."""
    piece = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    given: list[torch.fx.Node] = []

    def copied(node: torch.fx.Node) -> torch.fx.Node:
        if node not in copies:
            if node.target is QUANTIZE and node is not end:
                given.append(node)
                copies[node] = piece.placeholder(node.name)
            else:
                copies[node] = piece.node_copy(node, copied)
        return copies[node]

    piece.output(copied(end))
    return torch.fx.GraphModule(graph, piece), given if end.all_input_nodes[0].op != "placeholder" else []


def powers_of_two(model: QuantizedModel) -> QuantizedModel:
    """`model` with every scale a power of two, and its biases multiples of their new steps.

    Sums then have exact ties, which ONNX Runtime rounds to the other side where a zero point is odd: all are even.
    """
    for node in nodes_of(model.graph, {QUANTIZE, DEQUANTIZE}):
        grid = grid_of(node)
        node.update_arg(1, power(torch.tensor(grid.scale)).item())
        node.update_arg(2, grid.zero_point // 2 * 2)
    for node in nodes_of(model.graph, COMPUTE):
        given, weight, *bias = node.all_input_nodes
        name = str(weight.all_input_nodes[1].target)
        scale = power(model.graph.get_buffer(name))
        set_constant(model.graph, name, scale)
        for name in (str(each.target) for each in bias):
            step = grid_of(given).scale * scale
            set_constant(model.graph, name, (model.graph.get_buffer(name) / step).round() * step)
    model.graph.recompile()
    return model


def power(scale: Tensor) -> Tensor:
    return 2.0 ** scale.log2().round()


@pytest.mark.parametrize("name", NETWORKS)
def test_with_scales_that_are_powers_of_two_all_are_equal_to_the_bit(name: str, root: Path, tmp_path: Path) -> None:
    found = case(name, root)
    found = Case(powers_of_two(found.model), found.found, found.inputs)
    outputs, _ = reference(found)
    engine = OnnxRuntime(batch_size=COUNT)
    assert torch.equal(simulation(found.model)(found.inputs), outputs)
    assert torch.equal(engine.load(lowered(engine, found, tmp_path))(found.inputs), outputs)


def test_grouped_convolutions_have_a_scale_for_every_output_channel(root: Path) -> None:
    found = {layer.name: layer for layer in case("depthwise", root).model.layers()}
    depth = found["depth.0.weight"]
    assert depth.weight.shape == (24, 1, 3, 3)
    assert (depth.weight.abs().flatten(1).amax(1)[1:] == 127).all()


@pytest.mark.parametrize("name", ["computed", "mlp"])
@pytest.mark.parametrize("engine", [Float(batch_size=COUNT), OnnxRuntime(batch_size=COUNT)], ids=lambda e: e.engine)
def test_models_of_one_structure_and_other_numbers_do_not_share_any(
    engine: EngineConfig, name: str, tmp_path: Path
) -> None:
    store, inputs = Store(tmp_path / "store"), Noise(COUNT).inputs
    for seed in range(3):
        model, folder = network(name, seed), tmp_path / str(seed)
        for parameter in [*model.parameters()] * (seed == 0 and name == "mlp"):  # what an exporter can do without
            parameter.data.zero_()
        folder.mkdir()
        engine.lower(float_graph(model, context(tmp_path, f"{seed}")), folder, store)
        torch.testing.assert_close(engine.load(folder)(inputs), model(inputs).detach(), atol=1e-4, rtol=1e-4)


def reshaped(x: Tensor) -> Tensor:
    return x.reshape(-1, 4, 16).reshape(-1, 16, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, wide, narrow: wide(x.flatten(1)) + wide(x.flatten(1)),  # as two heads have it
        lambda x, wide, narrow: wide((y := reshaped(x)).flatten(1)) + narrow(y).mean(1),
    ],
    ids=["twice", "reshaped before"],
)
@pytest.mark.parametrize("mode", [None, "static", "token"])
def test_what_is_flattened_is_read_by_others_too(
    function: Callable[..., Tensor], mode: str | None, tmp_path: Path
) -> None:
    network, found = Function(function, nn.Linear(64, 4), nn.Linear(4, 4)).eval(), context(tmp_path)
    method = PTQ(activation_mode=mode) if mode else None
    model = method.apply(network, found) if method else float_graph(network, found)
    inputs, folder, engine = Noise(5).inputs, tmp_path / "artifact", OnnxRuntime(batch_size=5)
    folder.mkdir()
    engine.lower(model, folder, found.store)
    assert_close(engine.load(folder)(inputs), IntegerInterpreter(model.graph)(inputs))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's exporter
def test_what_a_user_has_the_exporter_write_for_an_op_does_not_reach_qsweep(tmp_path: Path) -> None:
    from onnxscript import opset20

    def wrong(x: Any) -> Any:
        return opset20.Neg(x)

    table: dict[Any, Any] = {torch.ops.aten.relu.default: wrong}
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    inputs, found = Noise(COUNT).inputs, context(tmp_path)
    kinds = []
    for name in ("before", "after"):
        engine, folder = OnnxRuntime(batch_size=COUNT), tmp_path / name
        folder.mkdir()
        engine.lower(float_graph(model, found), folder, Store(folder / "store"))
        torch.testing.assert_close(engine.load(folder)(inputs), model(inputs))
        own = torch.onnx.export(model, (inputs,), dynamo=True, verbose=False, custom_translation_table=table)
        assert own is not None
        kinds.append([node.op_type for node in own.model_proto.graph.node])
    assert all("Neg" in written and "Relu" not in written for written in kinds)


def test_what_the_compiler_cannot_take_is_refused(root: Path, tmp_path: Path) -> None:
    from torch._inductor import config

    engine = Float(batch_size=3, compile=True)
    model = float_graph(nn.Sequential(nn.Flatten(), nn.Softplus(2.5)), context(root, "softplus"))
    engine.lower(model, tmp_path, Store(tmp_path / "store"))
    said = "Inductor cannot compile the model: InvalidCxxCompiler: No working C"  # what began it, not what wrapped it
    with config.patch({"cpp.cxx": ("/no/compiler",)}), pytest.raises(Refused, match=said):
        engine.load(tmp_path)


@pytest.mark.parametrize("engine", INTEGER, ids=lambda engine: engine.__name__)
def test_sums_that_could_leave_int32_are_refused_at_lowering(engine: type[EngineConfig], tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(70_000, 2)
            nn.init.ones_(self.linear.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    found = context(tmp_path, task=Noise(inputs=torch.randn(4, 70_000)))
    model = Wide().eval()
    with pytest.raises(Refused, match=r"`linear\.weight`: sums must stay below 2\^31"):
        engine().lower(PTQ().apply(model, found), tmp_path / "artifact", found.store)
    (tmp_path / "artifact").mkdir()
    engine().lower(PTQ(weight_bits=4).apply(model, found), tmp_path / "artifact", found.store)


@pytest.mark.parametrize(
    ("engine", "quantize", "alternative"),
    [
        (OnnxRuntime(), {"method": "cast"}, "`float`"),
        (Float(), {"method": "ptq"}, "`onnxruntime`"),
        (Float(), {"method": "qat"}, "`inductor`"),
        (Reference(), None, "`quantize`"),
        (Reference(), {"method": "cast"}, "`quantize`"),
        (Inductor(), None, "`float`"),
        (Inductor(), {"method": "cast"}, "`float`"),
    ],
)
def test_a_refusal_names_the_alternative(engine: EngineConfig, quantize: Any, alternative: str) -> None:
    reason = engine.refuses(Compression.model_validate({"quantize": quantize}))
    assert reason is not None
    assert alternative in reason


@pytest.mark.parametrize("engine", INTEGER, ids=lambda engine: engine.__name__)
def test_an_integer_engine_takes_integers(engine: type[EngineConfig]) -> None:
    assert engine().refuses(Compression.model_validate({"quantize": {"method": "ptq"}})) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_what_artifacts_of_an_engine_need_is_an_extra(engine: type[EngineConfig]) -> None:
    content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = {
        re.split("[>=;]", one)[0] for extra in content["project"]["optional-dependencies"].values() for one in extra
    }
    assert set(engine.packages) <= extras


def test_inductor_without_a_compiler_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Inductor().available() is None
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in str(Inductor().available())


def test_an_engine_that_is_not_installed_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from qsweep.errors import SpecError
    from qsweep.spec import Spec
    from qsweep.study import check

    data = {"method": "digits"}
    task = {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": data}
    spec = Spec.model_validate({"name": "x", "task": task, "compress": {}, "target": {"engine": "onnxruntime"}})
    check(spec)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"`target.engine`: `onnxruntime` does not work .*pip install onnxruntime"):
        check(spec)


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "packed.json"])
def test_a_damaged_artifact_is_told(name: str, root: Path, tmp_path: Path) -> None:
    lowered(OnnxRuntime(), case("mlp", root), tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        OnnxRuntime().load(tmp_path)


def test_an_exported_artifact_is_standard_onnx_that_gives_the_same(root: Path, tmp_path: Path) -> None:
    import onnxruntime

    found, engine = case("digits_cnn", root, weight_bits=4), OnnxRuntime()
    folder = lowered(engine, found, tmp_path / "artifact")
    (tmp_path / "out").mkdir()
    engine.export(folder, tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: found.inputs.numpy()})
    assert torch.equal(torch.from_numpy(outputs), engine.load(folder)(found.inputs))


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_the_float_engine_gives_the_models_outputs(dtype: str | None, root: Path, tmp_path: Path) -> None:
    found = context(root, "digits_cnn")
    model = float_graph(network("digits_cnn"), found)
    engine = Float(batch_size=COUNT, compile=False)
    inputs = Noise(COUNT).inputs
    engine.lower(model if dtype is None else model.cast_to(dtype), tmp_path, found.store)
    run = engine.load(tmp_path)
    outputs, wanted = run(inputs), network("digits_cnn")(inputs)
    assert outputs.dtype is torch.float32
    torch.testing.assert_close(outputs, wanted, atol=1e-4 if dtype is None else 0.2 * wanted.std().item(), rtol=0)
    assert engine.integer_macs(tmp_path, run, inputs) == 0


def test_inductor_agrees_end_to_end_in_integers_without_a_word(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = case("digits", tmp_path)
    engine = Inductor(batch_size=len(found.inputs))
    run = engine.load(lowered(engine, found, tmp_path))
    outputs = run(found.inputs)
    agree = (outputs.argmax(1) == reference(found)[0].argmax(1)).float().mean()
    assert agree >= 0.998
    assert integer_share(engine, tmp_path, found) >= 0.95
    with pytest.raises(Refused, match=r"takes inputs \[360, 1, 8, 8\] \(got \[1, 1, 8, 8\]\)"):
        run(found.inputs[:1])
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


@pytest.mark.parametrize("name", ["pools", "depthwise", "sequence"])
def test_inductor_runs_every_kind_of_layer_on_integers(name: str, root: Path, tmp_path: Path) -> None:
    found = case(name, root, activation_bits=6)
    engine = Inductor(batch_size=COUNT)
    run = engine.load(lowered(engine, found, tmp_path))
    torch.testing.assert_close(run(found.inputs), reference(found)[0], atol=0.05, rtol=0)
    assert integer_share(engine, tmp_path, found) == 1.0


@pytest.mark.parametrize("engine", [Reference, Inductor, OnnxRuntime], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize(
    ("kind", "layers", "others"),
    [(Transposed, (64 * 9 * 8, 225 * 8 * 4), 64 * 8 * 8), (Mixed, (8 * 8 * 8, 8 * 8 * 8, 8 * 4), 2 * 8 * 8 * 8)],
)
def test_whatever_op_multiplies_counts_against_the_share_of_integers(
    kind: type[nn.Module], layers: tuple[int, ...], others: int, engine: type[EngineConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(20, 1, 8, 8)
    found = context(tmp_path, "model", task=Noise(inputs=inputs))
    made = Case(PTQ(calibration_samples=20).apply(kind().eval(), found), found, inputs[:2])
    assert made.model.macs == sum(layers) + others
    folder = lowered(engine(batch_size=2), made, tmp_path / "artifact")
    assert integer_share(engine(batch_size=2), folder, made) == sum(layers) / made.model.macs


@pytest.mark.parametrize("kind", [ConvNeXt, Windowed, Tokens])
@pytest.mark.parametrize("engine", [Inductor, OnnxRuntime], ids=lambda engine: engine.__name__)
def test_tokens_and_windows_run_on_every_engine(
    kind: type[nn.Module], engine: type[EngineConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(20, 1, 8, 8)
    found = context(tmp_path, "model", task=Noise(inputs=inputs))
    made = Case(PTQ(calibration_samples=20).apply(kind().eval(), found), found, inputs)
    run = engine(batch_size=20).load(lowered(engine(batch_size=20), made, tmp_path / "artifact"))
    torch.testing.assert_close(run(inputs), reference(made)[0], atol=0.03, rtol=0)


def inductor_call(graph: torch.fx.GraphModule, values: list[Tensor]) -> Tensor:
    """One layer on given integers, compiled."""
    from qsweep.engines._torch import compiled
    from qsweep.engines._torch_graph import unsigned

    given = [node for node in graph.graph.nodes if node.op == "placeholder"]
    grids = [grid_of(next(iter(node.users))) for node in given]
    (end,) = nodes_of(graph, {QUANTIZE})
    low = grid_of(end).low
    shifted = [(value.int() - grid.low).to(torch.uint8) for value, grid in zip(values, grids, strict=True)]
    with torch.no_grad():
        return compiled(unsigned(graph), *shifted)(*shifted).int() + low  # type: ignore[no-any-return]


@pytest.mark.parametrize("fields", [{}, {"activation_bits": 4, "sum_grid": "own"}], ids=["a8", "a4 own sums"])
def test_inductor_is_within_one_level_layer_by_layer_on_identical_inputs(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    found = case("digits", tmp_path, **fields)
    assert layer_by_layer(found, reference(found)[1], inductor_call) <= 1e-4


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        (Inductor(), {}),
        (Float(), {"weight_bits": 4, "group_size": 3, "activation_bits": None}),
        (Inductor(), {"activation_mode": "token"}),
    ],
    ids=["w8a8", "w4g3", "token"],
)
def test_what_is_exported_is_loaded_and_run_by_pytorch_alone(
    engine: EngineConfig, fields: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    found = case("digits_cnn", root, **fields)
    engine.export(lowered(engine, found, tmp_path / "artifact"), tmp_path)
    torch.save(found.inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch, torch.ao.quantization.fx._decomposed
model = torch.export.load("model.pt2").module()
torch.save(model(torch.load("inputs.pt")).detach(), "outputs.pt")
assert not any(name.startswith("qsweep") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    wanted = simulation(found.model)(found.inputs)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), wanted, atol=2e-2, rtol=0)


def test_what_no_program_can_hold_is_refused_on_export(root: Path, tmp_path: Path) -> None:
    found, engine = case("digits_cnn", root, activation_mode="dynamic"), Float(simulate=True)
    with pytest.raises(ExportFailure, match=r"`torch\.export` cannot write the artifact"):
        engine.export(lowered(engine, found, tmp_path / "artifact"), tmp_path)
