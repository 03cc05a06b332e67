"""Quantization-aware training on the hub graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qsweep.checkpoints import resumable
from qsweep.errors import TaskFailure
from qsweep.hub.convert import convert
from qsweep.hub.export import example_of, export
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import Place, insert_observers
from qsweep.hub.nodes import constant
from qsweep.hub.norm import fold_batch_norm
from qsweep.hub.save import load, save
from qsweep.hub.subpixel import with_convolutions
from qsweep.quantize._begin import begin_rounded
from qsweep.quantize._calibrate import calibration_inputs, observe
from qsweep.quantize._fake import FakeActivation, FakeWeight
from qsweep.quantize._fake_activations import TokenGrids
from qsweep.quantize._fake_weights import RangeWeight
from qsweep.quantize._norm import FoldedNorm, join_norms, ship_weights, split_norms, weight_quantizers
from qsweep.quantize._observers import apart, embedding_observer
from qsweep.quantize._rectifiers import join_rectifiers, split_rectifiers
from qsweep.quantize.trained import Trained
from qsweep.stage import Context, stage_key
from qsweep.train import Loss, fine_tune, set_mode


def trained(config: Trained, model: nn.Module, context: Context) -> QuantizedModel:
    """The hub form of `model` after quantization-aware training; trained once, then kept."""

    def compute(folder: Path) -> None:
        with resumable(folder) as checkpoints:
            save(_train(config, model, context, checkpoints), folder)

    return load(context.store.folder(stage_key(config, context), compute))


def _train(config: Trained, model: nn.Module, context: Context, checkpoints: Path) -> QuantizedModel:
    values = list(model.parameters())
    if values and not any(value.requires_grad for value in values):
        raise TaskFailure("some of the model's parameters must have `requires_grad` to be trained (all are frozen)")
    live = prepared(config, model, context)
    if (ptq := config.starts_from()) is not None:
        begin_rounded(live.graph, ptq, model, context)
    inputs = calibration_inputs(config, context) if config.looks_at_samples else None
    stages = [*config.widths()[:-1], 2]  # in the last one everything has its own bits, however few
    for number, (bits, epochs) in enumerate(zip(stages, config.epochs_at(), strict=True)):
        start(live.graph, bits, inputs)
        _fit(config, live.graph, context, epochs, checkpoints / f"{number}.pt")
    return convert(finished(live))


def prepared(config: Trained, model: nn.Module, context: Context) -> QuantizedModel:
    """The graph of `model` with fake quantizers in place, not started, and its norms joined."""
    live = with_convolutions(export(model, example_of(context)))
    config.check_layers(live.layers(), live.recurrent_weights)
    insert_observers(
        live,
        lambda place: _activation(config, place),
        config.weight,
        lambda: embedding_observer(config, RangeWeight),
        apart=lambda place: apart(config, place),
        real=config.stays_float,
        layers_only=config.by_token,
    )
    join_norms(live.graph, fold_scales=config.weight_granularity == "channel")
    join_rectifiers(live.graph)
    return live


def _activation(config: Trained, place: Place) -> FakeActivation | None:
    if config.by_token:
        return TokenGrids(config, place) if place.rows else None
    return config.activation(place) if config.activation_bits else None


def start(graph: fx.GraphModule, bits: int, inputs: Tensor | None) -> None:
    """Let every fake quantizer round to `bits` bits, or its own if they are more, from what it sees of `inputs`."""
    set_mode(graph, training=False)  # norms with the statistics that they have
    activations = [module for module in graph.modules() if isinstance(module, FakeActivation)]
    weights = _weights(graph)
    for quantizer, _ in weights:
        quantizer.enabled = False
    for activation in activations:
        activation.watch(bits)
    if inputs is not None:
        observe(graph, inputs)
    for activation in activations:
        activation.start()
    for quantizer, weight in weights:
        quantizer.start(weight, bits)


@torch.no_grad()
def _weights(graph: fx.GraphModule) -> list[tuple[FakeWeight, Tensor]]:
    found = []
    for node, module in weight_quantizers(graph):
        if isinstance(module, FoldedNorm):
            found.append((module.quantizer, module.trained_weight(*module.constants(graph, node))))
        else:
            weight = constant(graph, node.args[0])
            assert weight is not None
            found.append((module, weight))
    return found


def _fit(config: Trained, graph: fx.GraphModule, context: Context, epochs: int, checkpoint: Path) -> None:
    quantizers = [module for module in graph.modules() if isinstance(module, FakeActivation | FakeWeight)]
    if not any(parameter.requires_grad for parameter in graph.parameters()):
        return

    def settle() -> None:
        for quantizer in quantizers:
            quantizer.settle()

    decay = {} if config.weight_decay is None else {"weight_decay": config.weight_decay}
    fine_tune(
        graph,
        config,
        context,
        {"epochs": epochs, "schedule": config.schedule, "precision": config.precision} | decay,
        loss=_loss(context, quantizers),
        checkpoint=checkpoint,
        settle=settle,
        progress=lambda text: context.progress(f"quantization-aware training, {text}"),
    )


def _loss(context: Context, quantizers: list[FakeActivation | FakeWeight]) -> Loss | None:
    """That of the trial, with what the quantizers add to it; None: the task's own, with nothing added."""
    activations = [quantizer for quantizer in quantizers if isinstance(quantizer, FakeActivation)]
    penalized = [quantizer for quantizer in activations if quantizer.penalty() is not None]
    if not penalized:
        return context.loss

    def loss(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        own = context.loss(inputs, outputs, labels) if context.loss else context.task.loss(outputs, labels)
        added = [penalty for quantizer in penalized if (penalty := quantizer.penalty()) is not None]
        return own + torch.stack(added).sum()

    return loss


def finished(live: QuantizedModel) -> QuantizedModel:
    """The trained graph with norms folded and every weight on its levels, ready to be converted, in place."""
    split_rectifiers(live.graph)
    split_norms(live.graph)
    fold_batch_norm(live.graph)  # those behind layers that stay in floating point
    ship_weights(live.graph)
    return live
