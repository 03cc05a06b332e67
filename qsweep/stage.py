"""What every compression stage shares: the context it works in and the shape of its config."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Self

from qsweep.config import Config
from qsweep.store import Store

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from qsweep.tasks.base import Task, Training


def own_teacher(task: Task) -> Callable[[], nn.Module] | None:
    """The `teacher` of a task that has one."""
    return getattr(task, "teacher", None)


@dataclass(frozen=True)
class Context:
    """What a stage may use beside its own config and the model it is given."""

    task: Task
    """Model, data, loss and score."""
    store: Store
    """Results of stages by content, shared by all trials."""
    key: str
    """Identity of the model the stage is given: its key in `store`."""
    seed: int
    original: Callable[[], nn.Module]
    """The uncompressed model, in eval mode."""
    training: Training
    """How every training is done; a stage brings its own epochs and learning rate."""
    progress: Callable[[str], None] = lambda text: None
    """Takes a short line of what is going on, for the person who watches."""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """`loss(inputs, outputs, labels)` of the trainings of this trial; None means the task's own."""

    def teacher(self) -> nn.Module:
        """What distillation follows, in eval mode: the task's own teacher, else the uncompressed model."""
        return (own_teacher(self.task) or self.original)()

    @property
    def device(self) -> torch.device:
        """Where trainings run; outside of them models are on the CPU."""
        import torch

        return torch.device(self.training.device)


class Stage(Config, ABC):
    """A config that is also a step: fields, docstring, `apply`. One file each."""

    discriminator: ClassVar[str | None] = "method"
    seeded: ClassVar[bool] = True
    """Whether another seed may give another result."""
    method: str

    def label(self) -> str:
        """This stage's part of a trial's name, such as `prune50`."""
        return self.method

    def settled(self, context: Context) -> Self:
        """One stage for all that give the same result for the model of `context`, so that it is computed once."""
        return self

    def check(self, context: Context) -> None:
        """Raise what `apply` would, as far as the uncompressed model of `context` tells: stages before this one may
        train for hours."""


def stage_key(stage: Stage, context: Context) -> str:
    """Identity of what `stage.apply(model, context)` returns: its key in the store, `context.key` of the next stage.

    It hashes the stage's config and version, the key of the model it is given, the settings and the version of the
    training loop, seed, device and the version of torch.
    """
    parents = (context.key, context.training.uid(), context.seed, context.device.type)
    return Store.key(type(stage).__qualname__, stage.uid(), *parents, {"torch": metadata.version("torch")})
