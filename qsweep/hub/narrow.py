"""An eager model without the channels that are nothing but zeros, for as long as it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from qsweep.errors import ExportFailure
from qsweep.hub.channels import couple
from qsweep.hub.coupling import Coupling, Part
from qsweep.hub.export import example_of, traced
from qsweep.hub.slim import dead_channels, left_of
from qsweep.stage import Context
from qsweep.train import FineTuning, fine_tune, set_mode
from qsweep.weights import keeps, weight_names

Cuts = Mapping[str, dict[int, Tensor]]
"""Of each parameter and buffer that gets smaller, under all of its names, by dimension: the indices that stay."""

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
    wide = {name: tensor.data for name, tensor in _tensors(model).items() if name in cuts}
    outputs, multiples = _outputs(model, example), _multiples(model)
    _replace(model, {name: _narrow(tensor, cuts[name]) for name, tensor in wide.items()}, multiples)
    if not _gives(model, example, outputs):
        _replace(model, wide, multiples)
        cuts = {}
    try:
        yield
    finally:
        now = _tensors(model)  # a move to a GPU and back makes other buffers
        learned = {name: _widened(wide[name], now[name].data.cpu(), cut) for name, cut in cuts.items()}
        _replace(model, learned, multiples)


def fine_tune_narrow(
    model: nn.Module,
    stage: FineTuning,
    context: Context,
    settings: dict[str, Any] | None = None,
    *,
    coupling: Coupling | None = None,
    **options: Any,
) -> None:
    """`fine_tune` without the channels that are nothing but zeros."""
    with narrowed(model, example_of(context), coupling) if stage.epochs else nullcontext():
        fine_tune(model, stage, context, settings, **options)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _multiples(model: nn.Module) -> dict[_ConvNd, int]:
    """Of each depthwise convolution, how many channels it gives for one that it reads."""
    layers = [layer for layer in model.modules() if isinstance(layer, _ConvNd) and not layer.transposed]
    return {layer: len(layer.weight) // layer.groups for layer in layers if layer.groups == layer.in_channels > 1}


def coupling_of(model: nn.Module, example: Tensor) -> Coupling:
    """Which channels of an eager model go together. Parts have the names of its parameters and buffers where they lie
    as these do, and else none: the graph has weights that are multiplied (`x @ w`) transposed. Raises ExportFailure."""
    live, owned = traced(model, example), _tensors(model)
    coupling = couple(live)

    def named(part: Part) -> Part:
        value = attrgetter(part.name)(live.graph)
        same = part.name in owned and owned[part.name].shape == value.shape and torch.equal(owned[part.name], value)
        return part if same else replace(part, name="")

    return Coupling(coupling.values, [named(part) for part in coupling.parts])


def _coupling(model: nn.Module, example: Tensor) -> Coupling | None:
    """None where no layer has a row of zeros, and of models that cannot be traced."""
    if not any((model.get_parameter(name).flatten(1) == 0).all(1).any() for name in weight_names(model)):
        return None
    try:
        return coupling_of(model, example)
    except ExportFailure:  # whoever needs the graph says so
        return None


def _cuts(model: nn.Module, coupling: Coupling) -> Cuts:
    owned = _tensors(model)
    known = Coupling(coupling.values, [part for part in coupling.parts if part.name])
    made = {channel for part in coupling.parts if not part.name for channel in part.channels}
    dead = dead_channels(known, owned.__getitem__, made | loose(model, coupling))
    found: dict[int, dict[int, Tensor]] = {}
    for part in known.parts:
        left = left_of(part.channels, dead)
        if len(left) < len(part.channels):
            found.setdefault(id(owned[part.name]), {})[part.dim] = torch.tensor(left)
    return {name: found[id(tensor)] for name, tensor in owned.items() if id(tensor) in found}


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


def _replace(model: nn.Module, data: Mapping[str, Tensor], multiples: Mapping[_ConvNd, int]) -> None:
    """Give parameters and buffers `data` by name, and depthwise convolutions as many groups as they read channels."""
    tensors = _tensors(model)
    for name, values in data.items():
        tensors[name].data = values
    for layer, multiple in multiples.items():
        layer.groups = layer.in_channels = len(layer.weight) // multiple


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
