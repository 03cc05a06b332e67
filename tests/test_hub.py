from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, Function, Noise, context, network
from torch import Tensor, nn

from qsweep.devices import on_device
from qsweep.errors import BundleError, ExportFailure, NotFinite
from qsweep.hub.export import export
from qsweep.hub.form import QuantizedModel
from qsweep.hub.kinds import QUANTIZE, aten
from qsweep.hub.nodes import nodes_of, source
from qsweep.hub.norm import fold_batch_norm
from qsweep.hub.packing import pack, unpack
from qsweep.hub.save import GRAPH, WEIGHTS, load, save
from qsweep.hub.simulate import simulation
from qsweep.measure.sizes import work
from qsweep.models import build
from qsweep.quantize.ptq import PTQ

INPUTS = Noise(20).inputs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def quantized(root: Path) -> QuantizedModel:
    return PTQ(weight_bits=3, calibration_samples=100).apply(network("digits_cnn"), context(root, "digits_cnn"))


def folded(model: nn.Module, inputs: Tensor) -> QuantizedModel:
    live = export(model, inputs[:2])
    return QuantizedModel(fold_batch_norm(live.graph), live.example)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_graph_equals_the_eager_model_at_any_batch_size(name: str) -> None:
    model = network(name)
    found = folded(model, INPUTS)
    assert not nodes_of(found.graph, {aten.batch_norm.default, aten.dropout.default})
    with torch.no_grad():
        for count in (1, 20):
            torch.testing.assert_close(found.graph(INPUTS[:count]), model(INPUTS[:count]), atol=1e-4, rtol=1e-4)


def test_a_resnet20_has_40_551_040_multiply_accumulates() -> None:
    model = export(build("resnet20", 10, 3).eval(), torch.rand(2, 3, 32, 32))
    layers = model.layers()
    assert sum(layer.macs for layer in layers) == 40_551_040
    assert {(layer.weight_bits, layer.activation_bits) for layer in layers} == {(32, 32)}
    assert [layer.name for layer in layers][::7] == ["conv1.weight", "layer2.0.conv1.weight", "layer3.0.conv2.weight"]


def test_layers_tell_their_bits_and_the_work_of_one_sample(root: Path) -> None:
    config = PTQ(weight_bits=2, activation_bits=5, calibration_samples=50)
    layers = config.apply(network("sequence"), context(root, "sequence")).layers()
    assert {(layer.weight_bits, layer.activation_bits) for layer in layers} == {(2, 5)}
    assert [layer.macs for layer in layers] == [8 * 6 * 3 * 8, 6 * 8 * 12, 6 * 12 * 8, 60]


def test_a_model_whose_flow_depends_on_data_is_not_traced() -> None:
    model = Function(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(ExportFailure, match=r"`torch\.export` cannot trace the model"):
        export(model, INPUTS[:2])


def test_a_model_with_two_outputs_is_not_traced() -> None:
    with pytest.raises(ExportFailure, match=r"must give one tensor \(got 2 outputs\)"):
        export(Function(lambda x: (x + 1, x - 1)), INPUTS[:2])


def test_a_model_with_two_inputs_is_not_traced() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(ExportFailure, match="cannot trace"):
        export(Two(), INPUTS[:2])


def test_an_adaptive_pool_of_equal_windows_is_a_plain_pool() -> None:
    model = Function(lambda x: F.adaptive_avg_pool2d(x, (4, 2)))
    found = export(model, INPUTS[:2])
    assert len(nodes_of(found.graph, {aten.avg_pool2d.default})) == 1
    torch.testing.assert_close(found.graph(INPUTS), model(INPUTS))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("size", "dilation", "padding", "pads"),
    [(3, 1, "same", 0), ((2, 4), (1, 3), "same", 1), ((3, 1), 2, "same", 0), (3, 1, "valid", 0), (4, 1, "same", 1)],
)
def test_convolutions_to_the_same_size_have_paddings_in_numbers(
    size: Any, dilation: Any, padding: str, pads: int, groups: int
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, size, padding=padding, dilation=dilation, groups=groups))
    found = export(model.eval(), INPUTS[:2])
    assert len(nodes_of(found.graph, {aten.conv2d.default})) == 2
    assert len(nodes_of(found.graph, {aten.pad.default})) == pads
    assert torch.equal(found.graph(INPUTS), model(INPUTS))


