"""An artifact run over a split by its own engine, and held against its simulation."""

from __future__ import annotations

import torch
from torch import Tensor

from qsweep.engines import Runner
from qsweep.errors import NotFinite, ParityFailure
from qsweep.evaluate import class_axis
from qsweep.spec import Measure
from qsweep.tasks import SplitName, Task
from qsweep.tasks._parts import Parts, by_name

_ALIKE = 0.02
"""Of the range of an output: two numbers that differ by less agree."""
_ROUNDING = 1e-6
"""Of a number, such as one that is the same for all samples."""


def outputs(run: Runner, task: Task, split: SplitName, batch_size: int, device: str = "cpu") -> Tensor:
    """(N, ...) outputs for the samples of `split`, batches filled up to the artifact's size.

    They are on the CPU, wherever `run` works.
    """
    stored = task.samples(split).inputs
    parts = []
    for part in torch.split(stored, batch_size):
        batch = task.transform(part).to(torch.float32)
        missing = batch_size - len(batch)
        if missing:
            batch = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
        found = run(batch.contiguous().to(device))[: len(part)]
        parts.append(found.to("cpu", copy=True))
    joined = torch.cat(parts)
    if not torch.isfinite(joined).all():
        raise NotFinite("the artifact's outputs must be finite (got NaN or infinity)")
    return joined


def parity(
    deployed: Tensor, simulated: Tensor, labels: Tensor, settings: Measure, parts: Parts | None = None
) -> dict[str, float]:
    """`parity_top1` and `parity_max_abs` of two outputs, (N, C, ...) or, of tokens, (N, ..., C), for samples with these
    labels (N, ...), or of the several `parts` that lie side by side in them; see `Measure.parity_top1`.

    Raises ParityFailure below the bound of the former.
    """
    if not (parts and parts.several) and _of_classes(simulated, labels):
        axis = class_axis(simulated, labels)
        what, same = "of the top classes", deployed.argmax(axis) == simulated.argmax(axis)
    else:
        pairs = zip(*(by_name(each, parts).values() for each in (deployed, simulated)), strict=True)
        what, same = "of the outputs", torch.cat([_alike(one, other).flatten() for one, other in pairs])
    agree = same.double().mean().item()
    if agree < settings.parity_top1:
        raise ParityFailure(
            f"artifact and simulation must agree on {settings.parity_top1:.1%} {what} (got {agree:.1%}; the bound is "
            "`measure.parity_top1`)"
        )
    return {"parity_top1": agree, "parity_max_abs": (deployed - simulated).abs().max().item()}


def _alike(deployed: Tensor, simulated: Tensor) -> Tensor:
    """Which numbers of (N, C, ...) are within a share of the range of theirs of C, or are the same but for rounding."""
    others = [dimension for dimension in range(simulated.dim()) if dimension != 1 or len(simulated) == 1]
    reach = simulated.amax(others, keepdim=True) - simulated.amin(others, keepdim=True)
    return (deployed - simulated).abs() <= _ALIKE * reach + _ROUNDING * simulated.abs()


def _of_classes(outputs: Tensor, labels: Tensor) -> bool:
    """Whether outputs are scores of classes that labels number; else they are what labels are: numbers, images."""
    several = outputs.dim() > 1 and outputs.shape[class_axis(outputs, labels)] > 1
    return several and not labels.is_floating_point() and outputs.shape[1:] != labels.shape[1:]
