"""The one training loop, evaluation, and the baseline."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qsweep.errors import DataError, NotFinite, QsweepError, TaskFailure
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.tasks.base import SplitName, Task, TaskConfig, Training
from qsweep.weights import apply_masks, check_finite, masks

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`loss(inputs, outputs, labels)`: scalar; `inputs` is the batch that the model was given, augmentation included."""
Schedule = Literal["one_cycle", "cosine"]
Precision = Literal["fp32", "bf16"]


def fit(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    loss: Loss | None = None,
    keep_zeros: bool = False,
    schedule: Schedule = "one_cycle",
    weight_decay: float | None = None,
    precision: Precision = "fp32",
    checkpoint: Path | None = None,
    progress: Callable[[str], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place on the train split; leaves it on `device`, in eval mode and contiguous layout.

    SGD with Nesterov momentum under a one-cycle schedule with peak `learning_rate` (Smith 2018, arXiv:1803.09820), or
    half a cosine from there to 0 (Loshchilov & Hutter 2017); `weight_decay`, that of `training` if None, on parameters
    of two dimensions and more. The same arguments give the same weights, bit for bit, on one machine with one number of
    threads. Takes eager models and graphs from `torch.export`, prepared ones too.

    `keep_zeros`: weights of convolutions and linears that are zero now stay zero. `precision` bf16: the model runs
    under autocast; its parameters, the loss and the optimizer stay float32. `checkpoint`: a file written after each
    epoch; if it is there already, training goes on from it, to the same bits. `after_step(step)` is called after each
    optimizer step with the number of steps done, counted from 1. Raises NotFinite when the loss or a parameter is not
    finite, DataError with fewer than two training samples.
    """
    model.to(device)
    if epochs == 0:
        return _settle(model)
    samples = task.samples("train")
    count = len(samples.inputs)
    if count < 2:
        raise DataError(f"the train split must have at least 2 samples (got {count})")
    kept = masks(model) if keep_zeros else {}
    layout = _layout(task.transform(samples.inputs[:2]))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    steps = len(_batches(torch.arange(count), training.batch_size))
    decay = training.weight_decay if weight_decay is None else weight_decay
    optimizer = _optimizer(model, training.momentum, decay, learning_rate)
    rate = _schedule(optimizer, schedule, learning_rate, epochs * steps)
    with _seeded(seed, device) as generator:
        first = _restore(checkpoint, device, model, optimizer, rate, generator) if checkpoint else 0
        _set_mode(model, training=True)
        for epoch in range(first, epochs):
            step, total = epoch * steps, 0.0
            for indices in _batches(torch.randperm(count, generator=generator), training.batch_size):
                inputs = task.transform(samples.inputs[indices], generator).to(device, memory_format=layout)
                labels = samples.labels[indices].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
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
                _save(checkpoint, epoch + 1, model, optimizer, rate, generator)
            if progress is not None:
                progress(f"epoch {epoch + 1}/{epochs}, loss {total / count:.4f}")
    optimizer.zero_grad()
    _settle(model)
    check_finite(model)


class FineTuning(Protocol):
    """What a stage says about the training it does."""

    @property
    def epochs(self) -> int: ...

    @property
    def learning_rate(self) -> float: ...


def fine_tune(model: nn.Module, stage: FineTuning, context: Context, **options: Any) -> None:
    """`fit` on the task of `context` as `stage` says, zeros kept; `options`, those of `fit`, go before both."""
    settings: dict[str, Any] = {
        "epochs": stage.epochs,
        "learning_rate": stage.learning_rate,
        "seed": context.seed,
        "device": context.device,
        "keep_zeros": True,
        "progress": context.progress,
    }
    fit(model, context.task, context.training, **settings | options)


@contextmanager
def resumable(folder: Path) -> Iterator[Path]:
    """A folder for checkpoints, beside the `folder` that a store has still to finish.

    It outlives a training that is killed or runs out of memory, and is removed when one ends or fails for good.
    """
    checkpoints = folder.with_suffix(".checkpoints")
    checkpoints.mkdir(exist_ok=True)
    try:
        yield checkpoints
    except QsweepError:
        shutil.rmtree(checkpoints, ignore_errors=True)
        raise
    shutil.rmtree(checkpoints, ignore_errors=True)


def _save(
    path: Path,
    epochs: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> None:
    state = {
        "epochs": epochs,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rate": rate.state_dict(),
        "generator": generator.get_state(),
        "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _restore(
    path: Path,
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> int:
    """Put back what `_save` wrote; returns the epochs done, 0 if there is no file or only part of one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError):
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rate.load_state_dict(state["rate"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["random"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    return int(state["epochs"])


def _settle(model: nn.Module) -> None:
    """Eval mode and contiguous layout: a later stage picks its kernels, and so its last bits, by the strides."""
    _set_mode(model, training=False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """`order` (N,) in parts of `size`; a single sample, on which batch norm cannot train, joins the part before it."""
    parts = list(torch.split(order, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _layout(inputs: Tensor) -> torch.memory_format:
    return torch.channels_last if inputs.dim() == 4 else torch.contiguous_format


def _optimizer(model: nn.Module, momentum: float, decay: float, learning_rate: float) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0)


def _schedule(
    optimizer: torch.optim.Optimizer, schedule: Schedule, learning_rate: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """One step more than there are, so that the last one moves weights."""
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 1)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps + 1, cycle_momentum=False
    )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for shuffling and augmentation; torch's own (dropout's) is seeded too, and put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def _set_mode(model: nn.Module, training: bool) -> None:
    nn.Module.train(model, training)  # unbound: graphs from `torch.export` refuse `model.train()`


def predict(
    model: Callable[[Tensor], Tensor],
    task: Task,
    inputs: Tensor,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Outputs (N, ...) on the CPU of `model`, in eval mode, for `inputs` (N, ...) as the task stores them.

    Raises NotFinite when an output is not.
    """
    outputs = []
    with torch.no_grad(), _eval_mode(model):
        for part in torch.split(inputs, batch_size):
            batch = task.transform(part)
            outputs.append(model(batch.to(device, memory_format=_layout(batch))).cpu())
    joined = torch.cat(outputs)
    if not torch.isfinite(joined).all():
        raise NotFinite("the model's outputs must be finite (got NaN or infinity)")
    return joined


def evaluate(
    model: Callable[[Tensor], Tensor],
    task: Task,
    split: SplitName,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Tensor:
    """(N,) float32 scores in [0, 1] of `model` on `split`, one a sample; their mean is the accuracy."""
    inputs, labels = task.samples(split)
    return task.score(predict(model, task, inputs, batch_size, device), labels).float()


def check(task: Task, model: nn.Module, device: str | torch.device = "cpu") -> None:
    """Ask `task` for everything that a sweep will, on a few samples of each split, before anything is spent on it.

    Raises DataError and TaskFailure as the task's parts do, TaskFailure for a model that raises or whose output has
    another batch size, NotFinite for outputs or losses that are not.
    """
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    for split in splits:
        inputs, labels = (part[:4] for part in task.samples(split))
        shape = task.transform(inputs).shape
        augmented = task.transform(inputs, torch.Generator().manual_seed(0)).shape
        if augmented != shape:
            raise TaskFailure(f"`transform` must keep shape {tuple(shape)} when it augments (got {tuple(augmented)})")
        outputs = _outputs(model, task, inputs, device)
        if len(outputs) != len(inputs):
            raise TaskFailure(f"the model must give {len(inputs)} outputs for as many inputs (got {len(outputs)})")
        if not torch.isfinite(task.loss(outputs, labels)):
            raise NotFinite(f"the loss of the first samples of `{split}` must be finite")
        task.score(outputs, labels)


def _outputs(model: nn.Module, task: Task, inputs: Tensor, device: str | torch.device) -> Tensor:
    try:
        return predict(model, task, inputs, device=device)
    except (QsweepError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model may be the user's, and raises what it likes
        raise TaskFailure(f"the model raised {type(error).__name__}: {error}") from error


@contextmanager
def _eval_mode(model: object) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    were = [module.training for module in modules]  # one by one: a frozen batch norm stays frozen afterwards
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was


def kept(model: nn.Module, store: Store, key: str, compute: Callable[[Path], None]) -> nn.Module:
    """`model`, in eval mode, with the weights that `compute(checkpoint)` gives it in place; computed once a key.

    `checkpoint` is a file for `fit`.
    """
    from safetensors.torch import load_model, save_model

    def fill(folder: Path) -> None:
        with resumable(folder) as checkpoints:
            compute(checkpoints / "epoch.pt")
        save_model(model, str(folder / "weights.safetensors"))

    load_model(model, store.folder(key, fill) / "weights.safetensors")
    _set_mode(model, training=False)
    return model


def baseline_key(config: TaskConfig, root: Path, seed: int) -> str:
    """Identity of the uncompressed model: `context.key` of the first stage."""
    if config.pretrained:
        return Store.key("pretrained", config.fingerprint(root))
    return Store.key("trained", config.fingerprint(root), config.training.uid(), seed, torch.__version__)


def baseline(
    task: Task,
    config: TaskConfig,
    *,
    root: Path,
    store: Store,
    seed: int,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """The uncompressed model in eval mode: the task's own if pretrained, else trained once and kept in `store`."""
    with _seeded(seed, device):
        model = task.model().to(device)
    if config.pretrained:
        _set_mode(model, training=False)
        check_finite(model)
        return model
    training = config.training

    def compute(checkpoint: Path) -> None:
        fit(
            model,
            task,
            training,
            epochs=training.epochs,
            learning_rate=training.learning_rate,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
            progress=progress,
        )

    return kept(model, store, baseline_key(config, root, seed), compute)
