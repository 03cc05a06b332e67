"""What Triton makes of the kernels for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton cannot be installed here")

from generated_code import CASES

PRODUCTS = {"convolve", "multiply_rows", "multiply_w4"}
"""Kernels that must multiply integers on the matrix units."""
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes that one block may have (CUDA C++ programming guide, compute capabilities)."""


_folder: TemporaryDirectory[str] | None = None
_process: subprocess.Popen[bytes] | None = None


def begin() -> None:
    """Compile every kernel, in a process without the interpreter: a minute, beside the tests before these."""
    global _folder, _process
    _folder = TemporaryDirectory()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = _folder.name
    script = Path(__file__).with_name("generated_code.py")
    command = [sys.executable, str(script), *map(str, SHARED_MEMORY)]
    with (Path(_folder.name) / "facts").open("w") as facts, (Path(_folder.name) / "errors").open("w") as errors:
        _process = subprocess.Popen(command, env=environment, stdout=facts, stderr=errors)


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[dict[str, Any]]]:
    """Facts about every kernel."""
    if _process is None:
        begin()
    assert _process is not None
    assert _folder is not None
    with _folder:
        assert _process.wait() == 0, (Path(_folder.name) / "errors").read_text()
        yield [json.loads(line) for line in (Path(_folder.name) / "facts").read_text().splitlines()]


@pytest.fixture(params=SHARED_MEMORY)
def capability(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def kernels(compiled: list[dict[str, Any]], capability: int) -> list[dict[str, Any]]:
    return [kernel for kernel in compiled if kernel["capability"] == capability]


def test_every_case_compiles_through_the_specialization_of_its_arguments(kernels: list[dict[str, Any]]) -> None:
    assert {kernel["case"] for kernel in kernels} == set(CASES)


def test_products_run_on_integer_matrix_units(kernels: list[dict[str, Any]], capability: int) -> None:
    found = [kernel for kernel in kernels if kernel["kernel"] in PRODUCTS]
    assert {kernel["kernel"] for kernel in found} == PRODUCTS
    for kernel in found:
        assert kernel["matrix"], kernel["case"]
        assert all("s32.s8.s8" in name for name in kernel["matrix"]), kernel["case"]
        # blocks of at least 64 rows use the warp-group instruction of sm_90, others that of sm_80
        few = kernel["kernel"] == "multiply_w4" or kernel["case"].startswith("few-rows")
        wide = capability == 90 and not few
        assert all(name.startswith("wgmma" if wide else "mma.sync") for name in kernel["matrix"]), kernel["case"]


def test_no_product_and_sum_are_fused(kernels: list[dict[str, Any]]) -> None:
    """Division is made of fused steps by design; rows and scales have one, and layer norms, which are not exact."""
    for kernel in kernels:
        if kernel["case"].startswith("fake"):  # each has one division, of the scale, and 16 elements a thread
            products = {"round_to_grid": 2, "step_backward": 3, "clip_backward": 3}[kernel["kernel"]]
            assert kernel["operations"]["FMUL"] == 16 * products, kernel["case"]
        elif kernel["kernel"] not in ("quantize_each_row", "normalize_rows"):
            assert not kernel["operations"].get("FFMA"), kernel["case"]
    residual = next(kernel for kernel in kernels if kernel["case"] == "conv-residual")
    each = 128 * 128 // 256  # results of a thread; three products, and two roundings and one sum, of each
    assert residual["operations"]["FMUL"] == 3 * each
    assert residual["operations"]["FADD"] == 3 * each


def test_tables_are_looked_up_in_shared_memory(kernels: list[dict[str, Any]]) -> None:
    """From global memory each of 128 results of a thread would take five instructions to its address."""
    (found,) = (kernel for kernel in kernels if kernel["case"] == "linear-table")
    assert found["operations"]["LDG"] < 16


LARGEST = "conv-tuned-128x128x128x4x3"
ROWS = "linear-rows-tuned-128x128x64x4x3"
SPILLED = {(80, LARGEST): 24, (90, LARGEST): 66, (120, LARGEST): 22, (80, ROWS): 1}
"""Words that a thread stores, or loads again: 128 results a thread and the sum of a residual behind a 3 x 3 leave no
registers. Such a block is chosen for a layer only where it is the fastest all the same."""


def test_nothing_is_spilled_but_in_the_largest_blocks_of_a_thread(
    kernels: list[dict[str, Any]], capability: int
) -> None:
    for kernel in kernels:
        most = SPILLED.get((capability, kernel["case"]), 0)
        assert all(kernel["operations"].get(name, 0) <= most for name in ("LDL", "STL")), kernel["case"]


def test_inputs_come_in_asynchronous_copies_of_16_bytes(kernels: list[dict[str, Any]]) -> None:
    for case in ("conv", "conv-residual", "conv-split", "linear", "linear-odd", "linear-rows", "linear-w4"):
        kernel = next(kernel for kernel in kernels if kernel["case"] == case and kernel["kernel"] in PRODUCTS)
        assert set(kernel["copies"]) == {"0x10"}, case
    narrow = next(kernel for kernel in kernels if kernel["case"] == "conv-narrow")
    assert "0x10" in narrow["copies"]
    image = next(kernel for kernel in kernels if kernel["case"] == "conv-image")
    assert set(image["copies"]) == {"0x8", "0x10"}  # two pixels at a time, as the stride is two, and weights


def test_masked_loads_are_filled_with_nothing_but_zeros(kernels: list[dict[str, Any]]) -> None:
    """Of a narrow constant below 0 Triton fills every element of a word but the first with -1."""
    assert any(kernel["padding"] for kernel in kernels)
    assert all(set(kernel["padding"]) <= {"0x0"} for kernel in kernels)


def test_denormals_are_not_flushed(kernels: list[dict[str, Any]]) -> None:
    assert not any(kernel["flushes_denormals"] for kernel in kernels)


def test_blocks_fit_shared_memory(kernels: list[dict[str, Any]], capability: int) -> None:
    assert all(kernel["shared"] <= SHARED_MEMORY[capability] for kernel in kernels)
