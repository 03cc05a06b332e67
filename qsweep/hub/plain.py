"""A traced graph in the few ops that quantizers and engines know; every rewrite keeps the values."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from qsweep.errors import ExportFailure
from qsweep.hub.fixed import with_fixed_weights
from qsweep.hub.form import (
    LINEARS,
    NAMESPACES,
    POINTWISE,
    RECTIFIERS,
    arguments,
    aten,
    attributes,
    nodes_of,
    set_constant,
    source,
)
from qsweep.hub.functional import functional

_WHOLE = 2**63 - 1
"""`slice` up to this index takes everything."""
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


def plain(graph: fx.GraphModule) -> fx.GraphModule:
    """One tensor in, one tensor out, in place: no in-place ops, no ops that do nothing, dropout left out.

    Raises ExportFailure for models with several inputs or outputs, for writes into a part of a tensor, and for ops that
    a saved graph cannot name.
    """
    graph.graph.set_codegen(fx.graph.CodeGen())
    _one_in_one_out(graph)
    rewrites = functional, _with_reshapes, with_fixed_weights, _without_idle, _without_tuples, _with_fixed_shapes
    layers = _with_pools, _with_plain_borders, _with_sized_paddings, _with_heads, _with_flat_linears, _rectified_first
    for rewrite in (*rewrites, *layers):
        rewrite(graph)
        graph.graph.eliminate_dead_code()
    _check_ops(graph)
    _keep_constants(graph)
    graph.recompile()
    return graph


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
            raise ExportFailure(f"`{source(node).target}`: gives several tensors; the hub form has ops that give one")
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
    for node in nodes_of(graph, {aten.view.default, aten.view_as.default, aten.reshape_as.default}):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif (shape := _shape(node)) is not None:
            node.target, node.args = aten.reshape.default, (node.args[0], shape)


def _without_idle(graph: fx.GraphModule) -> None:
    for node in nodes_of(graph, {aten._assert_tensor_metadata.default}):  # of the types that were traced
        graph.graph.erase_node(node)
    idle = {aten.dropout.default, aten.feature_dropout.default, aten.detach.default, aten.alias.default}
    for node in list(graph.graph.nodes):
        if node.target in idle or (node.target is aten.slice.Tensor and _takes_all(node)):
            node.replace_all_uses_with(source(node))
            graph.graph.erase_node(node)  # dead code with a random effect would stay


def _takes_all(node: fx.Node) -> bool:
    given = arguments(node)
    return given["start"] in (None, 0) and given["end"] in (None, _WHOLE) and given["step"] == 1


def _without_tuples(graph: fx.GraphModule) -> None:
    """One part of a tensor that was split, as the op that takes this part alone."""
    for node in [node for node in graph.graph.nodes if node.target is operator.getitem]:
        split, index = source(node), cast(int, node.args[1])
        with graph.graph.inserting_before(node):
            part = _part(graph, split, index)
        if part is not None:
            _replace(node, part)


def _part(graph: fx.GraphModule, split: fx.Node, index: int) -> fx.Node | None:
    if split.target is aten.unbind.int:
        return graph.graph.call_function(aten.select.int, (split.args[0], arguments(split)["dim"], index))
    if split.target not in _SPLITS or (shape := _shape(source(split))) is None:
        return None
    _, sizes, dim = arguments(split).values()
    if shape[dim] < 0 or index < 0 or split.all_input_nodes != [source(split)]:  # sizes known at run time only
        return None
    if split.target is aten.chunk.default:
        sizes = -(-shape[dim] // sizes)
    if isinstance(sizes, int):
        sizes = [sizes] * (index + 1)
    start = sum(sizes[:index])
    return graph.graph.call_function(aten.slice.Tensor, (split.args[0], dim, start, start + sizes[index]))


def _with_fixed_shapes(graph: fx.GraphModule) -> None:
    """Shapes that count samples at run time as shapes with one -1, which reads no tensor."""
    for node in nodes_of(graph, {aten.reshape.default}):
        shape, sizes = _shape(node), [*arguments(node).values()][1]
        if shape is not None and any(isinstance(size, fx.Node) for size in sizes):
            node.args = (node.args[0], shape)


def _with_sized_paddings(graph: fx.GraphModule) -> None:
    """Convolutions that are padded to the "same" size, or as "valid", as those with numbers, which kernels know; where
    one side needs more than the other, behind a pad of zeros."""
    call = graph.graph.call_function
    known: dict[Any, Any] = {aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default}
    for node in nodes_of(graph, {*known}):
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
            _replace(node, call(known[node.target], (value, node.args[1], given["bias"], *rest)))


def _each(given: dict[str, Any], name: str, weight: torch.Tensor) -> list[int]:
    """For every dimension of an image; one number may stand for all."""
    sizes = list(given[name])
    return sizes * (weight.dim() - 2) if len(sizes) == 1 else sizes


def _with_pools(graph: fx.GraphModule) -> None:
    """Means over an image as the pooling op, and adaptive pools of equal windows as plain ones: these have integer
    kernels in runtimes."""
    for node in nodes_of(graph, {aten.mean.dim, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default}):
        shape = _shape(source(node))
        if shape is None:
            continue
        if node.target is aten.mean.dim:
            _replace_mean(graph, node, len(shape))
        elif node.target is aten.adaptive_avg_pool2d.default:
            _replace_adaptive(graph, node, shape)
        elif arguments(node)["output_size"] == [1]:
            with graph.graph.inserting_before(node):
                _replace(node, _global_pool(graph, source(node), 3, keep=True))


def _replace_mean(graph: fx.GraphModule, node: fx.Node, rank: int) -> None:
    given = arguments(node)
    over = sorted(dim % rank for dim in given["dim"] or [])
    if (rank, over) in ((4, [2, 3]), (3, [2])) and given["dtype"] is None:
        keep = given["keepdim"]
        with graph.graph.inserting_before(node):
            _replace(node, _global_pool(graph, source(node), rank, keep=keep))


def _global_pool(graph: fx.GraphModule, value: fx.Node, rank: int, *, keep: bool) -> fx.Node:
    call = graph.graph.call_function
    if rank == 3:
        value = call(aten.unsqueeze.default, (value, 2))
    pooled = call(aten.adaptive_avg_pool2d.default, (value, [1, 1]))
    if not keep:
        return call(aten.flatten.using_ints, (pooled, 1))
    return call(aten.squeeze.dim, (pooled, 2)) if rank == 3 else pooled


def _replace_adaptive(graph: fx.GraphModule, node: fx.Node, shape: list[int]) -> None:
    sizes = arguments(node)["output_size"]
    if list(sizes) == [1, 1] or any(size % wanted for size, wanted in zip(shape[-2:], sizes, strict=True)):
        return
    window = [size // wanted for size, wanted in zip(shape[-2:], sizes, strict=True)]
    with graph.graph.inserting_before(node):
        _replace(node, graph.graph.call_function(aten.avg_pool2d.default, (node.args[0], window, window)))


def _with_plain_borders(graph: fx.GraphModule) -> None:
    """Average pools of `ceil_mode` that count the padding, behind a pad of zeros instead: runtimes do not agree on what
    windows past the padding count."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.avg_pool2d.default}):
        given = arguments(node)
        if not (given["ceil_mode"] and given["count_include_pad"] and given["divisor_override"] is None):
            continue
        with graph.graph.inserting_before(node):
            value, padding = source(node), (list(given["padding"]) * 2)[:2]
            if any(padding):
                value = call(aten.pad.default, (value, [padding[1], padding[1], padding[0], padding[0]]))
            window = given["kernel_size"], given["stride"]
            _replace(node, call(aten.avg_pool2d.default, (value, *window, [0, 0], True, False)))


