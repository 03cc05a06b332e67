"""The one training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qsweep.checkpoints import Progress
from qsweep.errors import DataError, NotFinite
from qsweep.evaluate import layout
from qsweep.stage import Context
from qsweep.tasks.base import Task, Training
from qsweep.weights import apply_masks, check_finite, masks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss(inputs, outputs, labels)`: scalar; `inputs` is the batch that the model was given, augmentation included."""


def fit(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    seed: int,
    device: torch.device,
    loss: Loss | None = None,
    keep_zeros: bool = False,
    checkpoint: Path | None = None,
    progress: Callable[[str], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place on the train split; leaves it on `device`, in eval mode and contiguous layout.

    SGD with Nesterov momentum; weight decay on parameters of two dimensions and more. The same arguments give the same
    weights, bit for bit, on one machine with one number of threads. Takes eager models and graphs from `torch.export`,
    prepared ones too.

    `keep_zeros`: weights of convolutions and linears that are zero now stay zero. `checkpoint`: a file written after
    each epoch; if it is there already, training goes on from it, to the same bits. `after_step(step)` is called after
    each optimizer step with the number of steps done, counted from 1. Raises NotFinite when the loss or a parameter is
    not finite, DataError with fewer than two training samples.
    """
    model.to(device)
    if training.epochs == 0:
        return _settle(model)
    samples = task.samples("train")
    count = len(samples.inputs)
    if count < 2:
        raise DataError(f"the train split must have at least 2 samples (got {count})")
    kept = masks(model) if keep_zeros else {}
    form = layout(task.transform(samples.inputs[:2]))
    model.to(memory_format=form)  # type: ignore[call-overload]
    steps = len(_batches(torch.arange(count), training.batch_size))
    optimizer = _optimizer(model, training)
    rate = _schedule(optimizer, training, training.epochs * steps)
    with seeded(seed, device) as generator:
        state = Progress(model, optimizer, rate, (generator,))
        first = state.restore(checkpoint) if checkpoint else 0
        set_mode(model, training=True)
        for epoch in range(first, training.epochs):
            step, total = epoch * steps, 0.0
            for indices in _batches(torch.randperm(count, generator=generator), training.batch_size):
                inputs = task.transform(samples.inputs[indices], generator).to(device, memory_format=form)
                labels = samples.labels[indices].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                    outputs = model(inputs).float()
                value = task.loss(outputs, labels) if loss is None else loss(inputs, outputs, labels)
                if not torch.isfinite(value):
                    raise NotFinite(f"the training loss must stay finite (got {value.item()} in step {step + 1})")
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                rate.step()
                apply_masks(model, kept)
                total += value.item() * len(indices)
                step += 1
                if after_step is not None:
                    after_step(step)
            if checkpoint is not None:
                state.save(checkpoint, epoch + 1)
            if progress is not None:
                progress(f"epoch {epoch + 1}/{training.epochs}, loss {total / count:.4f}")
    optimizer.zero_grad()
    _settle(model)
    check_finite(model)


class FineTuning(Protocol):
    """What a stage says about the training it does."""

    @property
    def epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


def fine_tune(
    model: nn.Module, stage: FineTuning, context: Context, settings: dict[str, Any] | None = None, **options: Any
) -> None:
    """`fit` on the task of `context` as `stage` says, zeros kept.

    `settings`: fields of `Training` that go before those of the stage and of the task; `options`: those of `fit`.
    """
    own = {"epochs": stage.epochs, "learning_rate": stage.learning_rate}
    training = context.training.model_copy(update=own | (settings or {}))
    given: dict[str, Any] = {"keep_zeros": True, "progress": context.progress}
    fit(model, context.task, training, seed=context.seed, device=context.device, **given | options)


def _settle(model: nn.Module) -> None:
    """Eval mode and contiguous layout: a later stage picks its kernels, and so its last bits, by the strides."""
    set_mode(model, training=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """`order` (N,) in parts of `size`; a single sample, on which batch norm cannot train, joins the part before it."""
    parts = list(torch.split(order, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    momentum = training.momentum
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _schedule(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """One step more than there are, so that the last one moves weights."""
    if training.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 1)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=steps + 1, cycle_momentum=False
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for shuffling and augmentation; torch's own (dropout's) is seeded too, and put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def set_mode(model: nn.Module, training: bool) -> None:
    nn.Module.train(model, training)  # unbound: graphs from `torch.export` refuse `model.train()`
