"""Ways of writing models that tracing makes into other ops: the graph gives what the model gives, at any batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Function
from torch import Tensor, nn

from qsweep.errors import ExportFailure
from qsweep.hub.export import export
from qsweep.hub.kinds import POOLS, aten
from qsweep.hub.nodes import arguments, nodes_of, source
from qsweep.hub.ops import QUICK_GELU

INPUTS = torch.randn(5, 6, 8, 14, generator=torch.Generator().manual_seed(0))


def exported(function: Callable[..., Any], *layers: nn.Module) -> torch.fx.GraphModule:
    """The graph of `function`, which has been seen to give what it gives."""
    model = Function(function, *layers).eval()
    with torch.no_grad():
        graph = export(model, INPUTS[:2]).graph
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    return graph


def written_and_read_before(x: Tensor) -> Tensor:
    y = x * 2
    before, top = y + 0.5, y[:, :, 0]
    F.relu_(y)
    return before + y + top.unsqueeze(2)


def written_part(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].add_(1)
    return y


def written_twice(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, 1:4, ::2]
    rest = y[:, 3:].transpose(2, 3)
    part[..., 0].mul_(3).sub_(1)
    part[:, -1] = 7.0
    return y + rest.sum() + part.sum()


def shifted(x: Tensor) -> Tensor:
    """As the temporal shift module does."""
    out = torch.zeros_like(x)
    out[:, :2, :-1] = x[:, :2, 1:]
    out[:, 2:4, 1:] = x[:, 2:4, :-1]
    out[:, 4:] = x[:, 4:]
    return out


def masked(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[0], 8, 14, dtype=torch.bool)
    mask[:, 2:4, 3] = False
    mask[0] &= True
    return x.masked_fill(~mask.unsqueeze(1), 0.0)


def indexed(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([0, 2])] = 1.0
    y[y > 1] = 0.5
    return y


def half_written(x: Tensor) -> Tensor:
    left, right = (x * 2).chunk(2, 1)
    return torch.cat([F.relu_(left), right, left], 1)


def sinusoids(x: Tensor) -> Tensor:
    places = torch.zeros(8, 14)
    angles = torch.arange(8).unsqueeze(1) * torch.exp(torch.arange(0, 14, 2) * -0.3)
    places[:, 0::2], places[:, 1::2] = torch.sin(angles), torch.cos(angles)
    return x + places


def dropped(x: Tensor) -> Tensor:
    y = x * 2
    F.dropout(y, 0.5, False).add_(1)
    return y


def written_behind_reshapes(x: Tensor) -> Tensor:
    y = x * 2
    tokens, flat, turned = y.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6), y.flatten(1), y.transpose(2, 3).flatten(2)
    y -= 1
    return y + tokens.amax((1, 2)).reshape(-1, 1, 1, 1) + (flat + turned.flatten(1)).reshape(y.shape)


def written_behind_copies(x: Tensor) -> Tensor:
    y = x * 2
    turned, same, wide = y.permute(0, 2, 3, 1).contiguous(), y.contiguous(), y.double()
    F.relu_(y)
    return y + turned.permute(0, 3, 1, 2) + same * wide.float()


def written_behind_a_type_that_it_has(x: Tensor) -> Tensor:
    y = x * 2
    same = y.to(torch.float32)
    y.mul_(3)
    return y + same


def written_under_a_part(x: Tensor) -> Tensor:
    y = x * 2
    left, right = y.chunk(2, 1)
    left.mul_(2)
    return y + torch.cat([right, right], 1)


def rebound(x: Tensor) -> Tensor:
    y = x * 2
    z, y = y, y + 1
    z.relu_()
    return y + z


def framed(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 6, 10, 16)
    y[..., 1:-1, 1:-1] = x
    y[:, :, 0], y[:, -1] = y[:, :, 2], y[:, 0]
    y[:, 1, 2:, ::2] = 0
    return y


WRITES = [
    written_and_read_before, written_part, written_twice, shifted, masked, indexed, half_written, sinusoids, dropped,
    written_behind_reshapes, written_behind_copies, written_behind_a_type_that_it_has, written_under_a_part, rebound,
    framed,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_who_reads_later_reads_what_was_written_and_who_read_before_does_not(function: Callable[..., Tensor]) -> None:
    graph = exported(function)
    assert not any(node.target._schema.is_mutable for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: x.max(1)[0], aten.amax.default),
        (lambda x: x.min(dim=-1, keepdim=True).values, aten.amin.default),
        (lambda x: x.max(1)[1], aten.argmax.default),
        (lambda x: torch.var_mean(x, (2, 3), correction=0)[0], aten.var.correction),
        (lambda x: torch.std_mean(x, 1, unbiased=False)[0], aten.std.dim),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], aten.max_pool2d.default),
        (lambda x: F.max_pool1d(x[:, 0], 2, return_indices=True)[0], aten.max_pool1d.default),
    ],
)
def test_one_of_several_tensors_is_what_an_op_gives_that_gives_it_alone(function: Any, op: Any) -> None:
    assert len(nodes_of(exported(function), {op})) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.adaptive_max_pool2d(x, (None, 1)),
        lambda x: F.adaptive_max_pool2d(x[:, 0], (7, 7)),
        lambda x: F.adaptive_max_pool1d(x[:, 0], 7),
        lambda x: x.amax((2, 3)),
        lambda x: x.amax((-1, -2), keepdim=True),
        lambda x: x.flatten(2).max(-1)[0],
        lambda x: x.flatten(2).max(2, keepdim=True)[0],
    ],
)
def test_largest_pixels_are_max_pools_which_have_integer_kernels(function: Callable[[Tensor], Tensor]) -> None:
    graph = exported(function)
    assert len(nodes_of(graph, {aten.max_pool2d.default})) == 1
    assert not nodes_of(graph, {aten.amax.default, aten.cat.default})


@pytest.mark.parametrize("counts", [(3, 14), (3, 5)])
def test_largest_pixels_of_windows_that_differ_in_size(counts: tuple[int, int]) -> None:
    exported(lambda x: F.adaptive_max_pool2d(x, counts))


@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_one_pixel_has_several_windows_of_a_pool(pool: Callable[..., Tensor]) -> None:
    exported(lambda x: pool(x[..., :1], (4, 3)))


@pytest.mark.parametrize(
    ("function", "pools"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, (2, 7)), 1),
        (lambda x: F.adaptive_avg_pool2d(x[..., :7], (4, 3)), 1),  # windows of 3 at strides of 2
        (lambda x: F.adaptive_avg_pool1d(x[:, 0], 7), 1),
        (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), 0),
        (lambda x: F.adaptive_avg_pool2d(x[..., :1, :1], 7), 0),  # strides of 0, as a VGG has them on small images
    ],
)
def test_means_of_windows_of_one_size_are_plain_pools(function: Callable[[Tensor], Tensor], pools: int) -> None:
    assert len(nodes_of(exported(function), {aten.avg_pool2d.default})) == pools


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False), True),
        (lambda x: F.avg_pool2d(x, (2, 4), (2, 2), (0, 1), ceil_mode=True, count_include_pad=False), True),
        (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), True),
        (lambda x: F.max_pool2d(x[..., :13], 3, 2, 1, ceil_mode=True), False),
        (lambda x: F.max_pool2d(x, 2, (1, 3), dilation=(1, 2), ceil_mode=True), False),
        (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True, count_include_pad=False), False),
    ],
)
def test_pools_that_end_at_the_border_need_no_ceil_mode(function: Callable[[Tensor], Tensor], ends: bool) -> None:
    (node,) = nodes_of(exported(function), {aten.avg_pool2d.default, aten.max_pool2d.default})
    assert arguments(node)["ceil_mode"] is not ends


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: F.max_pool2d(F.pad(F.relu(x), (0, 1, 1, 1), value=-math.inf), 3, 2), 0),
        (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3, 2), 0),
        (lambda x: F.max_pool2d(F.pad(x, (0, 1, 1, 1), value=-math.inf), 3, 2), 1),
        (lambda x: F.max_pool2d(F.pad(x, (2, 2, 1, 1), value=-math.inf), 3, 2), 1),
        (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-0.5), 3, 2), 1),
    ],
)
def test_max_pools_read_no_infinities_where_they_need_none(function: Callable[[Tensor], Tensor], left: int) -> None:
    pads = nodes_of(exported(function), {aten.pad.default})
    assert len([node for node in pads if arguments(node)["value"]]) == left


@pytest.mark.parametrize("shape", [(5, 3, 2, 4, 7), (5, 2, 3, 2, 4, 7)])
def test_attention_of_windows_is_that_of_one_batch(shape: tuple[int, ...]) -> None:
    def attended(x: Tensor) -> Tensor:
        q = x.flatten(1)[:, : math.prod(shape[1:])].reshape(-1, *shape[1:])
        return F.scaled_dot_product_attention(q, q * 2, q + 1)

    (node,) = nodes_of(exported(attended), {aten.scaled_dot_product_attention.default})
    assert all(given.target is aten.flatten.using_ints for given in node.all_input_nodes)


def test_attention_that_nobody_reads_is_left_out_with_its_layers() -> None:
    def attended(x: Tensor, layer: nn.Module) -> Tensor:
        F.scaled_dot_product_attention(layer(x), x, x)
        return x.relu()

    graph = exported(attended, nn.Linear(14, 14)).graph
    assert [node.target for node in graph.nodes if node.op != "placeholder"] == [aten.relu.default, "output"]


def test_an_average_pool_of_the_whole_image_is_the_global_one() -> None:
    graph = exported(lambda x: F.avg_pool2d(x, x.shape[2:]) + F.avg_pool2d(x, (8, 14), padding=(1, 1))[..., :1, :1])
    assert [node.target for node in nodes_of(graph, POOLS)] == [
        aten.adaptive_avg_pool2d.default,
        aten.avg_pool2d.default,
    ]


def islands(x: Tensor, conv: nn.Module) -> Tensor:
    with torch.no_grad():
        scale = torch.tensor([0.5, 2.0]).mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = conv(x.float())
            with torch.enable_grad():
                y = y / (y.norm(dim=1, keepdim=True) + scale)
    return y + x


def test_what_runs_without_gradients_or_without_autocast_is_a_part_of_the_graph() -> None:
    graph = exported(islands, nn.Conv2d(6, 6, 3, padding=1))
    assert len(nodes_of(graph, {aten.conv2d.default})) == 1


SIZES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, p: x.reshape(x.shape[0] * 6, 1, 8, 14) + p.expand(x.shape[0] * 6, -1, -1, -1),
    lambda x, p: p.expand(x.shape[0] * 6, -1, -1, -1) + x.reshape(x.shape[0] * 6, 1, 8, 14),
    lambda x, p: torch.zeros(x.shape[0] * x.shape[1] * x.shape[2], 14) + x.flatten(0, 2),
    lambda x, p: x.sum((0, 1)) / (x.shape[0] * x.shape[1]),
    lambda x, p: x.reshape(-1, 4, 14)[: x.shape[0] * 12].sum(0),
    lambda x, p: p.repeat(x.shape[0], 1, 1, 1).roll(1, 3) * x.flatten(0, 1).unflatten(0, (x.shape[0], 6)),
]


@pytest.mark.parametrize("function", SIZES)
def test_sizes_computed_from_the_batch_are_those_of_tensors(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(1, 1, 8, 14))

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.p)

    model = Sized().eval()
    with torch.no_grad():
        torch.testing.assert_close(export(model, INPUTS[:2]).graph(INPUTS), model(INPUTS))


class Projected(nn.Module):
    """Products with parameters of its own, of which one is the model's, and with numbers that are none."""

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(14, 8)), nn.Parameter(torch.randn(8, 16))
        self.bias, self.tied = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(4, 16))
        self.register_buffer("fixed", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x @ self.first).flatten(0, 2)
        x = torch.addmm(self.bias, x, self.second)
        found: Tensor = torch.matmul(x, self.tied.t()) @ self.fixed
        return found.view(-1, 48, 4)


