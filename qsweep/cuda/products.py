"""Ops on two activations, which stay in floating point, and what lies between them and the layers they read."""

from __future__ import annotations

import operator

from torch import fx

from qsweep.hub.kinds import aten

ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = {
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    ATTENTION,
}
"""Products of two activations."""
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.unbind.int,
    operator.getitem,
}
"""What leaves numbers as they are."""


def for_products(node: fx.Node) -> bool:
    """Whether `node` is read by products of two activations alone, seen through views."""
    ends = [user for user in node.users if user.target in PRODUCTS]
    views = [user for user in node.users if user.target in VIEWS]
    return bool(node.users) and len(ends) + len(views) == len(node.users) and all(map(for_products, views))
