"""Networks whose values lie in memory in ways that kernels do not like, and networks that are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNeXt(nn.Module):
    """A block: a layer norm over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spread = nn.Conv2d(1, 16, 2, 2), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.norm(self.spread(x).permute(0, 2, 3, 1))
        x = x + self.narrow(F.gelu(self.wide(inner))).permute(0, 3, 1, 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Windowed(nn.Module):
    """A block of a Swin transformer: windows are cut out of rolled images, six dimensions on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(1, 16, 2, 2), nn.LayerNorm(16), nn.LayerNorm(16)
        self.all, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        batch = x.shape[0]
        windows = torch.roll(self.first(x), (1, 1), (1, 2)).view(batch, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5)
        heads = self.all(windows.reshape(batch * 4, 4, 16)).reshape(batch * 4, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).reshape(batch * 4, 4, 16)
        mixed = self.project(mixed).view(batch, 2, 2, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, 16)
        x = x + torch.roll(mixed, (-1, -1), (1, 2))
        x = x + self.narrow(F.gelu(self.wide(self.second(x))))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class Upsampled(nn.Module):
    """A U: pixels are repeated beside a shortcut, once more by another number a side, and cut out of channels."""

    def __init__(self, size: tuple[int, int] = (16, 48)) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.both, self.wide = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.last, self.head, self.size = nn.Conv2d(4, 2, 3, stride=3), nn.Linear(2 * 10 * 16, 10), size

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.cat([F.interpolate(F.relu(self.down(x)), scale_factor=2), x], 1)
        x = F.pixel_shuffle(self.wide(F.relu(self.both(x))), 2)
        x = self.last(F.interpolate(F.interpolate(x, self.size), (32, 48)))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Viewed(nn.Module):
    """Its output is a view of an image in floating point."""

    def __init__(self, gate: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.gate = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        x = x * x.sigmoid() if self.gate else x
        return x.view(x.shape[0], -1)


class Gated(Viewed):
    def __init__(self) -> None:
        super().__init__(gate=True)


class Summed(nn.Module):
    """Its output is a view of a sum in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x[:, 0]) + self.second(x[:, 0])).view(x.shape[0], -1)


class Bordered(nn.Module):
    """A max pool whose window is as large as the image, but begins outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool2d(self.first(x), 8, 8, 1).flatten(1))


class NormedSequence(nn.Module):
    """A layer norm that a convolution of sequences reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.head = nn.LayerNorm(8), nn.Conv1d(8, 6, 3, padding=1), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(self.norm(x[:, 0])).flatten(1))
        return logits


class Deep(nn.Module):
    """Five dimensions: moved, summed, looked up, and read in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], 2, 2, 2, 8).permute(0, 2, 1, 3, 4)
        x = self.first(x)
        x = (self.second(F.silu(x)) + x).permute(0, 3, 2, 1, 4)
        out: Tensor = self.third(x) * x.permute(0, 1, 3, 2, 4).sigmoid()
        return out


class Spectrogram(nn.Module):
    """Pools of images without channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(8, 12, 3, padding=1), nn.Linear(24 + 1 + 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x[:, 0])
        parts = F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (3, 2))
        logits: Tensor = self.head(torch.cat([part.flatten(1) for part in parts], 1))
        return logits


