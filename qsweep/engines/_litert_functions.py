"""Functions of one value and of several, element by element, in floating point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qsweep.engines._litert_ops import NONE, Real, dtype_of, shape_of, step, write
from qsweep.engines._litert_values import Value, Values
from qsweep.errors import Refused
from qsweep.hub.kinds import aten
from qsweep.hub.nodes import arguments, source
from qsweep.hub.ops import QUICK_GELU

_ONE: dict[Any, tuple[str, str]] = {
    aten.relu.default: ("RELU", ""),
    aten.relu6.default: ("RELU6", ""),
    aten.sigmoid.default: ("LOGISTIC", ""),
    aten.tanh.default: ("TANH", ""),
    aten.exp.default: ("EXP", "ExpOptions"),
    aten.log.default: ("LOG", ""),
    aten.sqrt.default: ("SQRT", ""),
    aten.rsqrt.default: ("RSQRT", ""),
    aten.abs.default: ("ABS", "AbsOptions"),
    aten.neg.default: ("NEG", "NegOptions"),
    aten.sin.default: ("SIN", ""),
    aten.cos.default: ("COS", "CosOptions"),
    aten.floor.default: ("FLOOR", ""),
    aten.hardswish.default: ("HARD_SWISH", "HardSwishOptions"),
    aten.logical_not.default: ("LOGICAL_NOT", "LogicalNotOptions"),
    aten.bitwise_not.default: ("LOGICAL_NOT", "LogicalNotOptions"),
}


@write(*_ONE)
def _one(values: Values, node: fx.Node) -> Value:
    op: Any = node.target
    given = values.real(source(node))
    if op is aten.bitwise_not.default and given.dtype != torch.bool:
        raise Refused(f"LiteRT has no operator for `{op}` of {given.dtype}")
    return step(values, *_ONE[op], dtype_of(node), given)


def _softplus(x: Real, beta: float = 1, threshold: float = 20) -> Real:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which has no overflow and needs no threshold."""
    scaled = x if beta == 1 else x * beta
    result = scaled.of("RELU") + ((scaled.of("ABS", "AbsOptions") * -1.0).of("EXP", "ExpOptions") + 1.0).of("LOG")
    return result if beta == 1 else result * (1 / beta)


