"""Chains of kernels against the reference: in Triton's interpreter, or on a GPU with QSWEEP_GPU=1."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from chain_networks import Bottlenecks, Joined, Transformer, Windows
from networks import NETWORKS, Noise, context, digits, made, network
from torch import Tensor, nn

from qsweep.cuda import pointwise
from qsweep.cuda.arithmetic import Tile
from qsweep.cuda.chain import Chain
from qsweep.cuda.layers import Product
from qsweep.cuda.numbers import check_scales
from qsweep.cuda.plan import plan
from qsweep.cuda.products import ATTENTION
from qsweep.cuda.steps import Float, Layer, Map, Move, Norm, RowLayer, Rows
from qsweep.cuda.tune import DEPTHWISE, MOST, Tiles, candidates
from qsweep.errors import Refused
from qsweep.hub.form import QuantizedModel, grid_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import DEQUANTIZE, QUANTIZE, RECTIFIERS, aten
from qsweep.hub.nodes import nodes_of, set_constant
from qsweep.hub.ops import QUICK_GELU
from qsweep.quantize.ptq import PTQ

W4A4 = {"weight_bits": 4, "activation_bits": 4}
BATCH = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


def quantized(model: nn.Module, root: Path, inputs: Tensor, key: str, **fields: Any) -> QuantizedModel:
    found = context(root, key, task=Noise(inputs=inputs))
    return PTQ.model_validate({"calibration_samples": 50} | fields).apply(model, found)


def small(name: str, root: Path, **fields: Any) -> QuantizedModel:
    """One of `NETWORKS`."""
    return quantized(network(name), root, Noise(50).inputs, name, **fields)


def own(kind: type[nn.Module], root: Path, **fields: Any) -> QuantizedModel:
    """One of the networks of this test."""
    shape = (3, 16, 16) if kind is Bottlenecks else (1, 8, 8)
    inputs = torch.randn(50, *shape, generator=torch.Generator().manual_seed(1))
    return quantized(made(kind), root, inputs, kind.__name__, **fields)


def samples(model: QuantizedModel, count: int = BATCH) -> Tensor:
    return torch.randn(count, *model.example.shape[1:], generator=torch.Generator().manual_seed(2))


def assert_equal(
    model: QuantizedModel, device: str, joined: int = 0, tiles: dict[str, Tile] | None = None, batch: int = BATCH
) -> Chain:
    """Every integer tensor and the output equal those of the reference; `joined`: sums inside which one has gone.

    So does the output where values share memory, after a call with other inputs.
    """
    inputs = samples(model, batch)
    reference = IntegerInterpreter(model.graph)
    reference.keep = True
    wanted = reference(inputs)
    apart = Chain(model, batch, device, tiles or {}, keep=True)
    found = apart(inputs.to(device)).cpu()
    integers = apart.integers()
    assert len(reference.tensors) - len(integers) == joined
    assert len(integers) >= 3
    for name, values in integers.items():
        assert torch.equal(values.cpu(), reference.tensors[name]), name
    assert torch.equal(found, wanted)
    chain = Chain(model, batch, device, tiles or {})
    chain(-inputs.to(device))
    assert torch.equal(chain(inputs.to(device)).cpu(), wanted)
    assert chain.bytes <= apart.bytes
    return chain


@pytest.mark.parametrize("fields", [{}, W4A4], ids=["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_chain_equals_the_reference_on_every_integer_tensor(
    name: str, fields: dict[str, Any], root: Path, device: str
) -> None:
    joined = {"digits_cnn": 1, "depthwise": 1, "shortcut": 1}.get(name, 0)
    assert assert_equal(small(name, root, **fields), device, joined).integer_share == 1.0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "joined"), [("pools", 0), ("shortcut", 1), ("sequence", 0), ("mlp", 0)])
def test_chains_for_other_batch_sizes_equal_the_reference(
    name: str, joined: int, batch: int, root: Path, device: str
) -> None:
    assert_equal(small(name, root), device, joined, batch=batch)


@pytest.mark.parametrize(("kind", "joined"), [(Bottlenecks, 2), (Joined, 0), (Windows, 0)])
def test_chains_of_other_shapes_equal_the_reference(
    kind: type[nn.Module], joined: int, root: Path, device: str
) -> None:
    assert assert_equal(own(kind, root), device, joined).integer_share == 1.0


def test_a_trained_network_gives_the_references_outputs(root: Path, device: str) -> None:
    model, found, _ = digits()
    converted = PTQ(calibration_samples=100).apply(model, found)
    inputs = found.task.transform(found.task.samples("validation").inputs[:4])
    chain = Chain(converted, 4, device, {})
    assert torch.equal(chain(inputs.to(device)).cpu(), IntegerInterpreter(converted.graph)(inputs))


def test_a_transformer_multiplies_on_integers_and_the_rest_is_float_and_told(root: Path, device: str) -> None:
    model = own(Transformer, root)
    chain = Chain(model, BATCH, device, {})
    inputs = samples(model)
    torch.testing.assert_close(
        chain(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs), atol=0.02, rtol=0
    )
    layers = 4 * 16 * 16 + 5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 16 * 10
    attention = 2 * 2 * 5 * 5 * 8
    assert chain.integer_share == pytest.approx(layers / (layers + attention))
    floats = {step.node.target for step in chain.plan.steps if isinstance(step, Float)}
    assert aten.scaled_dot_product_attention.default in floats
    norms = [step for step in chain.plan.steps if isinstance(step, Norm)]
    assert len(norms) == 2  # the third is read in floating point
    assert sum(step.total is not None for step in norms) == 1
    assert aten.gelu.default not in floats


@pytest.mark.parametrize("bits", [8, 5])
def test_rows_that_set_their_own_grids_are_multiplied_as_the_contract_says(bits: int, root: Path, device: str) -> None:
    model = small("mlp", root, activation_mode="token", activation_bits=bits)
    chain, inputs = Chain(model, 4, device, {}), samples(model, 4)
    inputs[1], inputs[2] = 0.0, inputs[2] * 1e6
    assert torch.equal(chain(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs))
    assert chain.integer_share == 1.0
    assert {type(step) for step in chain.plan.steps} == {Rows, RowLayer, Float}


def test_tokens_of_a_transformer_set_their_own_grids(root: Path, device: str) -> None:
    model = own(Transformer, root, activation_mode="token")
    chain = Chain(model, BATCH, device, {}, products=torch.float32)
    inputs = samples(model)
    expected = IntegerInterpreter(model.graph)(inputs)
    torch.testing.assert_close(chain(inputs.to(device)).cpu(), expected, atol=0.02, rtol=0)
    assert sum(isinstance(step, RowLayer) for step in chain.plan.steps) == 5
    layers, patches = 5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 16 * 10, 4 * 16 * 16
    assert chain.integer_share == pytest.approx(layers / (layers + patches + 2 * 2 * 5 * 5 * 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision_is_close_and_its_results_are_float32(
    dtype: torch.dtype, root: Path, device: str
) -> None:
    model = own(Transformer, root)
    inputs = samples(model).to(device)
    found = [Chain(model, BATCH, device, {}, products=each)(inputs) for each in (dtype, torch.float32)]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, atol=0.05, rtol=0)


def test_attention_reads_what_a_layer_wrote_and_nothing_around_it_is_copied(root: Path, device: str) -> None:
    model = own(Transformer, root)
    chain = Chain(model, BATCH, device, {}, products=torch.float16, keep=True)
    chain(samples(model).to(device))
    (attention,) = [node for node in chain.plan.graph.graph.nodes if node.target is ATTENTION]
    binding = chain._binding
    assert {binding.floats[given].dtype for given in attention.all_input_nodes} == {torch.float16}
    launched = [getattr(launch, "func", None) for launch in binding.launches]
    assert pointwise.copy not in launched
    assert not any("copied" in getattr(launch, "__qualname__", "") for launch in binding.launches)


def test_a_layer_that_is_not_quantized_counts_as_float(root: Path, device: str) -> None:
    model = small("mlp", root)
    wide, narrow = nodes_of(model.graph, {aten.linear.default})
    for node in (wide.args[1], narrow.args[1]):
        assert isinstance(node, torch.fx.Node)
    set_constant(model.graph, "real", torch.randn(10, 32, generator=torch.Generator().manual_seed(0)))
    with model.graph.graph.inserting_before(narrow):
        narrow.update_arg(1, model.graph.graph.get_attr("real"))
    model.graph.recompile()
    chain = Chain(model, BATCH, device, {})
    inputs = samples(model)
    torch.testing.assert_close(chain(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs))
    assert chain.integer_share == pytest.approx(64 * 32 / (64 * 32 + 32 * 10))


def with_grid(model: QuantizedModel, node: torch.fx.Node, scale: float, zero_point: int) -> None:
    """Put a grid of 8 bits on what `node` reads."""
    grid = (scale, zero_point, -128, 127, torch.int8)
    call = model.graph.graph.call_function
    with model.graph.graph.inserting_before(node):
        integers = call(QUANTIZE, (node.args[0], *grid))
        node.update_arg(0, call(DEQUANTIZE, (integers, *grid)))
    model.graph.recompile()


@pytest.mark.parametrize(
    "function",
    [
        aten.gelu.default,
        aten.silu.default,
        QUICK_GELU,
        aten.hardswish.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.relu.default,
    ],
)
def test_a_function_of_integers_is_a_table_at_the_end_of_their_layer(function: Any, root: Path, device: str) -> None:
    model = small("mlp", root)
    (rectifier,) = nodes_of(model.graph, {aten.relu.default})
    rectifier.target = function
    with_grid(model, rectifier, 0.07, -9)
    chain = assert_equal(model, device, joined=1)
    assert any(isinstance(step, Layer) and step.then is not None for step in chain.plan.steps)
    assert not any(isinstance(step, Map | Float) for step in chain.plan.steps)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("name", "bits"), [("mlp", 4), ("digits_cnn", 8), ("depthwise", 8), ("shortcut", 8)])
def test_every_kernel_of_a_layer_looks_its_results_up(
    name: str, bits: int, split: int, root: Path, device: str
) -> None:
    model = small(name, root, weight_bits=bits)
    for number, rectifier in enumerate(nodes_of(model.graph, set(RECTIFIERS))):
        rectifier.target, rectifier.args = aten.silu.default, rectifier.args[:1]
        with_grid(model, rectifier, 0.05 + 0.01 * number, 5 - number)
    tiles = {layer.name: Tile(16, 16, 32, split=split) for layer in model.layers()}
    chain, inputs = Chain(model, BATCH, device, tiles), samples(model)
    assert torch.equal(chain(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs))
    assert any(isinstance(step, Layer) and step.then is not None for step in chain.plan.steps)


class Flattened(nn.Module):
    """A flattened image that a linear reads and that is added to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(1, 16, 3, 2, 1), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1)
        return self.head((self.linear(x) + x).relu())  # type: ignore[no-any-return]


