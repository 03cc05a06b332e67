from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


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