def _elu(x: Real, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Real:
    below = ((x.at_most(0.0) * input_scale).of("EXP", "ExpOptions") - 1.0) * (alpha * scale)
    return x.of("RELU") * scale + below


def _gelu(x: Real, approximate: str = "none") -> Real:
    return x.of("GELU", "GeluOptions", approximate=approximate == "tanh")


_FUNCTIONS: dict[Any, Callable[..., Real]] = {
    aten.silu.default: lambda x: x * x.of("LOGISTIC"),
    QUICK_GELU: lambda x: x * (x * 1.702).of("LOGISTIC"),
    aten.mish.default: lambda x: x * _softplus(x).of("TANH"),
    aten.softplus.default: _softplus,
    aten.elu.default: _elu,
    aten.gelu.default: _gelu,
    aten.hardsigmoid.default: lambda x: (x + 3.0).of("RELU6") * (1 / 6),
    aten.leaky_relu.default: lambda x, negative_slope=0.01: x.of(
        "LEAKY_RELU", "LeakyReluOptions", alpha=negative_slope
    ),
    aten.hardtanh.default: lambda x, min_val=-1.0, max_val=1.0: x.between(min_val, max_val),
    aten.clamp.default: lambda x, min=None, max=None: x.between(min, max),
    aten.log1p.default: lambda x: (x + 1.0).of("LOG"),
    aten.reciprocal.default: lambda x: x.with_other("POW", "PowOptions", -1.0),
}


@write(*_FUNCTIONS)
def _function(values: Values, node: fx.Node) -> Value:
    op: Any = node.target
    _, *rest = arguments(node).values()
    return _FUNCTIONS[op](_real(values, node), *rest).value


def _real(values: Values, node: fx.Node) -> Real:
    """What `node` is given, a real number as its result is."""
    if dtype_of(node) != torch.float32:
        raise Refused(f"LiteRT has no operator for `{node.target}` of {dtype_of(node)}")
    return Real(values, values.typed(values.real(source(node)), torch.float32))


@write(aten.pow.Tensor_Scalar)
def _power(values: Values, node: fx.Node) -> Value:
    given, exponent = _real(values, node), float(arguments(node)["exponent"])
    if exponent == 2:
        return (given * given).value
    if exponent == 0.5:
        return given.of("SQRT").value
    return given.with_other("POW", "PowOptions", exponent).value


@write(aten._to_copy.default, aten.to.dtype)
def _cast(values: Values, node: fx.Node) -> Value:
    return values.typed(values.real(source(node)), dtype_of(node))


_TWO: dict[Any, tuple[str, str]] = {
    aten.add.Tensor: ("ADD", "AddOptions"),
    aten.sub.Tensor: ("SUB", "SubOptions"),
    aten.mul.Tensor: ("MUL", "MulOptions"),
    aten.div.Tensor: ("DIV", "DivOptions"),
    aten.add.Scalar: ("ADD", "AddOptions"),
    aten.mul.Scalar: ("MUL", "MulOptions"),
    aten.maximum.default: ("MAXIMUM", "MaximumMinimumOptions"),
    aten.minimum.default: ("MINIMUM", "MaximumMinimumOptions"),
    aten.pow.Tensor_Tensor: ("POW", "PowOptions"),
    aten.eq.Tensor: ("EQUAL", "EqualOptions"),
    aten.ne.Tensor: ("NOT_EQUAL", "NotEqualOptions"),
    aten.lt.Tensor: ("LESS", "LessOptions"),
    aten.le.Tensor: ("LESS_EQUAL", "LessEqualOptions"),
    aten.gt.Tensor: ("GREATER", "GreaterOptions"),
    aten.ge.Tensor: ("GREATER_EQUAL", "GreaterEqualOptions"),
    aten.eq.Scalar: ("EQUAL", "EqualOptions"),
    aten.ne.Scalar: ("NOT_EQUAL", "NotEqualOptions"),
    aten.lt.Scalar: ("LESS", "LessOptions"),
    aten.le.Scalar: ("LESS_EQUAL", "LessEqualOptions"),
    aten.gt.Scalar: ("GREATER", "GreaterOptions"),
    aten.ge.Scalar: ("GREATER_EQUAL", "GreaterEqualOptions"),
    aten.logical_and.default: ("LOGICAL_AND", "LogicalAndOptions"),
    aten.bitwise_and.Tensor: ("LOGICAL_AND", "LogicalAndOptions"),
    aten.logical_or.default: ("LOGICAL_OR", "LogicalOrOptions"),
    aten.bitwise_or.Tensor: ("LOGICAL_OR", "LogicalOrOptions"),
}
_FUSING = ("ADD", "SUB", "MUL", "DIV")


@write(*_TWO)
def _two(values: Values, node: fx.Node) -> Value:
    op: Any = node.target
    name, kind = _TWO[op]
    one, other, *factor = arguments(node).values()
    if factor and factor != [1]:
        raise Refused(f"LiteRT has no operator for `{op}` with a factor")
    dtype = _type_of(node, one, other)
    first, second = values.together([one, other], len(shape_of(node)), [dtype] * 2)
    options: dict[str, Any] = {"fusedActivationFunction": NONE} if name in _FUSING else {}
    order = first.order if len(first.shape) >= len(second.shape) else second.order
    return values.make(name, [first, second], shape_of(node), order, dtype=dtype_of(node), kind=kind, **options)


def _type_of(node: fx.Node, *given: Any) -> torch.dtype:
    """In which an op computes: that of what it gives, where that is numbers; else that in which it compares, or the
    only one that it takes. Raises Refused for operations on bits."""
    if (dtype := dtype_of(node)) != torch.bool:
        if "bitwise" in str(node.target):
            raise Refused(f"LiteRT has no operator for `{node.target}` of {dtype}")
        return dtype
    if _TWO[node.target][0].startswith("LOGICAL"):
        return dtype
    found = torch.result_type(*(each.meta["val"] if isinstance(each, fx.Node) else each for each in given))
    return torch.float32 if found.is_floating_point else torch.int32 if found == torch.bool else found


@write(aten.rsub.Scalar)
def _less(values: Values, node: fx.Node) -> Value:
    given = _real(values, node)
    return (given * -1.0 + float(arguments(node)["other"])).value


@write(aten.where.self)
def _where(values: Values, node: fx.Node) -> Value:
    dtypes = torch.bool, *[dtype_of(node)] * 2
    given = values.together([*arguments(node).values()], len(shape_of(node)), dtypes)
    return values.make("SELECT_V2", given, shape_of(node), given[0].order, dtype=dtype_of(node), kind="SelectV2Options")
