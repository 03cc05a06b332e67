"""A job whose device breaks while it runs, once or always."""

from __future__ import annotations

from pathlib import Path

import torch

from qsweep import jobs


def build(folder: Path) -> None:
    """Breaks at its first attempt."""
    attempt = (folder / "attempts").read_text() if (folder / "attempts").exists() else ""
    (folder / "attempts").write_text(attempt + "x")

    def run(job: jobs.Job) -> jobs.Result:
        if not attempt:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return {"metrics": {}, "seconds": {}}

    jobs._write(folder, "build", run)


def measure(folder: Path) -> None:
    """Breaks whenever it runs, as Triton says it."""

    def run(job: jobs.Job) -> jobs.Result:
        raise RuntimeError("Triton Error [CUDA]: misaligned address")

    jobs._write(folder, "measure", run)
