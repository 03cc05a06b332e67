"""The batches of a training and the sum of its losses, on the device that trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from qsweep.errors import DataError, NotFinite
from qsweep.evaluate import layout
from qsweep.tasks.base import Task, Training

_LOOK = 50
"""Steps between two looks at the loss on a GPU: each waits for all that the device has still to do."""
_AHEAD = 4
"""Steps that may be issued to a GPU before it has done them."""


class Batches:
    """The train split, shuffled anew and augmented each time one goes over it: (inputs, labels), batch by batch.

    On a GPU stored inputs are moved there once if they take at most half of its free memory, else batch by batch; a
    task that says `any_device` augments there, with random numbers of the device, any other on the CPU. Raises
    DataError with fewer than two samples.
    """

    def __init__(self, task: Task, training: Training, seed: int) -> None:
        self.inputs, self.labels = task.samples("train")
        self.count, self.size = len(self.inputs), training.batch_size
        if self.count < 2:
            raise DataError(f"the train split must have at least 2 samples (got {self.count})")
        self.task, self.device = task, torch.device(training.device)
        self.layout = layout(task.transform(self.inputs[:2]))
        self.shuffler = self.augmenter = torch.Generator().manual_seed(seed)
        self.there = self.device.type != "cpu" and bool(getattr(task, "any_device", False))
        if self.there:
            self.augmenter = torch.Generator(self.device).manual_seed(seed)
            if self.inputs.nbytes <= torch.cuda.mem_get_info(self.device)[0] // 2:
                self.inputs = self.inputs.to(self.device)
        self.labels = self.labels.to(self.device)

    def __len__(self) -> int:
        return len(parts(torch.arange(self.count), self.size))

    @property
    def full(self) -> int:
        """Samples of the first batch; that of all but the last ones."""
        return len(parts(torch.arange(self.count), self.size)[0])

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """What its order and augmentation are drawn from."""
        return (self.shuffler, self.augmenter) if self.there else (self.shuffler,)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.count, generator=self.shuffler)
        of_inputs, of_labels = (parts(order.to(stored.device), self.size) for stored in (self.inputs, self.labels))
        for which, whose in zip(of_inputs, of_labels, strict=True):
            yield self._given(self.inputs[which]), self.labels[whose]

    def _given(self, stored: Tensor) -> Tensor:
        if self.there:
            stored = self._moved(stored)
        return self._moved(self.task.transform(stored, self.augmenter)).to(memory_format=self.layout)

    def _moved(self, values: Tensor) -> Tensor:
        """On the device; from pinned memory the copy need not be waited for."""
        if values.device.type == self.device.type:
            return values
        return values.pin_memory().to(self.device, non_blocking=True)


def parts(order: Tensor, size: int) -> list[Tensor]:
    """`order` (N,) in parts of `size`; a single sample, on which batch norm cannot train, joins the part before it."""
    found = list(torch.split(order, size))
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [torch.cat(found[-2:])]
    return found


class Losses:
    """Sum of the losses of an epoch, kept on their device: each is looked at on the CPU, now and then one on a GPU.

    A sum that is not finite stays so, whatever is added.
    """

    def __init__(self, device: torch.device, look: int | None = None) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.samples, self.look = 0, look or (1 if device.type == "cpu" else _LOOK)
        self._ahead: deque[torch.cuda.Event] = deque()

    def add(self, value: Tensor, samples: int, step: int) -> None:
        """`value`: mean over `samples`, in step `step`, counted from 1. Raises NotFinite, up to `look` steps late."""
        self.total += value.detach().double() * samples
        self.samples += samples
        if self.total.is_cuda:
            self._keep_pace()
        if step % self.look == 0:
            self._check(f"in step {step}" if self.look == 1 else f"by step {step}")

    def mean(self) -> float:
        """Raises NotFinite where one of them was not."""
        self._check("by the end of the epoch")
        return self.total.item() / self.samples

    def _keep_pace(self) -> None:
        """Wait for a step some way back: a process that is paused stops issuing, and what is issued runs on beside who
        wants the device alone."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > _AHEAD:
            self._ahead.popleft().synchronize()

    def _check(self, when: str) -> None:
        if not torch.isfinite(self.total):
            raise NotFinite(f"the training loss must stay finite (got {self.total.item()} {when})")
