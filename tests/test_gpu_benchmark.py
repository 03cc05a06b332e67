"""`benchmarks/gpu.py` where nothing but PyTorch, Triton and numpy is installed: all that a CPU can run of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BARE = '''
import runpy, sys
from importlib.machinery import PathFinder
ABSENT = set("""pydantic pydantic_core safetensors optuna mlflow sklearn pandas pyarrow onnx onnxruntime onnxscript yaml
    typer rich zstandard scipy torchao PIL pytest hypothesis""".split())
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)
sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
'''


def run(out: Path, *options: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What it prints and its rows, on one thread, in an empty folder, without what a bare image lacks."""
    command = [sys.executable, "-c", BARE, str(BENCHMARKS / "gpu.py"), "--out", str(out), *options]
    hidden = {"QSWEEP_DATA", "PYTHONPATH", "TRITON_INTERPRET"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, {row["row"]: row for row in json.loads((out / "gpu.json").read_text())}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_asked

    return [row.row for row in gpu_asked.rows()]


def test_all_parts_run_in_a_bare_installation_and_integers_equal_the_reference(
    tmp_path: Path, asked: list[str]
) -> None:
    printed, rows = run(tmp_path, "--device", "cpu", "--tiny")
    assert list(rows) == asked
    assert not [row for row in rows.values() if re.search("failed|WRONG|out of time", row["measured"])], printed
    equal = [row for name, row in rows.items() if name.startswith("equality")]
    assert len(equal) == 5
    assert all(row["met"] is True for row in equal)
    assert rows[asked[0]]["measured"] == "11 of 11"
    left_out = {name for name, row in rows.items() if row["measured"] == "not measured"}
    assert all(re.search(r"batch (1|8|32|256|512)$", name) for name in left_out)
    assert not left_out & {"ResNet-50, batch 1", "ViT-S, batch 128"}
    assert "pydantic" in rows["digits sweep, `engine: cuda`"]["measured"]
    assert "prepared: ResNet-50, batch 128, fp16 compiled: " in printed
    assert "not tried" not in "".join(row["measured"] for row in rows.values())
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n| ") == len(rows) + 1
    assert "Tiny sizes, interpreted: no figures." in text

    shape, network = "convolution 64 to 64, 3x3, 56², batch 32", "ResNet-18, batch 128"
    lost = [row | {"measured": "not measured", "met": None} if name == shape else row for name, row in rows.items()]
    failed = [row | {"measured": "failed: ValueError", "met": False} if row["row"] == network else row for row in lost]
    (tmp_path / "gpu.json").write_text(json.dumps(failed))
    printed, again = run(tmp_path, "--device", "cpu", "--tiny", "--missing", "--parts", "convolutions", "networks")
    lines = [line for line in printed.splitlines() if "asked:" in line and ": not measured" not in line]
    told = {name for name in rows if any(f" {name}: " in line for line in lines)}
    assert told - {name for name in rows if "geometric mean" in name or name.startswith("all ")} == {shape, network}
    assert again[network]["met"] is True


def test_without_time_every_row_says_so(tmp_path: Path, asked: list[str]) -> None:
    _, rows = run(tmp_path, "--device", "cpu", "--tiny", "--budget", "0")
    measured = {row["measured"] for name, row in rows.items() if "sweep" not in name and "memory" not in name}
    assert measured == {"not measured (out of time)", "not measured"}
    assert rows[asked[0]]["measured"] == "not measured (out of time)"


def test_without_a_gpu_every_row_says_that_it_is_not_measured_and_known_figures_stay(
    tmp_path: Path, asked: list[str]
) -> None:
    printed, rows = run(tmp_path)
    assert printed.startswith("nothing is measured here: ")
    assert list(rows) == asked
    assert all(row["measured"] == "not measured" and row["met"] is None for row in rows.values())
    first = asked[0]
    known = [rows[first] | {"measured": "11 of 11", "met": True}]
    (tmp_path / "gpu.json").write_text(json.dumps(known))
    assert list(run(tmp_path)[1].values()) == known


def test_a_part_that_no_longer_fits_or_fails_says_so_in_its_rows_and_leaves_those_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_clock import Bench
    from gpu_rows import OUT_OF_TIME, Row, Rows, read

    names = ["first", "second", "third"]
    rows = Rows([Row(name, "shown") for name in names], tmp_path, "# Heading", "about")
    bench = Bench(torch.device("cpu"), tiny=False, budget=3600)
    with rows.guard(names[:2]):
        bench.need(1)
        rows.add("first", "1 ms", True)
        raise ValueError("a | b\nmore")
    with rows.guard("third"):
        bench.need(7200)
        rows.add("third", "never", True)
    found = {row["row"]: (row["measured"], row["met"]) for row in json.loads((tmp_path / "gpu.json").read_text())}
    assert found == {
        "first": ("1 ms", True),
        "second": ("failed: ValueError: a / b", False),
        "third": (OUT_OF_TIME, None),
    }
    assert [row.row for row in read(tmp_path).rows] == ["first", "second"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's exporter
@pytest.mark.parametrize("name", ["ResNet-50", "ResNet-18"])
def test_fused_baselines_compute_what_the_network_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_fused
    from gpu_models import build, folded

    def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, *window: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *window).relu()

    def conv_add_relu(x: Tensor, weight: Tensor, other: Tensor, bias: Tensor, *window: Any) -> Tensor:
        return (F.conv2d(x, weight, bias, *window) + other).relu()

    monkeypatch.setattr(gpu_fused, "conv_relu", conv_relu)  # cuDNN's are a GPU's
    monkeypatch.setattr(gpu_fused, "conv_add_relu", conv_add_relu)
    model, side = build(name, tiny=True)
    graph = folded(model, 3, side, side).graph
    joined = gpu_fused.fused(graph)
    inputs = torch.randn(3, 3, side, side)
    torch.testing.assert_close(joined(inputs), graph(inputs))
    blocks = 2
    convolutions = sum("conv2d" in str(node.target) for node in graph.graph.nodes)
    counts = [sum(node.target is kernel for node in joined.graph.nodes) for kernel in (conv_relu, conv_add_relu)]
    left = sum("conv2d" in str(node.target) for node in joined.graph.nodes)
    assert counts[1] == blocks
    assert sum(counts) + left == convolutions
    assert not any("relu" in str(node.target) and "aten" in str(node.target) for node in joined.graph.nodes)


def test_figures_of_another_machine_are_kept_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_rows import Row, Rows, read

    asked = [Row(name, "shown") for name in ("first", "second", "third")]

    def run(about: str, **measured: str) -> list[str]:
        rows = Rows(asked, tmp_path, "# Heading", about, read(tmp_path))
        for name, text in measured.items():
            rows.add(name, text, True)
        return [row.measured for row in rows.rows.values()]

    assert run("2026-01-01, one", first="1 ms") == ["1 ms", "not measured", "not measured"]
    assert run("2026-01-02, one", second="2 ms") == ["1 ms", "2 ms", "not measured"]
    assert run("2026-01-03, two", third="3 ms") == ["1 ms¹", "2 ms¹", "3 ms"]
    assert run("2026-01-04, three", second="4 ms") == ["1 ms¹", "4 ms", "3 ms²"]
    text = (tmp_path / "gpu.md").read_text()
    for line in ("2026-01-04, three", "¹ 2026-01-02, one", "² 2026-01-03, two"):
        assert f"\n{line}\n" in text
    assert run("2026-01-05, three", first="5 ms") == ["5 ms", "4 ms", "3 ms²"]
    assert "¹" not in (tmp_path / "gpu.md").read_text()
    changed = Rows(
        [Row("first", "asked otherwise")], tmp_path, "# Heading", "2026-01-05, three", read(tmp_path), settle=True
    )
    assert changed.rows["first"].measured == "not measured"


def test_the_committed_rows_are_those_that_are_asked_now(asked: list[str]) -> None:
    committed = json.loads((BENCHMARKS / "gpu.json").read_text())
    assert [row["row"] for row in committed] == asked
    assert all(set(row) == {"row", "asked", "measured", "met"} for row in committed)