class NormedParts(nn.Module):
    """Layer norms whose results are parts of a concatenation of images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(1, 8, 3, padding=1), nn.LayerNorm(8), nn.LayerNorm(8)
        self.last, self.head = nn.Conv2d(8, 4, 1), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.last(torch.cat([self.one(x[:, :4]), self.other(x[:, 4:])], 1))
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Odd(nn.Module):
    """Rows of 30, 20 and 50 numbers, the second and third parts of one concatenation and the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 30), nn.Linear(64, 20)
        self.deep, self.part, self.head = nn.Linear(30, 20), nn.Linear(20, 7), nn.Linear(50, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        left, right = F.relu(self.left(x)), F.relu(self.right(x))
        logits: Tensor = self.head(torch.cat([left, right], 1))
        return logits + self.deep(left)[:, :4] + self.part(right)[:, :4]


class Series(nn.Module):
    """Rows of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.head = nn.LayerNorm(1), nn.Linear(1, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0, :1].transpose(1, 2)
        logits: Tensor = self.head((self.wide(x) + self.wide(self.norm(x))).relu().mean(1))
        return logits


class Tokens(nn.Module):
    """Pixels as tokens, which one sample gives as a view; several layers read the same ones."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 2, 2), nn.LayerNorm(12) if normed else nn.Identity()
        self.query, self.key, self.value, self.head = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        logits: Tensor = self.head(mixed.mean(1))
        return logits


class Transposed(nn.Module):
    """Most of its work has no integer kernel: windows of one pixel every two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.last = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 8, 1, 2),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.first(x))))).mean((2, 3))


class Mixed(nn.Module):
    """Its attention is a sum that names its indices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        weights = torch.einsum("btd,bsd->bts", self.first(x), self.second(x)).softmax(-1)
        logits: Tensor = self.last(torch.einsum("bts,bsd->btd", weights, x).mean(1))
        return logits


def _gated(values: Tensor, by: Tensor) -> Tensor:
    """By another, or by its means over images or channels."""
    gate = {0: by, 1: by.mean((2, 3), keepdim=True), 2: by[:, :1]}[by.shape[1] % 3]
    return values * torch.sigmoid(gate)


class Drawn(nn.Module):
    """Convolutions, sums, concatenations, pads, pools, cuts and moves of images, as `seed` has it; reads several."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.modules_ = random.Random(seed), nn.ModuleList()
        self.steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        values = [torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))]
        while len(self.steps) < 9:
            step, given = self._drawn(values)
            try:
                value = step(*(values[place] for place in given))
            except (RuntimeError, ValueError):  # sizes that do not fit
                continue
            if value.numel() and value.numel() < 8192 and value.dim() == 4:
                self.steps.append((step, given))
                values.append(value)
        self.read = [len(values) - 1, *self.random.sample(range(len(values)), 2)]
        self.heads = nn.ModuleList(nn.Linear(values[place][0].numel(), 4) for place in self.read)

    def _drawn(self, values: list[Tensor]) -> tuple[Callable[..., Tensor], tuple[int, ...]]:
        draw = self.random
        at = draw.choice([len(values) - 1, draw.randrange(len(values))])
        channels, height = values[at].shape[1], values[at].shape[2]
        kind = draw.choice(
            ["conv"] * 4 + ["act", "table", "pad", "pool", "slice", "move", "up"] + ["add", "cat"] * 2 + ["multiply"]
        )
        if kind == "conv":
            size, out = draw.choice([1, 3, 3, (1, 3), (5, 3)]), draw.choice([channels, 3, 5, 8, 16, 18])
            groups = draw.choice([g for g in (1, 1, 2, channels) if channels % g == 0 and out % g == 0])
            stride, padding = draw.choice([1, 1, 2]), draw.choice([0, 1, 1, (1, 2)])
            self.modules_.append(nn.Conv2d(channels, out, size, stride, padding, draw.choice([1, 1, 2]), groups))
            return self.modules_[-1], (at,)
        if kind in ("add", "multiply"):
            same = [place for place, value in enumerate(values) if value.shape == values[at].shape]
            return torch.add if kind == "add" else _gated, (at, draw.choice(same))
        if kind == "cat":
            alike = [place for place, value in enumerate(values) if value.shape[2:] == values[at].shape[2:]]
            return lambda *parts: torch.cat(parts, 1), (at, *draw.choices(alike, k=draw.choice([1, 2])))
        ends = draw.choice([(1, 1, 1, 1), (0, 1, 1, 0), (2, 0, 0, 1), (-1, 1, 0, 0), (0, 0, 0, 0, 1, 2)])
        start = draw.randrange(max(1, channels - 1))
        choices: dict[str, list[Callable[[Tensor], Tensor]]] = {
            "act": [F.relu, F.relu6, lambda x: F.hardtanh(x, -0.7, 0.9)],
            "table": [F.gelu, F.silu, torch.sigmoid],
            "pad": [lambda x: F.pad(x, ends)],
            "pool": [lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)],
            "slice": [lambda x: x[:, start : start + 2], lambda x: x[:, :, height // 2 :], lambda x: x[:, :, ::2, ::2]],
            "up": [lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, scale_factor=(1, 3))],
            "move": [lambda x: x.permute(0, 2, 3, 1), lambda x: x.transpose(2, 3), lambda x: x.contiguous()],
        }
        return draw.choice(choices[kind]), (at,)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, given in self.steps:
            values.append(step(*(values[place] for place in given)))
        found: Any = sum(head(values[place].flatten(1)) for head, place in zip(self.heads, self.read, strict=True))
        return found
