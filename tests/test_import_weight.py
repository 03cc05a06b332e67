from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "torchao",
    "optuna",
    "mlflow",
    "pandas",
    "plotly",
    "onnx",
    "onnxruntime",
    "sklearn",
    "numpy",
    "pyarrow",
}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", ["qsweep", "qsweep.cli.main", "qsweep.spec", "qsweep.schema", "qsweep.study.plan"])
def test_importing_is_light(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_help_needs_neither_pydantic_nor_anything_heavy() -> None:
    loaded = loaded_by("import sys\nfrom qsweep.cli.main import app\ntry: app(['--help'])\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"pydantic"})
