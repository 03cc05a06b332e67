"""What makes the figures of a task doubtful though nothing of it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import get_args

import torch
from torch import Tensor

from qsweep.tasks.base import ACCURACY, SplitName, Task, TaskMetric

FEW = 100
"""Samples: of fewer each is more than a percentage point."""
SOME = 0.01
"""Share of a split that may be in another without a word: most data have a few copies."""


def doubts(task: Task, judged_by: TaskMetric = ACCURACY) -> Iterator[str]:
    """A sentence for each split that judges with few samples, and for each two that have samples in common."""
    known: dict[SplitName, list[int]] = {split: _hashes(task.samples(split).inputs) for split in get_args(SplitName)}
    for split in ("validation", "test"):
        if (count := len(known[split])) < FEW:
            each = f": each is {100 / count:.2g} percentage points of the accuracy" if judged_by.share else ""
            yield f"`{split}` has {count} samples{each}"
    for one, other in combinations(known, 2):
        there = set(known[one])
        twice = sum(each in there for each in known[other])
        if twice > SOME * len(known[other]):
            yield f"{twice} of the {len(known[other])} samples of `{other}` are in `{one}`, too"


def _hashes(inputs: Tensor) -> list[int]:
    """One of each sample."""
    rows = inputs.reshape(len(inputs), -1).contiguous().view(torch.uint8)  # NumPy has no bfloat16
    return [hash(row.tobytes()) for row in rows.numpy()]
