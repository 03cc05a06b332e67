"""Quantization-aware training on the hub graph."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qsweep.hub.convert import convert
from qsweep.hub.export import example_of, export
from qsweep.hub.form import QuantizedModel
from qsweep.hub.insert import insert_observers
from qsweep.hub.save import load, save
from qsweep.quantize._calibrate import calibration_inputs, observe
from qsweep.quantize._norm import join_norms, split_norms
from qsweep.quantize._observers import NearestWeight, RangeFakeQuantize
from qsweep.quantize.qat import QAT
from qsweep.stage import Context, stage_key
from qsweep.train import fit


def trained(config: QAT, model: nn.Module, context: Context) -> QuantizedModel:
    """The hub form of `model` after quantization-aware training; trained once, then kept."""

    def compute(folder: Path) -> None:
        save(_train(config, model, context), folder)

    return load(context.store.folder(stage_key(config, context), compute))


def _train(config: QAT, model: nn.Module, context: Context) -> QuantizedModel:
    live = export(model, example_of(context))
    insert_observers(
        live,
        lambda place: RangeFakeQuantize(config, place) if config.activation_bits else None,
        lambda place: NearestWeight(config, place),
    )
    join_norms(live.graph)
    observe(live.graph, calibration_inputs(config, context))
    for module in live.graph.modules():
        if isinstance(module, RangeFakeQuantize | NearestWeight):
            module.enabled = True
    fit(
        live.graph,
        context.task,
        context.training,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        seed=context.seed,
        device=context.device,
        loss=context.loss,
        keep_zeros=True,
        progress=lambda text: context.progress(f"quantization-aware training, {text}"),
    )
    live.graph.cpu()
    split_norms(live.graph)
    return convert(live)
