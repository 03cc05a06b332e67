"""A traced graph in the few ops that quantizers and engines know; every rewrite keeps the values."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.activations import with_activations
from qsweep.hub.factors import with_factors
from qsweep.hub.fixed import with_fixed_weights
from qsweep.hub.functional import functional
from qsweep.hub.kinds import (
    COMPUTE,
    CONVOLUTIONS,
    LINEARS,
    NAMESPACES,
    POINTWISE,
    REARRANGED,
    RECTIFIERS,
    RECURRENT,
    TRANSPOSED,
    aten,
)
from qsweep.hub.linears import with_linears
from qsweep.hub.nodes import arguments, attributes, nodes_of, set_constant, source
from qsweep.hub.parts import without_tuples
from qsweep.hub.pools import with_plain_borders, with_pools
from qsweep.hub.regions import without_regions
from qsweep.hub.sizes import sizes_of, with_fixed_shapes, with_sizes_of_tensors
from qsweep.hub.traced import line_of, replace_by, shape_of

_IDLE = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.dropout_.default,
    aten.detach_.default,
    aten.feature_dropout_.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
_NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
"""Numbers that change nothing, such as that from which a sum over branches starts."""
_VIEWS = {aten.view.default, aten.view_as.default, aten.reshape_as.default}
_WHOLE = 2**63 - 1
"""`slice` up to this index takes everything."""
_SIZED: dict[Any, Any] = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}
_BATCHED = CONVOLUTIONS | TRANSPOSED | {*_SIZED, aten.conv3d.default}


def plain(graph: fx.GraphModule) -> fx.GraphModule:
    """One tensor in, one tensor out, in place: no in-place ops, no ops that do nothing, dropout left out.

    Raises ExportFailure for models with several inputs or outputs, for writes through views that are no slices, for
    autocast, for sizes that no tensor has, and for ops that a saved graph cannot name.
    """
    graph.graph.set_codegen(fx.graph.CodeGen())
    _one_in_one_out(graph)
    rewrites = without_regions, _without_idle, without_tuples, functional, _without_neutral, _with_sums, _with_reshapes
    values = with_activations, with_linears, with_factors, with_fixed_weights, with_fixed_shapes, with_sizes_of_tensors
    layers = with_pools, with_plain_borders, _with_batches, _with_sized_paddings, _with_heads, _with_flat_linears
    for rewrite in (*rewrites, *values, *layers, rectified_first):
        rewrite(graph)
        graph.graph.eliminate_dead_code(_has_effects)
    _check_ops(graph)
    _keep_constants(graph)
    graph.recompile()
    return graph


def _has_effects(node: fx.Node) -> bool:
    """Whether it does more than give a value: attention, which may draw a dropout, does not."""
    return node.is_impure(impure_random=False)


def _one_in_one_out(graph: fx.GraphModule) -> None:
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ExportFailure(f"the model must take one tensor (got {len(inputs)} inputs)")
    output = graph.graph.output_node()
    result: Any = output.args[0]
    if isinstance(result, tuple | list):
        if len(result) != 1:
            raise ExportFailure(f"the model must give one tensor (got {len(result)} outputs)")
        output.args = (result[0],)


def _check_ops(graph: fx.GraphModule) -> None:
    for node in [node for node in graph.graph.nodes if node.op == "call_function"]:
        if node.target is operator.getitem:
            if source(node).target in RECURRENT:
                continue
            op, line = source(node).target, line_of(source(node))
            raise ExportFailure(f"`{op}`: gives several tensors; the hub form has ops that give one (`{line}`)")
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in NAMESPACES:
            raise ExportFailure(f"`{node.target}`: must be an op of PyTorch's `aten` to be stored in the hub form")


def _keep_constants(graph: fx.GraphModule) -> None:
    """Tensors that the model made or held as plain attributes as buffers, which go where the graph goes."""
    known = {name for name, _ in (*graph.named_parameters(), *graph.named_buffers())}
    for name, value in list(attributes(graph)):
        if name not in known:
            set_constant(graph, name, value)


def _with_reshapes(graph: fx.GraphModule) -> None:
    """Views as reshapes: runtimes lay images out with their channels last, which a view may not allow."""
    for node in nodes_of(graph, _VIEWS):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif (shape := shape_of(node)) is not None:
            node.target, node.args = aten.reshape.default, (node.args[0], shape)


def _without_idle(graph: fx.GraphModule) -> None:
    for node in nodes_of(graph, {aten._assert_tensor_metadata.default}):  # of the types that were traced
        graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        if node.target in _IDLE or _takes_all(node) or _pads_nothing(node) or _shapes_nothing(node):
            node.replace_all_uses_with(source(node))
            graph.graph.erase_node(node)  # dead code with a random effect would stay


def _without_neutral(graph: fx.GraphModule) -> None:
    for node in nodes_of(graph, _NEUTRAL):
        given, number = node.args
        neutral = not isinstance(number, fx.Node) and number == _NEUTRAL[node.target] and not node.kwargs
        if neutral and isinstance(given, fx.Node) and _dtype(given) == _dtype(node):
            node.replace_all_uses_with(given)


def _with_sums(graph: fx.GraphModule) -> None:
    """A number less integers, as masks are turned around, as their negative plus the number: PyTorch's exporter to ONNX
    knows the first of real values only."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.rsub.Scalar}):
        dtype = _dtype(source(node))
        if dtype is None or dtype.is_floating_point or arguments(node)["alpha"] != 1:
            continue
        with graph.graph.inserting_before(node):
            negative = call(aten.neg.default, (source(node),))
            negative.meta["val"] = source(node).meta["val"]
            replace_by(node, call(aten.add.Tensor, (negative, node.args[1])))


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _pads_nothing(node: fx.Node) -> bool:
    return node.target is aten.pad.default and not any(arguments(node)["pad"])


