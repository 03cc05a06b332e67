"""The one training loop."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from qsweep.batches import Batches, Losses
from qsweep.checkpoints import Progress
from qsweep.devices import on_device
from qsweep.errors import TaskFailure
from qsweep.optimizers import OnDevice, optimizer_of
from qsweep.replay import Recorded, Step, own_stream
from qsweep.stage import Context
from qsweep.tasks.base import USUAL, Task, Training
from qsweep.weights import apply_masks, check_finite, masks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss(inputs, outputs, labels)`: scalar; `inputs` is the batch that the model was given, augmentation included."""


_NO_GRADIENT = (
    "the loss must depend on the model's parameters, some of which must have `requires_grad` (it has no gradient)"
)


def fit(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    seed: int,
    loss: Loss | None = None,
    keep_zeros: bool = False,
    checkpoint: Path | None = None,
    progress: Callable[[str], None] | None = None,
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Train `model` in place on the train split; leaves it on the CPU, in eval mode and contiguous layout.

    The same arguments give the same weights, bit for bit, on one machine with one number of threads. Takes eager models
    and graphs from `torch.export`, prepared ones too.

    `keep_zeros`: weights of convolutions and linears that are zero now stay zero. `checkpoint`: a file written after
    each epoch; if it is there already, training goes on from it, to the same bits. `settle()` is called after each
    optimizer step. On a GPU the steps of a graph are recorded once and replayed (`qsweep.replay`): `loss`, that of
    the task too, and `settle` must do the same for every batch. Raises NotFinite when the loss or a parameter is not
    finite, DataError with fewer than two training samples, TaskFailure when the model does not compile or the loss has
    no gradient.
    """
    if training.epochs == 0:
        return _settle(model)
    _train(model, task, training, seed, loss, keep_zeros, checkpoint, progress, settle)
    _settle(model)
    if training.device == "cuda":  # another worker, or what comes next in this one, may want what it has held
        gc.collect()  # the optimizer and what schedules its rate are a circle
        torch.cuda.empty_cache()
    check_finite(model)


def _train(
    model: nn.Module,
    task: Task,
    training: Training,
    seed: int,
    loss: Loss | None,
    keep_zeros: bool,
    checkpoint: Path | None,
    progress: Callable[[str], None] | None,
    settle: Callable[[], None],
) -> None:
    batches = Batches(task, training, seed)
    device, steps = batches.device, len(batches)
    _move(model, device)
    _lay_out(model, batches.layout)
    kept = masks(model) if keep_zeros else {}
    optimizer = optimizer_of(model, training)
    rate = _schedule(optimizer, training, training.epochs * steps)
    state = Progress(model, optimizer, rate, batches.generators)
    with (
        seeded(seed, device),
        _deterministic(device),
        own_stream(device),
        _runner(model, training, batches.full) as run,
    ):

        def issued(inputs: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                outputs = run(inputs).float()
            value = task.loss(outputs, labels) if loss is None else loss(inputs, outputs, labels)
            if not value.requires_grad:
                raise TaskFailure(_NO_GRADIENT)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            apply_masks(model, kept)
            settle()
            return value.detach()

        first = state.restore(checkpoint) if checkpoint else 0
        set_mode(model, training=True)
        step = _replayed(issued, model, optimizer, batches)
        if progress is not None:
            progress(f"epoch {first + 1}/{training.epochs}")
        for epoch in range(first, training.epochs):
            losses = Losses(device)
            for number, (inputs, labels) in enumerate(batches, epoch * steps + 1):
                losses.add(step(inputs, labels), len(labels), number)
                rate.step()
            mean = losses.mean()
            if checkpoint is not None:
                state.save(checkpoint, epoch + 1)
            if progress is not None:
                progress(f"epoch {epoch + 1}/{training.epochs}, loss {mean:.4f}")
    optimizer.zero_grad()


class FineTuning(Protocol):
    """What a stage says about the training it does."""

    @property
    def epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float | None: ...


def fine_tune(
    model: nn.Module, stage: FineTuning, context: Context, settings: dict[str, Any] | None = None, **options: Any
) -> None:
    """`fit` on the task of `context` as `stage` says, zeros kept.

    `settings`: fields of `Training` that go before those of the stage and of the task; `options`: those of `fit`.
    """
    rate = USUAL[context.training.optimizer].fine_tuning if stage.learning_rate is None else stage.learning_rate
    own = {"epochs": stage.epochs, "learning_rate": rate}
    training = context.training.model_copy(update=own | (settings or {}))
    given: dict[str, Any] = {"keep_zeros": True, "progress": context.progress}
    fit(model, context.task, training, seed=context.seed, **given | options)


def _move(model: nn.Module, device: torch.device) -> None:
    if isinstance(model, fx.GraphModule):
        on_device(model, device)
    else:
        model.to(device)


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """What has four dimensions; PyTorch has other layouts for five, which `model.to` would want this one for, too."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)


def _settle(model: nn.Module) -> None:
    """Eval mode and contiguous layout: a later stage picks its kernels, and so its last bits, by the strides."""
    _move(model, torch.device("cpu"))
    set_mode(model, training=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _replayed(issued: Step, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> Step:
    """Graphs branch on nothing that changes from batch to batch; a module may, on the CPU where nobody sees it."""
    if isinstance(optimizer, OnDevice) and isinstance(model, fx.GraphModule):
        return Recorded(issued, batches.full, optimizer.renew)
    return issued


def _schedule(optimizer: torch.optim.Optimizer, training: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """One step more than there are, so that the last one moves weights."""
    if training.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 1)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.rate, total_steps=steps + 1, cycle_momentum=False
    )


@contextmanager
def _runner(model: nn.Module, training: Training, full: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """What is called in training: `model`, or what `torch.compile` makes of it for batches of `full` samples.

    A smaller batch at the end of an epoch runs in the model itself: it would be compiled for shapes of its own.
    """
    if not training.compile:
        yield model
        return
    from torch._dynamo.exc import TorchDynamoException

    # Without `deterministic` the compiler measures which of its reductions is quicker, and takes another one next time.
    options: dict[str, Any] = {"deterministic": True, "eager_numerics.division_rounding": True}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    try:
        yield lambda inputs: compiled(inputs) if len(inputs) == full else model(inputs)
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:400]
        raise TaskFailure(
            f"`task.training.compile`: must be false for a model that `torch.compile` cannot take ({reason})"
        ) from error
    finally:
        torch.compiler.reset()  # what it has compiled keeps the model and its memory


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU: ops that give the same bits each time, where there are such; PyTorch warns where there are none."""
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    were = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    times, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # it would choose by the clock
    settings: Any = torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False  # a pass over new tensors
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(were[0], warn_only=were[1])
        torch.backends.cudnn.benchmark = times


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own random numbers (initial weights, dropout) begin at `seed`; they are put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def set_mode(model: nn.Module, training: bool) -> None:
    nn.Module.train(model, training)  # unbound: graphs from `torch.export` refuse `model.train()`
