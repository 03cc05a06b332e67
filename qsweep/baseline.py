"""The uncompressed model, and how trained weights are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qsweep.checkpoints import resumable
from qsweep.store import Store
from qsweep.tasks.base import Task, TaskConfig
from qsweep.train import fit, seeded, set_mode
from qsweep.weights import check_finite


def kept(model: nn.Module, store: Store, key: str, compute: Callable[[Path], None]) -> nn.Module:
    """`model`, in eval mode, with the weights that `compute(checkpoint)` gives it in place; computed once a key.

    `checkpoint` is a file for `fit`.
    """
    from safetensors.torch import load_model, save_model

    _own_memory(model)

    def fill(folder: Path) -> None:
        with resumable(folder) as checkpoints:
            compute(checkpoints / "epoch.pt")
        save_model(model, str(folder / "weights.safetensors"))

    load_model(model, store.folder(key, fill) / "weights.safetensors")
    set_mode(model, training=False)
    return model


def _own_memory(model: nn.Module) -> None:
    """Let no tensor be a part of a larger one, as `torch.hann_window` gives it: such are not stored."""
    for value in (*model.parameters(), *model.buffers()):
        if value.untyped_storage().nbytes() != value.numel() * value.element_size():
            value.data = value.data.clone(memory_format=torch.contiguous_format)


def weights_hash(model: nn.Module) -> str:
    """SHA-256, in hex, of the parameters and buffers of `model`, with their names, types and shapes."""
    found = hashlib.sha256()
    held = {**model.state_dict(), **dict(model.named_buffers(remove_duplicate=False))}  # those too that are not stored
    for name, value in sorted(held.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


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
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """The uncompressed model in eval mode: the task's own if pretrained, else trained once and kept in `store`."""
    with seeded(seed, torch.device("cpu")):
        model = task.model()
    if config.pretrained:
        set_mode(model, training=False)
        check_finite(model)
        return model

    def compute(checkpoint: Path) -> None:
        fit(model, task, config.training, seed=seed, checkpoint=checkpoint, progress=progress)

    return kept(model, store, baseline_key(config, root, seed), compute)
