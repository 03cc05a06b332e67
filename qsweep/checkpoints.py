"""What a training writes after each epoch, so that one that was killed goes on from there to the same bits."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qsweep.errors import QsweepError


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


@dataclass(frozen=True)
class Progress:
    """All that a training changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    generators: tuple[torch.Generator, ...]
    """Those that are its own; torch's global ones are kept too."""

    def save(self, path: Path, epochs: int) -> None:
        """Write it to `path`, which appears whole or not at all; `epochs` are done."""
        state = {
            "epochs": epochs,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def restore(self, path: Path) -> int:
        """Put back what `save` wrote; returns the epochs done, 0 if there is no file or only part of one."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            generators = state["generators"]
        except (FileNotFoundError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError):
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        for generator, kept in zip(self.generators, generators, strict=True):
            generator.set_state(kept)
        torch.set_rng_state(state["random"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        return int(state["epochs"])