def _shapes_nothing(node: fx.Node) -> bool:
    """Whether it is a reshape to the shape that is there, in which OpenVINO's compiler may end the process."""
    if node.target not in _VIEWS | {aten.reshape.default, aten.flatten.using_ints}:
        return False
    before, after = (str(value.meta["val"].shape) for value in (source(node), node))  # of a batch: compared as written
    return before == after


def _takes_all(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given = arguments(node)
    return given["start"] in (None, 0) and given["end"] in (None, _WHOLE) and given["step"] == 1


def _with_batches(graph: fx.GraphModule) -> None:
    """Convolutions of one sample as those of a batch of one, which kernels know."""
    for node in nodes_of(graph, _BATCHED):
        value, weight = source(node).meta["val"], source(node, 1).meta["val"]
        if value.dim() == weight.dim():
            continue
        with graph.graph.inserting_before(node):
            one = graph.graph.call_function(aten.unsqueeze.default, (source(node), 0))
            one.meta["val"] = value.unsqueeze(0)
            batch = graph.graph.call_function(cast(Any, node.target), (one, *node.args[1:]), node.kwargs)
            batch.meta["val"] = node.meta["val"].unsqueeze(0)
            replace_by(node, graph.graph.call_function(aten.squeeze.dim, (batch, 0)))


def _with_sized_paddings(graph: fx.GraphModule) -> None:
    """Convolutions that are padded to the "same" size, or as "valid", as those with numbers, which kernels know; where
    one side needs more than the other, behind a pad of zeros."""
    call = graph.graph.call_function
    for node in nodes_of(graph, _SIZED):
        given, weight = arguments(node), source(node, 1).meta["val"]
        around = [
            dilation * (size - 1)
            for dilation, size in zip(_each(given, "dilation", weight), weight.shape[2:], strict=True)
        ]
        around = [0] * len(around) if given["padding"] == "valid" else around
        with graph.graph.inserting_before(node):
            value = source(node)
            if any(size % 2 for size in around):
                value = call(aten.pad.default, (value, [side for size in reversed(around) for side in (0, size % 2)]))
                traced = source(node).meta["val"]
                wider = [size + extra % 2 for size, extra in zip(traced.shape[2:], around, strict=True)]
                value.meta["val"] = traced.new_empty([*traced.shape[:2], *wider])
            rest = given["stride"], [size // 2 for size in around], given["dilation"], given["groups"]
            replace_by(node, call(_SIZED[node.target], (value, node.args[1], given["bias"], *rest)))


def _each(given: dict[str, Any], name: str, weight: torch.Tensor) -> list[int]:
    """For every dimension of an image; one number may stand for all."""
    sizes = list(given[name])
    return sizes * (weight.dim() - 2) if len(sizes) == 1 else sizes


def _with_heads(graph: fx.GraphModule) -> None:
    """Attention over (batch, tokens, features) as that of one head, over (..., heads, tokens, features) as that of one
    batch: what exporters know."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.scaled_dot_product_attention.default}):
        given, mask = cast(list[fx.Node], node.args[:3]), arguments(node)["attn_mask"]
        ranks, after = {value.meta["val"].dim() for value in given}, shape_of(node)
        leading = {tuple(map(str, value.meta["val"].shape[:-2])) for value in given}
        known = len(given) == 3 and (mask is None or mask.meta["val"].dim() == 2)
        if not known or len(ranks) > 1 or ranks == {4} or len(leading) > 1 or after is None:
            continue
        with graph.graph.inserting_before(node):
            if ranks == {3}:
                heads = [call(aten.unsqueeze.default, (value, 1)) for value in given]
            else:
                heads = [call(aten.flatten.using_ints, (value, 0, value.meta["val"].dim() - 4)) for value in given]
            attended = call(aten.scaled_dot_product_attention.default, (*heads, *node.args[3:]), node.kwargs)
            back = (aten.squeeze.dim, 1) if ranks == {3} else (aten.reshape.default, after)
            replace_by(node, call(back[0], (attended, back[1])))
        graph.graph.erase_node(node)  # nothing else does: it may draw what it drops


def _with_flat_linears(graph: fx.GraphModule) -> None:
    """Linears over (..., features) as linears over (N, features), which runtimes have a kernel with bias for; those
    that read the same share what they read."""
    call = graph.graph.call_function
    flat: dict[fx.Node, fx.Node] = {}
    for node in nodes_of(graph, LINEARS):
        given, value = source(node), source(node).meta.get("val")
        if value is None or value.dim() == 2:
            continue
        with graph.graph.inserting_before(node):
            if given not in flat:
                flat[given] = call(aten.reshape.default, (given, [-1, value.shape[-1]]))
            linear = call(aten.linear.default, (flat[given], *node.args[1:]))
            after = shape_of(node) or [*sizes_of(graph, given)[:-1], node.meta["val"].shape[-1]]
            replace_by(node, call(aten.reshape.default, (linear, after)))


def rectified_first(graph: fx.GraphModule) -> None:
    """relu(max_pool(x)) as max_pool(relu(x)), which is equal, so that the rectifier joins the layer before it; so for
    all that rearranges what a layer gives, and for any function of one number after the reshape of a flat linear's
    result."""
    for node in reversed(nodes_of(graph, REARRANGED | {aten.max_pool2d.default})):
        if node.target is not aten.max_pool2d.default and not _rearranges_a_layer(node):
            continue
        flat = node.target is aten.reshape.default and source(node).target in LINEARS
        movable = RECTIFIERS | POINTWISE if flat else RECTIFIERS
        while len(node.users) == 1 and (user := next(iter(node.users))).target in movable:
            user.replace_all_uses_with(node)
            user.replace_input_with(node, source(node))
            node.replace_input_with(source(node), user)
            node.prepend(user)


def _rearranges_a_layer(node: fx.Node) -> bool:
    """Whether it, or other such ops before it, alone reads what a layer gives."""
    given = source(node)
    return len(given.users) == 1 and (
        given.target in COMPUTE or (given.target in REARRANGED and _rearranges_a_layer(given))
    )
