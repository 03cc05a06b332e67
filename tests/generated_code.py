"""Run the kernels' host functions against a driver that is none, and print what was compiled, one JSON line a kernel.

    python tests/generated_code.py 80 90      # for sm_80 and sm_90; Triton's own assembler and disassembler, no GPU

Goes through Triton's real specialization of arguments, which its interpreter does not have.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qsweep.cuda import conv, depthwise, fake_quantize, linear, norm, pointwise, pool, tune
from qsweep.cuda.arithmetic import Operand, Output, Requantize, Residual, Tile, Total
from qsweep.cuda.buffers import Value
from qsweep.cuda.layers import lines

ARCHITECTURES = {80: "SM80", 90: "SM90a", 120: "SM120a"}
DISASSEMBLER = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"


class Driver:
    """Says which architecture is there, as a device of its own, and nothing else."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def machine_code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its executable sections."""
    table, size, count = struct.unpack_from("<Q10xHH", cubin, 0x28)
    sections = [struct.unpack_from("<8xQ8xQQ", cubin, table + i * size) for i in range(count)]
    return b"".join(cubin[start : start + length] for flags, start, length in sections if flags & 4)


def operations(cubins: list[bytes], capability: int) -> list[Counter[str]]:
    """How often each instruction stands in each kernel. The disassembler takes longer to start than for all of them."""
    codes = [machine_code(cubin) for cubin in cubins]
    ends = list(itertools.accumulate(map(len, codes)))
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listing = [DISASSEMBLER, "--binary", ARCHITECTURES[capability], file.name]
        machine = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    found: list[Counter[str]] = [Counter() for _ in cubins]
    for place, name in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", machine):
        found[bisect_right(ends, int(place, 16))][name] += 1
    return found


def facts(kernel: Any) -> dict[str, Any]:
    """What the compiler made of a kernel, but for its instructions."""
    text = kernel.asm["ptx"]
    return {
        "matrix": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S+", text))),
        "copies": Counter(re.findall(r"cp\.async\.c\w\.shared\.global[^;]*?\], (0x\w+)", text)),
        "padding": sorted(set(re.findall(r"mov\.\w+ %\w+, (0x[0-9a-f]+);", text))),
        "flushes_denormals": ".ftz" in text,
        "shared": kernel.metadata.shared,
    }


