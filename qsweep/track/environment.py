"""Where a sweep ran, as the parent run shows it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from qsweep.machine import cpu

_PACKAGES = (
    "qsweep",
    "torch",
    "optuna",
    "mlflow",
    "onnx",
    "onnxruntime",
    "openvino",
    "executorch",
    "ai-edge-litert",
    "numpy",
)


def environment(root: Path) -> dict[str, str]:
    """Machine, system, versions of what decides on numbers, and the commit of the folder of the spec."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.node(),
        "cpu": cpu(),
        "cores": str(os.cpu_count()),
        "git_commit": git_commit(root),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def git_commit(folder: Path) -> str:
    """The commit checked out in `folder`, with `-dirty` behind it where files differ; empty outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