def test_products_with_parameters_are_linears() -> None:
    model = Projected().eval()
    graph = export(model, INPUTS[:2]).graph
    with torch.no_grad():
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    linears = nodes_of(graph, {aten.linear.default})
    assert [len(node.args) for node in linears] == [2, 3, 2]
    assert [str(source(node, 1).target) for node in linears] == ["first", "second", "tied"]
    assert {name for name, _ in graph.named_parameters()} >= {str(source(node, 1).target) for node in linears}
    assert len(nodes_of(graph, {aten.matmul.default, aten.mm.default})) == 1


class Summed(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], first: bool = False) -> None:
        super().__init__()
        self.weight, self.equation, self.first = nn.Parameter(torch.rand(shape)), equation, first

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, x) if self.first else (x, self.weight)
        return torch.einsum(self.equation, *operands)


LINEAR = [("bchw,wn->bchn", (14, 5)), ("bchw, nw -> bchn", (5, 14)), ("bchw,dwe->bchde", (2, 14, 3))]
LINEAR += [("bchw,ahw->bca", (5, 8, 14)), ("bchw,hdwe->bcde", (8, 2, 14, 3)), ("bchw,wdhe->bcde", (14, 2, 8, 3))]


@pytest.mark.parametrize(("equation", "shape"), LINEAR)
@pytest.mark.parametrize("first", [False, True])
def test_einsums_with_parameters_are_linears(equation: str, shape: tuple[int, ...], first: bool) -> None:
    if first:
        given, weight = equation.partition("->")[0].replace(" ", "").split(",")
        equation = f"{weight},{given}->{equation.partition('->')[2].strip()}"
    model = Summed(equation, shape, first)
    graph = export(model, INPUTS[:2]).graph
    with torch.no_grad():
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    (linear,) = nodes_of(graph, {aten.linear.default})
    assert str(source(linear, 1).target) == "weight"
    assert not nodes_of(graph, {aten.einsum.default})


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bchw,cwn->bchn", (6, 14, 5)),  # a matrix for each channel
        ("bchw,wn->bcnh", (14, 5)),
        ("bchw,cn->bnhw", (6, 5)),
        ("bchw,w->bch", (14,)),
        ("bchw,wn->bch", (14, 5)),
        ("...w,wn->...n", (14, 5)),
        ("bchw,hw->bch", (8, 14)),
    ],
)
def test_other_einsums_stay(equation: str, shape: tuple[int, ...]) -> None:
    model = Summed(equation, shape)
    graph = export(model, INPUTS[:2]).graph
    with torch.no_grad():
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    assert not nodes_of(graph, {aten.linear.default})


