"""Which parameters of a model are the weights that compression works on, and which of them are pruned."""

from __future__ import annotations

import itertools
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from qsweep.errors import NotFinite

_LAYERS = (_ConvNd, nn.Linear)


def check_finite(model: nn.Module) -> None:
    """Raises NotFinite naming the first parameter or buffer that holds NaN or infinity."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            raise NotFinite(f"`{name}` must hold finite numbers (it holds NaN or infinity)")


def weight_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are weights of convolutions or linears; those of embeddings alone are not.

    In a graph from `torch.export`, where the modules are gone: the parameters of two or more dimensions that reach the
    weight argument of a convolution or linear, through fake quantization or folded batch norm if there is any.
    """
    if isinstance(model, torch.fx.GraphModule):
        found = [attrgetter(name)(model) for name in _graph_weights(model)]
    else:
        found = [module.weight for module in model.modules() if isinstance(module, _LAYERS)]
    same = set(map(id, found))  # one that is tied has more names than one
    return [name for name, parameter in model.named_parameters() if id(parameter) in same and parameter.dim() >= 2]


def _graph_weights(model: torch.fx.GraphModule) -> set[str]:
    found: set[str] = set()
    for node in model.graph.nodes:
        compute = node.op == "call_function" and any(word in str(node.target) for word in ("aten.conv", "aten.linear"))
        if compute or (node.op == "call_module" and str(node.target).startswith("folded_")):
            reached = [argument for argument in node.args[1:2] if isinstance(argument, torch.fx.Node)]
            while reached:
                source = reached.pop()
                found |= {str(source.target)} if source.op == "get_attr" else set()
                reached += source.all_input_nodes
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """`name -> keep`, boolean, of every parameter with zeros that have to stay."""
    return {name: keep for name, keep in keeps(model).items() if not keep.all()}


def keeps(model: nn.Module) -> dict[str, Tensor]:
    """`name -> keep`, boolean, of every parameter whose zeros stay where `masks` are applied: weights of convolutions
    and linears; of an eager model also biases and norms, where all that gives a channel is zero."""
    parameters = dict(model.named_parameters())
    found = {name: parameters[name].detach() != 0 for name in weight_names(model)}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for part, keep in itertools.chain.from_iterable(map(_of_channels, model.modules())):
        found |= {names[id(part)]: keep} if id(part) in names else {}
    return found


def _of_channels(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What `module` has a number of for each channel that it gives, beside weights of several dimensions, and which
    channels are more than zeros."""
    if not isinstance(module, (*_LAYERS, _BatchNorm)) or module.bias is None:
        return []
    rows = module.weight.detach()
    if isinstance(module, _ConvNd) and module.transposed:
        rows = rows.transpose(0, 1)
    if len(rows) != len(module.bias):  # transposed, of groups
        return []
    keep = rows.reshape(len(rows), -1).any(1) | (module.bias.detach() != 0)
    return [(part, keep) for part in ((module.weight, module.bias) if rows.dim() == 1 else (module.bias,))]


def apply_masks(model: nn.Module, keeps: dict[str, Tensor]) -> None:
    """Set the weights that `keeps` does not keep to zero, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, keep in keeps.items():
            parameters[name].mul_(keep)