def test_a_flattened_image_keeps_its_order_where_it_is_added_to_something(root: Path, device: str) -> None:
    assert_equal(own(Flattened, root), device, joined=1)


class Gated(nn.Module):
    """Reads a layer's result as it is and through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.second(nn.functional.gelu(x) + x)  # type: ignore[no-any-return]


def test_a_table_stands_alone_where_something_else_reads_what_it_does(root: Path, device: str) -> None:
    chain = assert_equal(own(Gated, root), device)
    assert sum(isinstance(step, Map) for step in chain.plan.steps) == 1


def test_integers_that_come_to_another_grid_go_there_by_a_table(root: Path, device: str) -> None:
    model = small("pools", root)
    (pool,) = nodes_of(model.graph, {aten.max_pool2d.default})
    (after,) = pool.users
    for node in (after, *after.users):
        node.update_arg(1, 2.5 * grid_of(node).scale)
        node.update_arg(2, -17)
    model.graph.recompile()
    chain = assert_equal(model, device)
    assert [step.node for step in chain.plan.steps if isinstance(step, Map)] == [None]


def test_sums_cost_no_step_beside_a_layer_and_concatenations_none_at_all(root: Path, device: str) -> None:
    chain = Chain(own(Bottlenecks, root), BATCH, device, {})
    assert sum(isinstance(step, Layer) and step.residual is not None for step in chain.plan.steps) == 2
    assert chain.kernels == 1 + 6 + 1 + 1 + 1  # quantize, convolutions, two pools, linear
    chain = Chain(own(Joined, root), BATCH, device, {})
    assert sum(isinstance(step, Move) and step.node.target is aten.cat.default for step in chain.plan.steps) == 3
    assert chain.kernels == 1 + 6 + 1 + 1 + 1


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1 if number == 0 else 8, 8, 3, padding=1) for number in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.mean([2, 3])


def test_values_share_the_memory_of_those_that_are_read_no_more(root: Path, device: str) -> None:
    chain = assert_equal(own(Straight, root), device)
    padded = BATCH * 10 * 10 * 16
    assert chain.bytes - 3 * padded < padded  # two in turns and the last, which has no halo; the inputs are smaller
    model = own(Transformer, root)
    apart, shared = (Chain(model, BATCH, device, {}, keep=keep) for keep in (True, False))
    assert shared.bytes < apart.bytes  # of one block
    assert torch.equal(*(chain(samples(model).to(device)) for chain in (apart, shared)))


@pytest.mark.parametrize("split", [1, 2])
def test_block_shapes_do_not_change_a_bit(split: int, root: Path, device: str) -> None:
    model = small("depthwise", root)
    tiles = {layer.name: Tile(16, 16, 32, warps=1, stages=2, split=split) for layer in model.layers()}
    assert_equal(model, device, joined=1, tiles=tiles)


def test_another_batch_size_is_refused(root: Path, device: str) -> None:
    chain = Chain(small("mlp", root), BATCH, device, {})
    with pytest.raises(Refused, match=r"takes inputs \[2, 1, 8, 8\] \(got \[3, 1, 8, 8\]\)"):
        chain(torch.zeros(3, 1, 8, 8, device=device))


def test_a_nan_makes_the_outputs_nan_and_leaves_no_trace(root: Path, device: str) -> None:
    model = small("shortcut", root)
    chain = Chain(model, BATCH, device, {})
    inputs = samples(model)
    good = chain(inputs.to(device)).clone()
    spoiled = inputs.clone()
    spoiled[1, 0, 3, 3] = math.nan
    assert chain(spoiled.to(device)).isnan().all()
    assert torch.equal(chain(inputs.to(device)), good)


def test_infinities_go_to_the_ends_of_the_grid(root: Path, device: str) -> None:
    model = small("shortcut", root)
    inputs = samples(model)
    inputs[0, 0, 0, 0], inputs[1, 0, 5, 2] = math.inf, -math.inf
    assert torch.equal(
        Chain(model, BATCH, device, {})(inputs.to(device)).cpu(), IntegerInterpreter(model.graph)(inputs)
    )


@pytest.mark.parametrize("scale", [0.0, 1e-40, math.nan, math.inf, -0.1])
def test_scales_that_kernels_cannot_multiply_by_are_refused(scale: float, root: Path) -> None:
    model = small("mlp", root)
    check_scales(model.graph)
    node = nodes_of(model.graph, {QUANTIZE})[1]
    before = node.args[1]
    node.update_arg(1, scale)
    with pytest.raises(Refused, match=rf"the scale of `{node.name}`: must be finite and at least 1.18e-38"):
        check_scales(model.graph)
    node.update_arg(1, before)
    (name, _) = [name for name, _ in model.graph.named_buffers() if name.endswith("_scale")]
    set_constant(model.graph, name, torch.full_like(model.graph.get_buffer(name), scale))
    with pytest.raises(Refused, match="the scales of `"):
        check_scales(model.graph)


def test_steps_that_are_denormal_are_refused(root: Path) -> None:
    model = small("mlp", root)
    (name, _) = [name for name, _ in model.graph.named_buffers() if name.endswith("_scale")]
    set_constant(model.graph, name, torch.full_like(model.graph.get_buffer(name), 1e-37))
    with pytest.raises(Refused, match="the steps of the sums of `"):
        check_scales(model.graph)


def test_grids_wider_than_int8_are_refused(root: Path) -> None:
    model = small("mlp", root, activation_bits=16)
    with pytest.raises(Refused, match="int8 kernels need integers from -128 to 127"):
        plan(model, BATCH)


def product(rows: int, columns: int, depth: int) -> Product:
    return Product("", "", rows, columns, depth, lambda tile: None)


@pytest.mark.parametrize(
    "sizes", [(1, 10, 16), (49, 512, 4608), (100_352, 64, 576), (6272, 1024, 256), (8, 4096, 4096)]
)
def test_few_block_shapes_are_tried_and_none_is_larger_than_its_layer(sizes: tuple[int, int, int]) -> None:
    found = candidates(product(*sizes), 132)
    assert 1 <= len({replace(tile, split=1) for tile in found}) <= MOST
    assert len(set(found)) == len(found)
    for tile in found:
        assert tile.rows <= max(16, 2 * sizes[0])
        assert tile.columns <= max(16, 2 * sizes[1])
        assert tile.depth <= max(32, 2 * sizes[2])


def test_layers_of_few_rows_are_offered_narrow_blocks_for_which_no_sums_are_added_up() -> None:
    found = candidates(product(1, 4096, 4096), 132)
    assert any(tile.columns == 32 and tile.split == 1 for tile in found)
    assert all(tile.rows == 16 and tile.warps == 4 for tile in found)


def test_convolutions_by_channel_have_block_shapes_of_their_own() -> None:
    found = candidates(replace(product(50_176, 144, 144), depthwise=True, splits=False), 132)
    assert [(tile.rows, tile.columns, tile.warps) for tile in found] == [shape[:2] + shape[3:4] for shape in DEPTHWISE]
    few = candidates(replace(product(4, 16, 144), depthwise=True, splits=False), 132)
    assert {(tile.rows, tile.columns, tile.warps) for tile in few} == {(16, 16, 1)}


def test_sums_of_small_batches_are_cut_into_parts() -> None:
    assert any(tile.split > 1 for tile in candidates(product(49, 512, 4608), 132))
    assert all(tile.split == 1 for tile in candidates(product(100_352, 256, 2304), 132))


def test_measured_block_shapes_are_found_again_on_the_same_gpu_alone(tmp_path: Path) -> None:
    tiles, other = Tiles("GPU one", tmp_path), Tiles("GPU one", tmp_path)
    tile = Tile(64, 32, 128, 4, 3, split=4)
    tiles.keep({"conv a": tile})
    other.keep({"conv b": replace(tile, split=1)})  # it had read the file before the first was kept
    assert Tiles("GPU one", tmp_path).known == {"conv a": tile, "conv b": replace(tile, split=1)}
    assert Tiles("GPU two", tmp_path).known == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"rows": 1, "wrong": 2}}'])
def test_a_damaged_file_of_block_shapes_counts_as_empty(content: str, tmp_path: Path) -> None:
    tiles = Tiles("GPU", tmp_path)
    tiles.path.write_text(content)
    assert Tiles("GPU", tmp_path).known == {}
    tiles.keep({"a": Tile(16, 16, 32)})
    assert Tiles("GPU", tmp_path).known == {"a": Tile(16, 16, 32)}


def test_block_shapes_are_kept_under_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Tiles("GPU").path.parent == tmp_path / "qsweep"