def test_numbers_less_integers_are_sums() -> None:
    graph = exported(lambda x: x * (1.0 - (x > 0).long()) + (2 - x.int()) + (1 - x))
    assert [source(node).meta["val"].dtype for node in nodes_of(graph, {aten.rsub.Scalar})] == [torch.float32]


@pytest.mark.parametrize("indexing", ["ij", "xy"])
def test_coordinates_of_a_grid_are_constants(indexing: str) -> None:
    def places(x: Tensor) -> Tensor:
        axes = torch.arange(x.shape[2]) / x.shape[2], torch.arange(x.shape[3]) * 2.0, torch.tensor([1.0, 2.0])
        rows, columns, _ = torch.meshgrid(*axes, indexing=indexing)
        found = rows - 3 * columns
        return x.unsqueeze(-1) + (found if indexing == "ij" else found.transpose(0, 1))

    graph = exported(places)
    assert not nodes_of(graph, {aten.meshgrid.indexing})


class Scaled(nn.Module):
    """Branches with scales, on either side of the product, behind dimensions in another order, behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        for name in ("one", "two", "three"):
            self.register_parameter(name, nn.Parameter(torch.rand(6)))
        self.register_buffer("number", torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(x) * self.one.view(-1, 1, 1)
        x = x + self.two.view(1, 6, 1, 1) * self.bn(self.conv(x))
        y = self.narrow(F.relu(self.wide(x.permute(0, 2, 3, 1)) * 0.5))
        y = F.dropout(y, 0.5, self.training, inplace=True)
        return x + y.permute(0, 3, 1, 2).transpose(2, 3).transpose(3, 2) * self.three.reshape(6, 1, 1) * self.number


def test_numbers_that_change_nothing_are_left_out() -> None:
    def branches(x: Tensor) -> Tensor:
        out = 0
        for branch in (F.relu(x), torch.tanh(x)):
            out = branch + out
        out += 0.0
        return (out * 1 - 0) / 1.0 + (x > 0) * 1

    graph = exported(branches)
    left = nodes_of(graph, {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})
    assert [node.target for node in left] == [aten.add.Tensor, aten.mul.Tensor, aten.add.Tensor]  # that of a mask


def test_pads_of_no_width_are_left_out() -> None:
    def windows(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 2, 0, -height % 2))
        return F.pad(F.pad(x, (1, 0)), (0, 0, 0, 0), mode="reflect")

    (left,) = nodes_of(exported(windows), {aten.pad.default})
    assert left.args[1] == [1, 0]


def test_reshapes_to_the_shape_that_is_there_are_left_out() -> None:
    def function(x: Tensor, linear: nn.Module) -> Any:
        y = x.sum((2, 3)).flatten(1)
        part = y.view(-1, 6)
        y += 1
        same = linear(part.view(x.size(0), -1)).view_as(y).reshape(-1, 6)
        return x.reshape(x.shape).flatten(1) + same.reshape(-1, 3, 2).flatten(1).sum(1, keepdim=True)

    graph = exported(function, nn.Linear(6, 6))
    moves = nodes_of(graph, {aten.reshape.default, aten.flatten.using_ints})
    assert [len(moves), len(nodes_of(graph, {aten.view.default}))] == [3, 0]


class Mixed(nn.Module):
    """Branches that are summed, one of them subtracted, before they are scaled, as FastViT mixes; and a difference that
    is none of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.bn, self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.twice, self.cut = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.bn(self.one(x)) + self.two(x) - self.bn2(x)) * self.scale
        y = self.twice(x)
        return (F.avg_pool2d(x, 3, 1, 1) - x) + (y + y) * 0.5 + (self.cut(x) + self.bn3(x[:, :, :1])) * 2


