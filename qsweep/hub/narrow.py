"""An eager model without the channels that are nothing but zeros, for as long as it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qsweep.errors import ExportFailure
from qsweep.hub.channels import couple
from qsweep.hub.coupling import Coupling
from qsweep.hub.export import traced
from qsweep.hub.slim import dead_channels, left_of
from qsweep.train import set_mode
from qsweep.weights import keeps, weight_names

Cuts = Mapping[Tensor, dict[int, Tensor]]
"""Of each tensor that gets smaller, by dimension: the indices that stay."""

_SAME = 1e-3
"""Of the largest output: how far apart sums with and without zeros may be."""


@contextmanager
def narrowed(model: nn.Module, example: Tensor, coupling: Coupling | None = None) -> Iterator[None]:
    """Take the channels out of `model`, on the CPU, that are nothing but zeros; afterwards they are back, beside what
    the others have become.

    Meanwhile layers compute as much less. None are taken out of a model that cannot be traced, or whose code counts on
    their number: without them it raises, or gives something else for `example` (N, ...). `coupling`: of the model, if
    it is known.
    """
    coupling = coupling or _coupling(model, example)
    cuts = _cuts(model, coupling) if coupling else {}
    if not cuts:
        yield
        return
    outputs, wide = _outputs(model, example), {tensor: tensor.data for tensor in cuts}
    _replace(model, {tensor: _narrow(tensor.data, cut) for tensor, cut in cuts.items()})
    if not _gives(model, example, outputs):
        _replace(model, wide)
        cuts = {}
    try:
        yield
    finally:
        _replace(model, {tensor: _widened(wide[tensor], tensor.data, cut) for tensor, cut in cuts.items()})


def _coupling(model: nn.Module, example: Tensor) -> Coupling | None:
    """None where no layer has a row of zeros, and of models that cannot be traced."""
    if not any((model.get_parameter(name).flatten(1) == 0).all(1).any() for name in weight_names(model)):
        return None
    try:
        return couple(traced(model, example))
    except ExportFailure:  # whoever needs the graph says so
        return None


def _cuts(model: nn.Module, coupling: Coupling) -> Cuts:
    owned = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    made = {channel for part in coupling.parts if part.name not in owned for channel in part.channels}
    known = Coupling(coupling.values, [part for part in coupling.parts if part.name in owned])
    dead = dead_channels(known, owned.__getitem__, made | loose(model, coupling))
    found: dict[Tensor, dict[int, Tensor]] = {}
    for part in known.parts:
        left = left_of(part.channels, dead)
        if len(left) < len(part.channels):
            found.setdefault(owned[part.name], {})[part.dim] = torch.tensor(left)
    return found


def loose(model: nn.Module, coupling: Coupling) -> set[int]:
    """The channels that a training may bring back once they are zeros: nothing keeps what gives them so."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in keeps(model)}
    given = [part for part in coupling.parts if part.silences and id(parameters.get(part.name)) not in held]
    return {channel for part in given for channel in part.channels}


def _narrow(wide: Tensor, cut: dict[int, Tensor]) -> Tensor:
    for dim, left in cut.items():
        wide = wide.index_select(dim, left)
    return wide


def _widened(wide: Tensor, narrow: Tensor, cut: dict[int, Tensor]) -> Tensor:
    """`wide` with `narrow` at the indices that stayed."""
    if not cut:
        return narrow
    (dim, left), *rest = cut.items()
    return wide.index_copy(dim, left, _widened(wide.index_select(dim, left), narrow, dict(rest)))


def _replace(model: nn.Module, tensors: Mapping[Tensor, Tensor]) -> None:
    """Give the keys the data of the values, and depthwise convolutions as many groups as they read channels."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1 and module.weight in tensors:
            rows = module.groups * len(tensors[module.weight]) // len(module.weight)
            module.groups = module.in_channels = rows
    for tensor, data in tensors.items():
        tensor.data = data


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor, *, training: bool = False) -> Tensor:
    """Of a copy, as norms in training mode keep statistics."""
    copied = copy.deepcopy(model)
    set_mode(copied, training)
    with torch.random.fork_rng(devices=[]):
        outputs: Tensor = copied(example)
    return outputs


def _gives(model: nn.Module, example: Tensor, outputs: Tensor) -> bool:
    """Whether `model` gives `outputs` for `example`, and anything in training mode."""
    try:
        found = _outputs(model, example)
        _outputs(model, example, training=True)
    except Exception:  # of code that counts on the number of channels, which raises what it likes
        return False
    return found.shape == outputs.shape and bool((found - outputs).abs().max() <= _SAME * outputs.abs().max())