def test_convolutions_of_sequences_to_the_same_size_have_paddings_in_numbers() -> None:
    model = nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 4, 4, padding="same"))
    found = export(model.eval(), INPUTS[:2])
    assert len(nodes_of(found.graph, {aten.conv1d.default})) == 1
    assert torch.equal(found.graph(INPUTS), model(INPUTS))


def test_layers_that_read_the_same_tokens_share_what_they_read() -> None:
    def both(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
        x = x[:, 0]
        return torch.cat([one(x), other(x)], 2)

    model = Function(both, nn.Linear(8, 4), nn.Linear(8, 4))
    found = export(model.eval(), INPUTS[:2])
    first, second = nodes_of(found.graph, {aten.linear.default})
    assert first.args[0] is second.args[0]
    torch.testing.assert_close(found.graph(INPUTS), model(INPUTS))


@pytest.mark.parametrize("mask", [None, torch.ones(8, 8).tril().bool(), torch.ones(1, 8, 8).tril().bool()])
def test_attention_without_heads_is_that_of_one_head(mask: Tensor | None) -> None:
    def mixed(x: Tensor) -> Tensor:
        x = x[:, 0]
        return F.scaled_dot_product_attention(x, x.sigmoid(), x.tanh(), mask)

    model = Function(mixed)
    found = export(model.eval(), INPUTS[:2])
    (attention,) = nodes_of(found.graph, {aten.scaled_dot_product_attention.default})
    one_head = mask is None or mask.dim() == 2  # a mask for each sample has no place for heads
    assert (source(attention).target is aten.unsqueeze.default) == one_head
    torch.testing.assert_close(found.graph(INPUTS), model(INPUTS))


class Makes(nn.Module):
    """Makes what it needs: positions, a token, a mask, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer, self.offset = nn.Embedding(8, 8), nn.Linear(8, 8), torch.full((8,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0] + self.places(torch.arange(8, device=x.device)) + self.offset + torch.tensor([2.0])
        x = torch.cat([torch.zeros(x.shape[0], 1, 8), x], 1)
        mixed: Tensor = torch.ones(9, 9, device=x.device).tril() @ self.layer(x)
        return mixed * torch.linspace(0, 1, 8)


def test_a_graph_computes_where_it_is_brought_with_all_that_it_makes() -> None:
    model = Makes().eval()
    graph = export(model, INPUTS[:2]).graph
    assert {name for name, _ in graph.named_buffers()} == {"offset", "lifted_tensor_0"}
    torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    elsewhere = torch.device("meta")  # as strict as a GPU about what lies where, wherever tests run
    assert on_device(graph, elsewhere)(INPUTS.to(elsewhere)).device == elsewhere
    assert {node.kwargs["device"] for node in graph.graph.nodes if "device" in node.kwargs} == {elsewhere}


def batch_norm(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    if norm.affine:
        norm.weight.data = torch.linspace(-1, 1, len(norm.weight))  # negative, zero and positive
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)), (7, 2, 6, 6)),
        ((nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)), (7, 2, 6, 6)),
        ((nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5)), (7, 2, 6)),
        ((nn.Linear(4, 5), nn.BatchNorm1d(5)), (7, 4)),
        ((nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5, eps=0.1), nn.BatchNorm2d(5)), (7, 2, 6, 6)),
        ((nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5)), (7, 4)),
    ],
    ids=["conv2d with bias", "conv2d", "conv1d", "linear", "three norms", "linear with two"],
)
def test_batch_norm_with_negative_and_zero_gamma_folds(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layers[0], *map(batch_norm, layers[1:])).eval()
    inputs = torch.randn(shape)
    found = folded(model, inputs)
    assert not nodes_of(found.graph, {aten.batch_norm.default})
    with torch.no_grad():
        torch.testing.assert_close(found.graph(inputs), model(inputs), atol=1e-4, rtol=0)


def test_batch_norm_over_time_is_not_mistaken_for_one_over_a_linears_features() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), batch_norm(nn.BatchNorm1d(5))).eval()
    inputs = torch.randn(3, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(folded(model, inputs).graph(inputs), model(inputs), atol=1e-4, rtol=0)


def shared() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight, second.bias = first.weight, first.bias
    norms = [batch_norm(nn.BatchNorm2d(4)) for _ in range(2)]
    norms[1].weight.data.mul_(-2)  # type: ignore[operator, union-attr]
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    return model, torch.randn(20, 4, 5, 5)


def test_layers_that_share_weights_are_folded_each_with_its_own_norm() -> None:
    model, inputs = shared()
    with torch.no_grad():
        torch.testing.assert_close(folded(model, inputs).graph(inputs), model(inputs), atol=1e-4, rtol=0)


def test_layers_that_share_weights_and_biases_are_quantized_each_on_its_own_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(16, 3)).eval()
    inputs = torch.randn(200, 16) * 3
    found = PTQ(calibration_samples=200).apply(model, context(tmp_path, task=Noise(inputs=inputs)))
    with torch.no_grad():
        wanted = model(inputs)
        error = (simulation(found)(inputs) - wanted).abs().max() / wanted.abs().max()
    assert error < 0.05
    assert [layer.name for layer in found.layers()] == ["2.weight", "2.weight", "3.weight"]


@pytest.mark.parametrize("name", ["weight", "w"])
def test_a_weight_that_is_the_models_own_parameter_can_be_folded(name: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(5, 4)))
            self.norm = batch_norm(nn.BatchNorm1d(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(F.linear(x, getattr(self, name)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, inputs = Own().eval(), torch.randn(6, 4)
    with torch.no_grad():
        torch.testing.assert_close(folded(model, inputs).graph(inputs), model(inputs), atol=1e-4, rtol=0)


def test_a_concatenation_is_on_one_grid_with_its_parts(root: Path) -> None:
    found = PTQ(calibration_samples=50).apply(network("pools"), context(root, "pools"))
    (cat,) = nodes_of(found.graph, {aten.cat.default})
    (result,) = cat.users
    grids = {part.args[1:5] for part in cat.all_input_nodes} | {result.args[1:5]}
    assert len(grids) == 1
    assert result.target is QUANTIZE


def test_a_bias_that_is_not_finite_is_told_by_name(tmp_path: Path) -> None:
    model = network("mlp")
    model[4].bias.data[1] = torch.inf  # type: ignore[index, union-attr, operator]
    with pytest.raises(NotFinite, match=r"`4\.bias`: must hold finite numbers \(got 1"):
        PTQ(calibration_samples=10).apply(model, context(tmp_path))


@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(st.just(bits), levels(bits))))
def test_packing_is_exact_and_has_no_gaps(case: tuple[int, list[int]]) -> None:
    bits, values = case
    integers = torch.tensor(values, dtype=torch.int8).reshape(-1, 1)
    packed = pack(integers, bits)
    assert packed.numel() == math.ceil(len(values) * bits / 8)
    assert torch.equal(unpack(packed, bits, tuple(integers.shape)), integers)


def levels(bits: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), max_size=50)


def test_a_value_that_does_not_fit_its_bits_is_not_packed() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[-4, 3\] for 3 bits"):
        pack(torch.tensor([4], dtype=torch.int8), 3)


def test_a_saved_model_gives_the_same_bits_when_it_is_loaded(quantized: QuantizedModel, tmp_path: Path) -> None:
    save(quantized, tmp_path)
    assert torch.equal(load(tmp_path).graph(INPUTS), quantized.graph(INPUTS))
    assert [layer.weight_bits for layer in load(tmp_path).layers()] == [3] * 5


def test_a_model_cast_to_bf16_is_stored_in_half_the_bytes_and_gives_float32(tmp_path: Path) -> None:
    found = folded(network("digits_cnn"), INPUTS)
    sizes = []
    for number, model in enumerate((found, found.cast_to("bf16"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(model, folder)
        sizes.append((folder / WEIGHTS).stat().st_size)
        assert simulation(load(folder))(INPUTS).dtype is torch.float32
    assert sizes[1] < 0.52 * sizes[0]


def test_saved_files_hold_json_and_tensors_only(quantized: QuantizedModel, tmp_path: Path) -> None:
    save(quantized, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {GRAPH, WEIGHTS}
    json.loads((tmp_path / GRAPH).read_text())
    content = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["stem.conv.weight"]["dtype"] == "U8"


def tampered(model: QuantizedModel, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    save(model, folder)
    content = json.loads((folder / GRAPH).read_text())
    change(content)
    (folder / GRAPH).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("target", ["os.system", "aten.__class__", "prims.add.default", "aten.no_such_op.default"])
def test_a_graph_calls_ops_of_two_namespaces_only(target: str, quantized: QuantizedModel, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        calls = [node for node in content["nodes"] if node[0] == "call_function"]
        calls[0][1] = target

    with pytest.raises(BundleError, match="cannot be read"):
        load(tampered(quantized, tmp_path, change))


def test_a_graph_of_another_format_is_refused(quantized: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"format must be 1 \(got 7\)"):
        load(tampered(quantized, tmp_path, lambda content: content.update(format=7)))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("nodes"),
        lambda content: content["nodes"][-1].clear(),
        lambda content: content["nodes"].insert(0, ["call_module", "x", []]),
        lambda content: content["packed"].update({"no.such.tensor": [3, [4]]}),
        lambda content: content["packed"]["stem.conv.weight"].__setitem__(1, [9, 9]),
        lambda content: content.update(dtype="no_such_dtype"),
        lambda content: content.update(example="x"),
    ],
    ids=["no nodes", "empty node", "node kind", "unknown tensor", "wrong shape", "dtype", "example"],
)
def test_a_damaged_graph_is_a_bundle_error(
    change: Callable[[dict[str, Any]], None], quantized: QuantizedModel, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        load(tampered(quantized, tmp_path, change))


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
@pytest.mark.parametrize("damage", ["gone", "cut", "noise"])
def test_a_damaged_file_is_a_bundle_error(name: str, damage: str, quantized: QuantizedModel, tmp_path: Path) -> None:
    save(quantized, tmp_path)
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" * len(content))
    with pytest.raises(BundleError):
        load(tmp_path)


def test_the_simulation_gives_what_the_graph_gives(quantized: QuantizedModel) -> None:
    graph = copy.deepcopy(quantized.graph)
    assert torch.equal(simulation(quantized)(INPUTS), graph(INPUTS))


def test_a_weight_that_is_computed_is_a_layer_like_any_other() -> None:
    found = folded(network("computed"), INPUTS)
    assert [layer.name.split(".")[0] for layer in found.layers()] == ["conv", "linear"]
    assert not nodes_of(found.graph, {aten.batch_norm.default})


def test_an_op_that_gives_several_tensors_is_refused_by_name() -> None:
    with pytest.raises(ExportFailure, match=r"`aten\.sort\.default`: gives several tensors"):
        export(Function(lambda x: x.flatten(1).sort()[0]), INPUTS[:2])


def test_a_constant_where_that_of_a_weight_is_to_be_stored_is_named(tmp_path: Path) -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.weight_scale = nn.Parameter(torch.rand(10, 64)), nn.Parameter(torch.rand(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(1), self.weight) + self.weight_scale

    with pytest.raises(ExportFailure, match="`weight_scale`: must have another name"):
        PTQ(calibration_samples=20).apply(Taken().eval(), context(tmp_path))


def test_parameters_are_counted_whatever_their_names(tmp_path: Path) -> None:
    model = network("computed")
    made = PTQ(calibration_samples=20).apply(model, context(tmp_path))
    computed = 8 * 9 + 8  # weight and bias that weight norm and batch norm become
    assert work(made)["params"] == computed + 80 + 8 + 50 + 3 + 10  # the scale of the logits is in their weights