def test_sums_and_differences_of_layers_take_a_factor_each() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    nn.init.uniform_(model.bn2.running_var, 0.5, 2.0)
    graph = export(model, INPUTS[:2]).graph
    with torch.no_grad():
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    assert len(nodes_of(graph, {aten.sub.Tensor})) == 1
    assert len(nodes_of(graph, {aten.mul.Tensor})) == 2


def test_factors_behind_layers_are_a_part_of_their_weights() -> None:
    torch.manual_seed(0)
    model = Scaled().eval()
    graph = export(model, INPUTS[:2]).graph
    with torch.no_grad():
        torch.testing.assert_close(graph(INPUTS), model(INPUTS))
    products = nodes_of(graph, {aten.mul.Tensor, aten.dropout.default})
    assert len(products) == 1  # of the convolution whose weights are read twice
    (norm,) = nodes_of(graph, {aten.batch_norm.default})
    linears = nodes_of(graph, {aten.linear.default})
    read = [source(norm, 1), source(norm, 2), *(source(node, 1) for node in linears)]
    assert [str(node.target) for node in read] == ["bn.weight", "bn.bias", "wide.weight", "narrow.weight"]
    assert {"bn.weight", "narrow.weight"} <= dict(graph.named_parameters()).keys()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, layer: layer(x) * torch.linspace(1, 2, 14),  # along the width
        lambda x, layer: layer(x) * torch.linspace(1, 2, 4 * 8 * 14).view(4, 8, 14),
        lambda x, layer: layer(x[:, :, :1, :1]) * torch.ones(3, 3),
        lambda x, layer: (y := layer(x)) * 2 + y,
        lambda x, layer: F.relu(layer(x)) * 2,
        lambda x, layer: layer(x).flatten(2).transpose(1, 2) * torch.linspace(1, 2, 4),
        lambda x, layer: layer(x).unsqueeze(1) * 2,
        lambda x, layer: layer(x)[0, :, 0] * torch.ones(1, 1, 4, 1),
    ],
)
def test_other_factors_stay(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    assert len(nodes_of(exported(function, nn.Conv2d(6, 4, 1)), {aten.mul.Tensor})) == 1


@pytest.mark.parametrize(
    ("function", "op", "options"),
    [
        (lambda x: x * torch.sigmoid(x), aten.silu.default, {}),
        (lambda x: torch.sigmoid(x).mul_(x), aten.silu.default, {}),
        (lambda x: x * torch.sigmoid(1.702 * x), QUICK_GELU, {}),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), aten.gelu.default, {}),
        (
            lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
            aten.gelu.default,
            {"approximate": "tanh"},
        ),
        (lambda x: x * F.relu6(x + 3) / 6, aten.hardswish.default, {}),
        (lambda x: x * (x + 3).clamp(0, 6) * torch.tensor(1 / 6), aten.hardswish.default, {}),
        (lambda x: F.relu6(x + 3.0) / 6.0, aten.hardsigmoid.default, {}),
        (lambda x: x * torch.tanh(F.softplus(x)), aten.mish.default, {}),
        (lambda x: (y := x + x.mean()) * y.sigmoid(), aten.silu.default, {}),
    ],
)
def test_activations_written_in_steps_are_the_op_that_they_are(
    function: Callable[[Tensor], Tensor], op: Any, options: dict[str, Any]
) -> None:
    graph = exported(lambda x: function(F.relu(x) - 0.7))
    (node,) = nodes_of(graph, {op})
    assert node.kwargs == options
    assert not nodes_of(graph, {aten.mul.Tensor, aten.div.Tensor, aten.erf.default, aten.sigmoid.default})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.71 * x),
        lambda x: x * torch.sigmoid(x.flip(1)),
        lambda x: x * torch.sigmoid(x) * torch.linspace(1, 2, 14),
        lambda x: x * torch.sigmoid(x + torch.linspace(0, 1, 14)),
        lambda x: x * (1 + torch.tanh(0.7978845608 * (x + 0.0447 * x**3))),
    ],
)
def test_other_functions_stay_in_steps(function: Callable[[Tensor], Tensor]) -> None:
    graph = exported(function)
    assert nodes_of(graph, {aten.sigmoid.default, aten.tanh.default, aten.silu.default})
    assert nodes_of(graph, {aten.mul.Tensor})


