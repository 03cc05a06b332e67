from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_sweep import CONTENT

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


def test_validating_is_light_where_no_class_of_ones_own_is_to_be_imported(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(CONTENT, encoding="utf-8")
    code = f"from pathlib import Path\nfrom qsweep.cli.specs import validate\nvalidate(Path({str(spec)!r}))"
    assert not loaded_by(code) & HEAVY


def test_help_needs_neither_pydantic_nor_anything_heavy() -> None:
    loaded = loaded_by("import sys\nfrom qsweep.cli.main import app\ntry: app(['--help'])\nexcept SystemExit: pass")
    assert "typer" in loaded
    assert not loaded & (HEAVY | {"pydantic"})
