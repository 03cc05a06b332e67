"""What the GPU benchmark asks: its rows, none of them measured. Imports no kernel, so that it works anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_rows import Row

CONVOLUTION_BATCHES = (32, 256, 1)
NETWORK_BATCHES = (128, 512, 32, 8, 1)
"""In the order in which they are measured."""
NETWORKS = ("ResNet-50", "ResNet-18", "ViT-S")
MAIN = ("ResNet-50", 128)


@dataclass(frozen=True)
class Shape:
    """A convolution over `side` x `side` pixels, padded by half its size."""

    side: int
    given: int
    out: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        kind = f"depthwise {self.given}" if self.groups > 1 else f"{self.given} to {self.out}"
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{kind}, {self.size}x{self.size}{stride}, {self.side}²"

    @property
    def wide(self) -> bool:
        return min(self.given, self.out) >= 128 and self.groups == 1

    def small(self) -> Shape:
        """One of the same kind, for a test."""
        given = min(self.given, 16)
        depthwise = self.groups > 1
        return replace(self, side=8, given=given, out=given if depthwise else 32, groups=given if depthwise else 1)

    def work(self, batch: int) -> tuple[float, float]:
        """Operations, and bytes with int8 tensors moved once each."""
        pixels = batch * (self.side // self.stride) ** 2
        weights = self.out * self.given // self.groups * self.size**2
        return 2.0 * pixels * weights, batch * self.side**2 * self.given + pixels * self.out + weights


SHAPES = (
    Shape(224, 3, 64, 7, 2),
    Shape(56, 64, 64, 3),
    Shape(56, 64, 256, 1),
    Shape(56, 256, 64, 1),
    Shape(56, 128, 128, 3, 2),
    Shape(28, 128, 128, 3),
    Shape(14, 256, 256, 3),
    Shape(14, 1024, 256, 1),
    Shape(7, 512, 512, 3),
    Shape(56, 144, 144, 3, groups=144),
    Shape(14, 384, 384, 3, groups=384),
)
"""Of a ResNet-50, and two depthwise ones of a MobileNetV2."""

EQUAL_CONVOLUTIONS = f"equality: {len(SHAPES)} convolutions, zero points of both signs"
EQUAL_LINEARS = "equality: linear, GELU, linear, as in ViT-S"
COPY, BF16, INT8 = "roof: copy bandwidth", "roof: bf16 matrix rate", "roof: int8 matrix rate, torch._int_mm"
MATRIX = "the Triton int8 matrix product of the int8 roof"
WIDE = "dense convolutions with at least 128 channels at batch 32 and more, geometric mean"
FLOOR = "all networks and convolutions at batch 128 and more"
LINEAR_ROWS, LINEAR_SIDE = (1, 16, 64), 4096
MEMORY = "peak device memory, ResNet-50 at batch 128"
ENERGY = "energy of an image, ResNet-50 at batch 128"
TRAININGS = {
    ("bf16", False): ("LSQ", "straight-through"),
    ("fp32", False): ("LSQ",),
    ("bf16", True): ("LSQ",),
}
"""Methods by precision and whether it is compiled."""
QAT = {
    mode: f"kernels alone: QAT step of a ResNet-18 at batch 128, bf16 autocast, {mode}, of the bf16 step"
    for mode in ("captured", "eager")
}
SWEEPS = {"digits": "digits sweep, `engine: cuda`", "cifar10-resnet20": "CIFAR-10 sweep, `engine: cuda`"}


def equal_network(name: str) -> str:
    return f"equality: {name}"


def network(name: str, batch: int) -> str:
    return f"{name}, batch {batch}"


def linear(count: int) -> str:
    return f"linear {LINEAR_SIDE} to {LINEAR_SIDE}, {count} rows, weights not in the cache"


def convolution(shape: Shape, batch: int) -> str:
    return f"convolution {shape.name}, batch {batch}"


def training(method: str, precision: str, compiled: bool) -> str:
    how = f"{precision}, compiled" if compiled else precision
    return f"QAT ({method}) of a ResNet-18 at batch 128 by `qsweep`, {how}, of the float training"


def trainings() -> list[str]:
    return [training(method, *how) for how, methods in TRAININGS.items() for method in methods]


def rows() -> Iterator[Row]:
    """All of them, in the order of the table."""
    for name in (EQUAL_CONVOLUTIONS, EQUAL_LINEARS):
        yield Row(name, "every tensor bit-equal to `reference`")
    for name in NETWORKS:
        partly = "int8 tensors differ by float islands' last bits alone: shown"
        yield Row(equal_network(name), partly if name == "ViT-S" else "every layer bit-equal to `reference`")
    for name in (COPY, BF16, INT8):
        yield Row(name, "shown")
    yield Row(MATRIX, "at least 70 %")
    yield Row(WIDE, "at least 1.3x the best 16-bit baseline")
    yield Row(FLOOR, "never under 0.95x the best baseline")
    for name in NETWORKS:
        for batch in sorted(NETWORK_BATCHES):
            yield Row(network(name, batch), "at least 1.4x the best baseline" if (name, batch) == MAIN else "shown")
    yield Row(MEMORY, "shown")
    yield Row(ENERGY, "shown")
    for how, methods in TRAININGS.items():
        for method in methods:
            yield Row(training(method, *how), "at most 1.3" if how[0] == "bf16" else "shown")
    for mode, step in QAT.items():
        yield Row(step, "at most 1.3" if mode == "captured" else "shown")
    for count in LINEAR_ROWS:
        yield Row(linear(count), "shown")
    for shape in SHAPES:
        for batch in sorted(CONVOLUTION_BATCHES):
            yield Row(convolution(shape, batch), "shown")
    for sweep in SWEEPS.values():
        yield Row(sweep, "runs to its end")