def test_a_function_with_a_parameter_stays_in_steps() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.slope * x)

    assert len(nodes_of(exported(lambda x, swish: swish(x), Swish()), {aten.sigmoid.default})) == 1


def test_layers_without_a_batch_or_with_two_are_those_with_one() -> None:
    def function(x: Tensor, conv: nn.Module, same: nn.Module, up: nn.Module, linear: nn.Module) -> Any:
        pairs = x.mean((2, 3)).unsqueeze(0) + x.mean((2, 3)).unsqueeze(1)
        image = up(same(conv(x.mean(0))))
        return image[None, :, :8] + linear(pairs).mean(0).reshape(-1, 6, 1, 1)

    convs = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, (2, 3), padding="same"), nn.ConvTranspose2d(6, 6, 1)
    graph = exported(function, *convs, nn.Linear(6, 6))
    (linear,) = nodes_of(graph, {aten.linear.default})
    assert source(linear).args[1] == [-1, 6]


class OneMore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        more = x.shape[0] + 1
        return x + torch.ones(more).sum()


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return x


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x.transpose(1, 2)[:, 0] = 1.0
        return x


REFUSED: list[tuple[nn.Module, str]] = [
    (OneMore(), r"from the size of the batch \(`more = x\.shape\[0\] \+ 1`\), and no tensor before it has this size"),
    (Function(lambda x: x * x.shape[0] ** 0.5), "write sizes of tensors, their products, or -1 in a reshape"),
    (Function(lambda x: x.view(int(x.shape[0] / 1), -1)), r"write `x\.shape\[0\] // n`"),
    (Function(lambda x: torch.stack([x[i] for i in range(x.shape[0])])), "nor a loop over its samples"),
    (
        Transposed(),
        r"read elsewhere \(`x\.transpose\(1, 2\)\[:, 0\] = 1\.0`, `aten\.fill_\.Tensor`\): write into slices",
    ),
    (Chooses(), r"`if x\.mean\(\) > 0:` \(`.*/test_plain\.py`, line \d+\) depends on the values .* `torch\.where`"),
    (Function(lambda x: x / max(x.amax().item(), 1.0)), r"`torch\.clamp` or `torch\.maximum`"),
    (Function(lambda x: x.topk(2)[0]), r"`aten\.topk\.default`: gives several tensors"),
    (Function(lambda x: torch.autocast("cpu", torch.bfloat16)(torch.relu)(x)), "turns autocast on"),
]


@pytest.mark.parametrize(("model", "said"), REFUSED)
def test_what_cannot_be_traced_is_refused_with_what_to_write_instead(model: nn.Module, said: str) -> None:
    with pytest.raises(ExportFailure, match=said):
        export(model.eval(), INPUTS[:2])