def _with_heads(graph: fx.GraphModule) -> None:
    """Attention over (batch, tokens, features) as that of one head, which is what exporters know."""
    call = graph.graph.call_function
    for node in nodes_of(graph, {aten.scaled_dot_product_attention.default}):
        given, mask = node.args[:3], arguments(node)["attn_mask"]
        flat = all(value.meta["val"].dim() == 3 for value in given if isinstance(value, fx.Node))
        if len(given) == 3 and flat and (mask is None or mask.meta["val"].dim() == 2):
            with graph.graph.inserting_before(node):
                heads = [call(aten.unsqueeze.default, (value, 1)) for value in given]
                attended = call(aten.scaled_dot_product_attention.default, (*heads, *node.args[3:]), node.kwargs)
                _replace(node, call(aten.squeeze.dim, (attended, 1)))
            graph.graph.erase_node(node)  # nothing else does: it may draw what it drops


def _with_flat_linears(graph: fx.GraphModule) -> None:
    """Linears over (..., features) as linears over (N, features), which runtimes have a kernel with bias for; those
    that read the same share what they read."""
    call = graph.graph.call_function
    flat: dict[fx.Node, fx.Node] = {}
    for node in nodes_of(graph, LINEARS):
        before, after = _shape(source(node)), _shape(node)
        if before is None or after is None or len(before) == 2:
            continue
        with graph.graph.inserting_before(node):
            if source(node) not in flat:
                flat[source(node)] = call(aten.reshape.default, (node.args[0], [-1, before[-1]]))
            linear = call(aten.linear.default, (flat[source(node)], *node.args[1:]))
            _replace(node, call(aten.reshape.default, (linear, after)))


def _rectified_first(graph: fx.GraphModule) -> None:
    """relu(max_pool(x)) as max_pool(relu(x)), which is equal, so that the rectifier joins the layer before it; so for
    all functions of one number after the reshape of a flat linear's result."""
    for node in nodes_of(graph, {aten.max_pool2d.default, aten.reshape.default}):
        flat = node.target is aten.reshape.default
        if flat and not (source(node).target in LINEARS and len(source(node).users) == 1):
            continue
        movable = RECTIFIERS | POINTWISE if flat else RECTIFIERS
        while len(node.users) == 1 and (user := next(iter(node.users))).target in movable:
            user.replace_all_uses_with(node)
            user.replace_input_with(node, source(node))
            node.replace_input_with(source(node), user)
            node.prepend(user)


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)


def _shape(node: fx.Node) -> list[int] | None:
    """The traced shape with -1 for the one size that depends on the batch; None where there are more, or none known."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    return sizes if sizes.count(-1) <= 1 else None