def i8(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def numbers(columns: int, zero_point: int = 1, *, table: bool = False) -> Requantize:
    """A zero point of 1 is what Triton would make a constant of."""
    bias, multiplier = torch.zeros(columns, dtype=torch.int32), torch.zeros(columns)
    return Requantize(bias, multiplier, Output(zero_point), table=i8(256) if table else None)


def convolution(
    channels: int, columns: int, tile: Tile, *, size: int = 14, kernel: int = 3, halo: int = 1, residual: bool = False
) -> Callable[[], object]:
    def call() -> object:
        x, weight = i8(4, size + kernel - 1, size + kernel - 1, channels), i8(columns, channels, kernel, kernel)
        buffer = i8(4, size + 2 * halo, size + 2 * halo, columns)
        out = buffer[:, halo : halo + size, halo : halo + size]
        added = Residual(buffer.clone()[:, halo : halo + size, halo : halo + size], 1, 0.5, Output(1), 0.5)
        packed = conv.pack_weight(weight, 1, channels)
        return conv.conv2d(x, packed, numbers(columns), out, residual=added if residual else None, tile=tile)

    return call


def stem() -> object:
    x, weight = lines(i8(4, 230, 230, 4), i8(64, 3, 7, 7), 2, 112)
    packed = conv.pack_weight(weight, 1, x.shape[3])
    return conv.conv2d(x, packed, numbers(64), i8(4, 112, 112, 64), stride=(2, 1), tile=Tile(128, 64, 64))


def static(tile: Tile, *, count: int = 512, depth: int = 256, table: bool = False) -> Callable[[], object]:
    def call() -> object:
        x, weight, out = i8(count, depth), linear.pack_weight(i8(256, depth)), i8(count, 256)
        return linear.linear(x, weight, numbers(256, table=table), out, tile=tile)

    return call


def odd() -> object:
    """250 numbers a row, in a buffer with room for 256, as the chain makes them."""
    x, weight = Value(i8(512, 256)[:, :250]).rows(256), linear.pack_weight(i8(256, 250))
    return linear.linear(x, weight, numbers(256), i8(512, 256), tile=Tile(128, 128, 64, 4))


def rows(tile: Tile) -> Callable[[], object]:
    def call() -> object:
        scale, one, weight = torch.zeros(256), torch.zeros(128), linear.pack_weight(i8(128, 256))
        return linear.linear_rows(i8(256, 256), scale, weight, one, one, torch.zeros(256, 128), tile=tile)

    return call


def quantize_rows() -> object:
    return linear.quantize_rows(torch.zeros(256, 250), i8(256, 256), torch.zeros(256))


def four_bits(tile: Tile) -> Callable[[], object]:
    def call() -> object:
        weight = linear.pack_weight4(i8(128, 2048))
        return linear.linear_w4(i8(16, 2048), weight, numbers(128), i8(16, 128), tile=tile)

    return call


def separable(kernel: int, tile: Tile | None = None) -> Callable[[], object]:
    def call() -> object:
        weight = depthwise.pack_weight(i8(128, 1, kernel, kernel), 128)
        x = i8(4, 13 + kernel, 13 + kernel, 128)
        return depthwise.conv2d(x, weight, numbers(128), i8(4, 14, 14, 128), groups=128, tile=tile)

    return call


def quantize() -> object:
    x, invalid = torch.zeros(2, 3, 32, 32).permute(0, 2, 3, 1), torch.zeros(1, dtype=torch.int32)
    return pointwise.quantize(x, 0.1, Output(1), i8(2, 32, 32, 4)[..., :3], invalid=invalid)


def quantize_images() -> object:
    x, buffer, invalid = torch.zeros(2, 3, 32, 32), i8(2, 38, 38, 4), torch.zeros(1, dtype=torch.int32)
    return pointwise.quantize_images(x, 0.1, Output(1), buffer[:, 3:35, 3:35], invalid=invalid)


def add() -> object:
    side = Operand(i8(4, 14, 14, 64), 1, 0.5)
    return pointwise.add(side, side, Output(1), i8(4, 14, 14, 64))


def multiply() -> object:
    image, gate = i8(4, 14, 14, 64), i8(4, 1, 1, 64).expand(4, 14, 14, 64)
    return pointwise.multiply(image, 1, gate, 1, 0.5, Output(1), i8(4, 14, 14, 64))


def repeat() -> object:
    return pointwise.repeat(i8(4, 14, 14, 64), i8(4, 28, 28, 64))


def average() -> object:
    return pool.global_avg_pool(i8(4, 7, 7, 64), 1, 0.5, Output(1), i8(4, 64))


def largest() -> object:
    return pool.max_pool2d(i8(4, 28, 28, 64), i8(4, 14, 14, 64), kernel=(3, 3), stride=(2, 2), padding=(1, 1))


def largest_of_all() -> object:
    return pool.global_max_pool(i8(4, 56, 56, 64), i8(4, 64))


def normalize() -> object:
    side, one, out = Operand(i8(8192, 384), 1, 0.5), torch.ones(384), i8(8192, 384)
    invalid, total = torch.zeros(1, dtype=torch.int32), Total(0.7, 0.3, Output(1), i8(8192, 384))
    return norm.layer_norm((side, side), one, one, 1e-5, Output(1), out, invalid, total=total)


def fake(dtype: torch.dtype, *, rows: int = 1, moving: bool = False) -> Callable[[], object]:
    """Fake quantization forward and back, of activations or of weights with a scale a row."""

    def call() -> object:
        values = torch.zeros(rows, 2**20 // rows, dtype=dtype)
        scale = torch.ones(rows, 1) if rows > 1 else torch.ones(())
        bottom = torch.zeros_like(scale) if moving else 0.0
        fake_quantize.on_grid(values, scale, bottom, 15)
        fake_quantize.step_backward(values, values, scale, bottom, 15, (0.0, 0.0), sums=True, offset=moving)
        return rows > 1 or fake_quantize.clip_backward(values, values, scale, scale, sums=True)

    return call


TUNED = {"x".join(map(str, shape)): Tile(*shape) for shape in (*tune.SHAPES, *tune.FEW)}
NARROW = {"x".join(map(str, shape)): Tile(16, *shape[1:]) for shape in tune.NARROW}
CASES: dict[str, Callable[[], object]] = {
    "conv": convolution(128, 128, Tile(128, 128, 64, 8)),
    "conv-residual": convolution(128, 128, Tile(128, 128, 128, 8), residual=True),
    **{f"conv-tuned-{name}": convolution(128, 128, tile, residual=True) for name, tile in TUNED.items()},
    **{f"linear-rows-tuned-{name}": rows(tile) for name, tile in TUNED.items()},
    "conv-narrow": convolution(16, 16, Tile(128, 16, 64)),
    "conv-image": stem,
    "conv-split": convolution(64, 64, Tile(64, 64, 64, split=4), residual=True),
    "linear": static(Tile(128, 256, 128, 8)),
    "linear-odd": odd,
    "linear-table": static(Tile(128, 128, 128, 4), table=True),
    **{f"few-rows-{name}": static(tile, count=16, depth=2048) for name, tile in NARROW.items()},
    **{f"few-rows-w4-{name}": four_bits(tile) for name, tile in NARROW.items()},
    "linear-rows": rows(Tile(64, 64, 128)),
    "quantize-rows": quantize_rows,
    "linear-w4": four_bits(Tile(16, 64, 128)),
    "depthwise": separable(3),
    "depthwise-of-a-norm": separable(1),
    **{f"depthwise-tuned-{'x'.join(map(str, shape))}": separable(5, Tile(*shape)) for shape in tune.DEPTHWISE},
    "quantize": quantize,
    "quantize-images": quantize_images,
    "add": add,
    "multiply": multiply,
    "repeat": repeat,
    "average": average,
    "largest": largest,
    "largest-of-all": largest_of_all,
    "layer-norm": normalize,
    "fake": fake(torch.float32),
    "fake-moving": fake(torch.float32, moving=True),
    "fake-bf16": fake(torch.bfloat16, moving=True),
    "fake-rows": fake(torch.float32, rows=64),
}


def main(capabilities: list[int]) -> None:
    launch = JITFunction.run
    about: dict[str, Any] = {}
    found: list[tuple[dict[str, Any], bytes]] = []

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        found.append(({**about, "kernel": self.fn.__name__, **facts(kernel)}, kernel.asm["cubin"]))

    JITFunction.run = compile_only
    for capability in capabilities:
        driver.set_active(Driver(capability))
        for case, call in CASES.items():
            about = {"capability": capability, "case": case}
            call()
        counts = operations([cubin for _, cubin in found], capability)
        for (known, _), counted in zip(found, counts, strict=True):
            print(json.dumps({**known, "operations": counted}), flush=True)
        found.clear()


if __name__ == "__main__":
    main([int(given) for given in sys.argv[1:]])
