"""Ops that sum: over dimensions, norms, products and layers, in floating point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qsweep.engines._litert_file import TYPES
from qsweep.engines._litert_layers import convolution, linear, transposed, weight_of
from qsweep.engines._litert_ops import NONE, Real, Result, shape_of, step, write
from qsweep.engines._litert_values import Order, Value, Values, plain
from qsweep.engines._litert_windows import average
from qsweep.errors import Refused
from qsweep.hub.kinds import COMPUTE, DEQUANTIZE, LINEARS, TRANSPOSED, aten
from qsweep.hub.nodes import arguments, source
from qsweep.hub.ops import QUANTIZE_ROWS

_REDUCED: dict[Any, str] = {
    aten.mean.dim: "MEAN",
    aten.sum.dim_IntList: "SUM",
    aten.amax.default: "REDUCE_MAX",
    aten.amin.default: "REDUCE_MIN",
    aten.any.dim: "REDUCE_ANY",
}


@write(*_REDUCED)
def _reduced(values: Values, node: fx.Node) -> Value:
    op: Any = node.target
    named = arguments(node)
    given = values.real(source(node))
    dims = named["dim"] if isinstance(named["dim"], list | tuple) else [named["dim"]]
    return reduced(values, _REDUCED[op], given, dims or range(len(given.shape)), named["keepdim"])


def reduced(values: Values, name: str, given: Value, dims: Sequence[int], keep: bool, **grid: Any) -> Value:
    gone = {dim % len(given.shape) for dim in dims}
    shape = [1 if dim in gone else size for dim, size in enumerate(given.shape)]
    order = given.order
    if not keep:
        left = [dim for dim in range(len(shape)) if dim not in gone]
        shape, order = [shape[dim] for dim in left], tuple(left.index(dim) for dim in order if dim not in gone)
    axes = values.numbers(*sorted(given.order.index(dim) for dim in gone))
    kind = {"dtype": given.dtype} | grid
    return values.make(name, [given, axes], shape, order, kind="ReducerOptions", keepDims=keep, **kind)


@write(aten.var.correction, aten.std.correction)
def _spread(values: Values, node: fx.Node) -> Value:
    named, given = arguments(node), values.real(source(node))
    dims = named["dim"] or range(len(given.shape))
    count = math.prod(given.shape[dim] for dim in dims)
    correction = 1 if named["correction"] is None else named["correction"]
    centred = _centred(values, given, dims)
    variance = reduced(values, "MEAN", (centred * centred).value, dims, named["keepdim"])
    result = Real(values, variance) * (count / (count - correction))
    return (result.of("SQRT") if node.target is aten.std.correction else result).value


@write(aten.argmax.default, aten.argmin.default)
def _place_of_extreme(values: Values, node: fx.Node) -> Value:
    named, given = arguments(node), values.real(source(node))
    if given.dtype in (torch.int64, torch.bool):  # of which there is no kernel
        given = values.typed(given, torch.int32)
    if named["dim"] is None:
        given = values.reshaped(given, [math.prod(given.shape)])
    given = values.arranged(given, plain(len(given.shape)))
    dim = (named["dim"] or 0) % len(given.shape)
    axis = values.file.constant(torch.tensor(dim, dtype=torch.int32))
    name, kind = ("ARG_MAX", "ArgMaxOptions") if node.target is aten.argmax.default else ("ARG_MIN", "ArgMinOptions")
    shape = [size for place, size in enumerate(given.shape) if place != dim]
    options: dict[str, Any] = {"outputType": TYPES[torch.int64]}
    made = values.make(name, [given, axis], shape, dtype=torch.int64, kind=kind, **options)
    return values.reshaped(made, shape_of(node))


@write(aten.cumsum.default)
def _running(values: Values, node: fx.Node) -> Value:
    given = values.real(source(node))
    axis = given.order.index(arguments(node)["dim"] % len(given.shape))
    place = values.file.constant(torch.tensor(axis, dtype=torch.int32))
    return values.moved("CUMSUM", given, [place], given.shape, given.order, "CumsumOptions")


@write(aten.linalg_vector_norm.default)
def _length(values: Values, node: fx.Node) -> Value:
    named, given = arguments(node), Real(values, values.real(source(node)))
    if named["ord"] != 2:
        raise Refused(f"LiteRT measures vectors by their squares (`{node.target}`: {named['ord']})")
    dims = named["dim"] or range(len(given.value.shape))
    squares = reduced(values, "SUM", (given * given).value, dims, named["keepdim"])
    return Real(values, squares).of("SQRT").value


@write(aten.adaptive_avg_pool2d.default)
def _adaptive(values: Values, node: fx.Node) -> Value:
    """Windows that differ in size as products with the shares that pixels have in them, for columns, then for rows."""
    given, shape = values.real(source(node)), shape_of(node)
    if shape[2:] == [1, 1]:
        return reduced(values, "MEAN", given, (2, 3), True)
    down, across = (
        aten.adaptive_avg_pool2d(torch.eye(before).unsqueeze(0), [now, before])[0]
        for before, now in zip(given.shape[2:], shape[2:], strict=True)
    )
    columns = _multiplied(values, given, values.constant(across.T.contiguous()), [*given.shape[:3], shape[3]])
    return _multiplied(values, values.constant(down), columns, shape)


@write(aten.avg_pool2d.default)
def _average(values: Values, node: fx.Node) -> Value:
    return average(values, node, values.real(source(node)), Result(shape_of(node)))


@write(aten._softmax.default, aten.softmax.int, aten._log_softmax.default, aten.log_softmax.int)
def _softmax(values: Values, node: fx.Node) -> Value:
    given = values.real(source(node))
    dim = int(arguments(node)["dim"]) % len(given.shape)
    order: Order = (*(each for each in given.order if each != dim), dim)
    given = values.arranged(given, order)
    if "log" in str(node.target):
        return step(values, "LOG_SOFTMAX", "LogSoftmaxOptions", torch.float32, given)
    return step(values, "SOFTMAX", "SoftmaxOptions", torch.float32, given, beta=1.0)


@write(aten.layer_norm.default)
def _layer_norm(values: Values, node: fx.Node) -> Value:
    named = arguments(node)
    given = values.real(source(node))
    rank, count = len(given.shape), len(named["normalized_shape"])
    normal = _normal(values, given, range(rank - count, rank), named["eps"])
    return _scaled(values, normal, named["weight"], named["bias"], [*given.shape[rank - count :]])


@write(aten.group_norm.default)
def _group_norm(values: Values, node: fx.Node) -> Value:
    named = arguments(node)
    given = values.real(source(node))
    parts = values.reshaped(
        given, [given.shape[0], named["num_groups"], math.prod(given.shape[1:]) // named["num_groups"]]
    )
    normal = values.reshaped(_normal(values, parts, (2,), named["eps"]), given.shape)
    return _scaled(values, normal, named["weight"], named["bias"], [given.shape[1], *[1] * (len(given.shape) - 2)])


def _centred(values: Values, given: Value, dims: Sequence[int]) -> Real:
    """Less its mean over `dims`."""
    return Real(values, given) - Real(values, reduced(values, "MEAN", given, dims, True))


def _normal(values: Values, given: Value, dims: Sequence[int], eps: float) -> Value:
    """Less its mean over `dims`, over its deviation."""
    centred = _centred(values, given, dims)
    variance = Real(values, reduced(values, "MEAN", (centred * centred).value, dims, True))
    return (centred * (variance + eps).of("RSQRT")).value


def _scaled(values: Values, value: Value, weight: fx.Node | None, bias: fx.Node | None, shape: Sequence[int]) -> Value:
    """Times `weight`, plus `bias`, constants that are `shape`d so that they broadcast."""
    lead = [1] * (len(value.shape) - len(shape))
    for given, name in ((weight, "MUL"), (bias, "ADD")):
        if given is not None:
            constant = values.constant(values.constants[given].reshape([*lead, *shape]), value.order)
            kind = "MulOptions" if name == "MUL" else "AddOptions"
            value = values.make(
                name, [value, constant], value.shape, value.order, kind=kind, fusedActivationFunction=NONE
            )
    return value


@write(aten.bmm.default, aten.mm.default, aten.matmul.default)
def _product(values: Values, node: fx.Node) -> Value:
    first, second = (values.real(each) for each in arguments(node).values())
    if min(len(first.shape), len(second.shape)) < 2:
        raise Refused("LiteRT multiplies matrices")
    return _multiplied(values, first, second, shape_of(node))


def _multiplied(values: Values, first: Value, second: Value, shape: Sequence[int]) -> Value:
    """Matrices, transposed ones as they lie."""
    turned, given = [], []
    for each in (first, second):
        rank = len(each.shape)
        turned.append(each.order == (*range(rank - 2), rank - 1, rank - 2))
        given.append(each if turned[-1] else values.arranged(each, plain(rank)))
    options: dict[str, Any] = {"adjX": turned[0], "adjY": turned[1]}
    return values.make("BATCH_MATMUL", given, shape, kind="BatchMatMulOptions", **options)


_LEAST = -1e30
"""For minus infinity in masks, of which rows that are nothing else would be no numbers."""


@write(aten.scaled_dot_product_attention.default)
def _attention(values: Values, node: fx.Node) -> Value:
    named = arguments(node)
    query, key, value = (values.real(named[name]) for name in ("query", "key", "value"))
    if named["enable_gqa"] or len(query.shape) != len(key.shape):
        raise Refused("LiteRT takes attention with as many heads of keys as of queries")
    rank, count, others = len(query.shape), query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if named["scale"] is None else named["scale"]
    last = (*range(rank - 2), rank - 1, rank - 2)
    keys = Value(key.index, (*key.shape[:-2], key.shape[-1], others), tuple(last[dim] for dim in key.order))
    scores = Real(values, _multiplied(values, query, keys, [*query.shape[:-1], others])) * scale
    if named["is_causal"]:
        causal = torch.ones(count, others, dtype=torch.bool).tril()
        scores = scores + Real(values, values.constant(torch.where(causal, 0.0, _LEAST)))
    if (mask := named["attn_mask"]) is not None:
        given = values.real(mask)
        if given.dtype == torch.bool:
            least = values.constant(torch.tensor(_LEAST))
            scores = Real(
                values,
                values.make(
                    "SELECT_V2",
                    [values.arranged(given, plain(len(given.shape))), scores.value, least],
                    scores.value.shape,
                    kind="SelectV2Options",
                ),
            )
        else:
            scores = scores + Real(values, values.arranged(given, plain(len(given.shape)))).at_least(_LEAST)
    shares = scores.of("SOFTMAX", "SoftmaxOptions", beta=1.0)
    return _multiplied(values, shares.value, value, shape_of(node))


@write(*COMPUTE)
def _layer(values: Values, node: fx.Node) -> Value:
    """Rows that stand on grids are quantized as they come, each anew: no kernel gives reals of integers."""
    given, weight, result = values.real(source(node)), weight_of(values, node), Result(shape_of(node))
    if node.target in LINEARS:
        return linear(values, node, given, weight, result, by_rows=source(node).target in (DEQUANTIZE, QUANTIZE_ROWS))
    return convolution(values, node, given, weight, result)


@write(QUANTIZE_ROWS)
def _by_rows(values: Values, node: fx.Node) -> Value:
    """Left to the linears that read them."""
    return values.real(source(node))


@write(*TRANSPOSED)
def _transposed(values: Values, node: fx.Node) -> Value:
    return transposed(values, node, values.real(source(node)), weight_of(values, node), shape_of(node))
