"""ResNet-18, ResNet-50 and ViT-S/16 with their standard shapes and random weights, and as integer hub graphs.

He et al. 2016 (arXiv:1512.03385), the stride of a bottleneck on its 3 x 3 convolution; Dosovitskiy et al. 2021
(arXiv:2010.11929) with the mean of all tokens in the place of a class token. Needs torch and numpy alone.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qsweep.hub.convert import convert
from qsweep.hub.export import export
from qsweep.hub.form import Grid, QuantizedModel
from qsweep.hub.insert import Place, insert_observers
from qsweep.hub.norm import fold_batch_norm
from qsweep.hub.weights import Channels

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def convolution(given: int, out: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(given, out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Block(nn.Module):
    """A residual block; `inner` channels inside, of a bottleneck four times as many outside."""

    def __init__(self, given: int, inner: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * inner if bottleneck else inner
        plan = (
            [(given, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
            if bottleneck
            else [(given, inner, 3, stride), (inner, out, 3, 1)]
        )
        parts: list[nn.Module] = []
        for layer in plan:
            parts += [convolution(*layer), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])
        self.shortcut = convolution(given, out, 1, stride) if stride > 1 or given != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self, depths: list[int], bottleneck: bool, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks, given = [], width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                inner = width << stage
                blocks.append(Block(given, inner, 2 if stage and not number else 1, bottleneck))
                given = 4 * inner if bottleneck else inner
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(given, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.project(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class ViT(nn.Module):
    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, size: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(tokens)).mean(1))


def build(name: str, tiny: bool) -> tuple[nn.Module, int]:
    """The model in eval mode, the same weights in every call, and the side of its images; `tiny` ones for a test."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "ViT-S":
            return (ViT(32, 1, 2, 16, 8) if tiny else ViT()).eval(), 16 if tiny else 224
        bottleneck = name == "ResNet-50"
        if tiny:
            return ResNet([1, 1], bottleneck, width=16, classes=10).eval(), 16
        return ResNet([3, 4, 6, 3] if bottleneck else [2, 2, 2, 2], bottleneck).eval(), 224


class MinMax(nn.Module):
    """Observes activations; their 8-bit grid lies between the least and the greatest value, 0 among them."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.low = self.high = 0.0

    def forward(self, values: Tensor) -> Tensor:
        self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        return values

    def grid(self) -> Grid:
        scale = torch.tensor(max(self.high - self.low, 1e-6) / 255, dtype=torch.float32).item()
        return Grid(scale, max(-128, min(127, -128 - round(self.low / scale))), -128, 127)


class MaxWeight(nn.Module):
    """Weights on the symmetric 8-bit grid of each output channel."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def stored(self, weight: Tensor, smallest_scale: Tensor) -> Channels:
        peak = weight.detach().abs().flatten(1).amax(1)
        scale = torch.maximum((peak / 127).clamp(min=1e-8), smallest_scale)
        integers = (weight.detach() / scale.reshape(-1, *[1] * (weight.dim() - 1))).round().clamp(-127, 127)
        return Channels(integers.to(torch.int8), scale, -127, 127)


def folded(model: nn.Module, *shape: int) -> QuantizedModel:
    """The float graph for samples of `shape`, batch norms folded: what baselines of convolutional networks run, too."""
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    live = export(model, example)
    return QuantizedModel(fold_batch_norm(live.graph), live.example)


@torch.no_grad()
def quantized(model: QuantizedModel) -> QuantizedModel:
    """A copy of the folded graph with 8-bit weights and activations, calibrated on its two examples."""
    observed = QuantizedModel(copy.deepcopy(model.graph), model.example)
    insert_observers(observed, MinMax, MaxWeight)
    observed.graph(model.example)
    return convert(observed)
