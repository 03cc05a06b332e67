from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ON_GPU = os.environ.get("QSWEEP_GPU") == "1"
"""Whether the kernels' tests run on a GPU; else in Triton's interpreter, which must be chosen before its import."""
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests of kernels have their tensors."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors on few cores: more threads only wait for each other. No import of torch for tests without it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture
def data() -> Path:
    """The folder of real data and checkpoints; tests that want it skip without it."""
    folder = Path(os.environ.get("QSWEEP_DATA", ""))
    if not os.environ.get("QSWEEP_DATA") or not folder.is_dir():
        pytest.skip("QSWEEP_DATA names no folder")
    return folder
