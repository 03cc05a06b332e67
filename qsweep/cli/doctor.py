"""`qsweep doctor`: what this machine can do."""

from __future__ import annotations

import platform
from collections.abc import Iterator

from qsweep.machine import cores, cpu, features

LIBRARIES = ("torch", "onnx", "onnxruntime", "optuna", "mlflow", "pydantic", "numpy")


def doctor() -> None:
    """Say which engines work on this machine and why not, and what they have to work with."""
    from rich.table import Table
    from rich.text import Text

    from qsweep.cli.console import console

    drawn = Table(box=None, show_header=False, pad_edge=False)
    drawn.add_column(style="bold", no_wrap=True)
    for name, text in (*_engines(), *_machine(), *_versions()):
        drawn.add_row(name, Text(text, style="red" if text.startswith("no: ") else ""))
    console().print(drawn)


def _engines() -> Iterator[tuple[str, str]]:
    from qsweep.config import members
    from qsweep.engines import EngineConfig

    for cls in members(EngineConfig, "qsweep.engines"):  # type: ignore[type-abstract]
        engine = cls.model_validate({})
        reason = engine.available()
        yield f"engine {engine.engine}", "works" if reason is None else f"no: {reason}"


def _machine() -> Iterator[tuple[str, str]]:
    import os
    import shutil

    import torch

    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "cpu", f"{cpu()}, {cores()} of {os.cpu_count()} threads usable"
    yield "cpu features", ", ".join(features()) or "none that matters"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    yield "gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    yield "disk here", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free"
    yield "compiler", shutil.which("g++") or shutil.which("clang++") or "no: neither g++ nor clang++ on the PATH"
    yield "QSWEEP_DATA", os.environ.get("QSWEEP_DATA", "not set")


def _versions() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("qsweep", *LIBRARIES):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "no: not installed here"
