from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsweep.machine import bind, no_compiler
from qsweep.track import client

_cache = tempfile.TemporaryDirectory(prefix="qsweep-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
"""A user's sweeps, and other tests, have locks of their own."""
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
ON_GPU = os.environ.get("QSWEEP_GPU") == "1"
"""Whether the kernels' tests run on a GPU; else in Triton's interpreter, which must be chosen before its import."""
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish(session: pytest.Session) -> None:
    """What modules of tests have to begin long before their own turn; of files side by side each begins its own."""
    gc.freeze()  # what they import is never garbage: tracing and compiling are quicker without looking at it
    gc.set_threshold(700, 10, 100)  # nor is what tests import: all is looked at ten times less often
    if not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        for module in dict.fromkeys(getattr(item, "module", None) for item in session.items):
            if hasattr(module, "begin"):
                module.begin()


@pytest.fixture(scope="session")
def device() -> str:
    """Where tests of kernels have their tensors."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors on few cores: more threads only wait for each other. No import of torch for tests without it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    """A job that measures pins its process to some cores: here that is the one that all later tests run in."""
    yield
    if CORES is not None and os.sched_getaffinity(0) != CORES:
        bind(CORES)


@pytest.fixture(autouse=True)
def _one_new_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow takes a second for one, the same each time: it makes the first, the others are copies."""
    made, new = Path(_cache.name, "new.db"), client.make

    def make(database: Path) -> None:
        if not made.exists():
            new(made)
        shutil.copyfile(made, database)

    monkeypatch.setattr(client, "make", make)


@pytest.fixture
def data() -> Path:
    """The folder of real data and checkpoints; tests that want it skip without it."""
    folder = Path(os.environ.get("QSWEEP_DATA", ""))
    if not os.environ.get("QSWEEP_DATA") or not folder.is_dir():
        pytest.skip("QSWEEP_DATA names no folder")
    return folder


@pytest.fixture(scope="session")
def compiler() -> None:
    """For what is written in C: tests that want it skip where nothing compiles it."""
    if (lacking := no_compiler()) is not None:
        pytest.skip(lacking)


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The programs that PyTorch decomposes, tracing each once more; what replaces that is gone afterwards."""
    from torch.export import ExportedProgram

    own, programs = ExportedProgram.run_decompositions, []

    def counted(program: ExportedProgram, *arguments: Any) -> ExportedProgram:
        programs.append(program)
        return own(program, *arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    yield programs
    assert ExportedProgram.run_decompositions is counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Without a C++ compiler, what fails for want of one is skipped: it is not among what qsweep asks of a machine."""
    try:
        return (yield)
    except Exception as error:
        if no_compiler() is None or "compile" not in _chain(error):
            raise
        pytest.skip("needs a C++ compiler")


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__} {error}")
        error = error.__cause__ or error.__context__
    return " ".join(texts).lower()
