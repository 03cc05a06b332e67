"""From an eager model to the float graph that the hub form is made of."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from traceback import FrameSummary, extract_tb
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.batchnorm import _BatchNorm

from qsweep.errors import DataError, ExportFailure
from qsweep.hub.form import QuantizedModel
from qsweep.hub.norm import fold_batch_norm, without_norms_of_norms
from qsweep.hub.plain import plain
from qsweep.hub.slim import slim
from qsweep.hub.subpixel import with_convolutions

if TYPE_CHECKING:
    from qsweep.stage import Context


_MOMENTUM = 0.1
"""Of norms, where PyTorch is told none."""


def float_graph(model: nn.Module, context: Context) -> QuantizedModel:
    """The folded float graph of `model`, the uncompressed or pruned one of `context`; exported once, then kept."""
    from qsweep.hub.save import load, save

    def compute(folder: Path) -> None:
        live = export(model, example_of(context))
        save(QuantizedModel(fold_batch_norm(live.graph), live.example), folder)

    return load(context.store.folder(context.store.key("float_graph", 16, context.key, torch.__version__), compute))


def quantizable_graph(model: nn.Module, context: Context) -> QuantizedModel:
    """`float_graph` with convolutions where it has transposed ones: what is quantized after training."""
    return with_convolutions(float_graph(model, context))


def example_of(context: Context) -> Tensor:
    """Two training samples as the model takes them, or one twice. Raises DataError if there are none."""
    stored = context.task.samples("train").inputs[:2]
    if not len(stored):
        raise DataError("`train`: must hold samples (got none)")
    return context.task.transform(stored.expand(2, *stored.shape[1:])).to(torch.float32)


def export(model: nn.Module, example: Tensor) -> QuantizedModel:
    """`traced`, without the channels that are nothing but zeros and with one norm where norms follow each other."""
    live = traced(model, example)
    slim(live)
    without_norms_of_norms(live.graph)
    return live


def traced(model: nn.Module, example: Tensor) -> QuantizedModel:
    """Trace a copy of `model` in eval mode, batch norm kept; raises ExportFailure with the tracer's reason.

    `example`: (2, ...) float32. The graph takes any batch size.
    """
    model = copy.deepcopy(model).eval().cpu()
    _with_momenta(model)
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        graph = program.module(check_guards=False)
    except Exception as error:  # the tracer raises dozens of types; all mean the same to the person who reads it
        raise ExportFailure(f"`torch.export` cannot trace the model: {_reason(error)}") from error
    assert isinstance(graph, fx.GraphModule)
    return QuantizedModel(plain(graph), example)


def _with_momenta(model: nn.Module) -> None:
    """Cumulative averages of norms as moving ones, in place: tracing in eval mode writes a momentum of 0 for them, with
    which no training would move the statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is None:
            module.momentum = _MOMENTUM


_BATCH = (
    "it must take batches of any size, and makes theirs a number: write `x.shape[0] // n` for `int(x.shape[0] / n)`, or"
    " -1 in a reshape, and neither a condition on the size of the batch nor a loop over its samples"
)


def _reason(error: Exception) -> str:
    if "Constraints violated (batch)" in str(error):
        return _BATCH
    if isinstance(error, GuardOnDataDependentSymNode) and (frame := _frame(error)):
        return (
            f"`{frame.line}` (`{frame.filename}`, line {frame.lineno}) depends on the values in a tensor, which nobody "
            "knows as it is traced: choose with `torch.where`, and bound with `torch.clamp` or `torch.maximum`"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


def _frame(error: Exception) -> FrameSummary | None:
    """Where outside PyTorch `error` was raised: in the model."""
    own = (f"{Path(torch.__file__).parent}/", __file__, "<")
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    return frames[-1] if frames else None
