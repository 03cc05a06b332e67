"""Networks as people write them: what tracing makes of them are ops that engines must be brought to run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attended(nn.Module):
    """A residual block with the attention of CBAM: means and maxima over the image, then over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mean, self.largest = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)
        self.gate = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False))
        self.where, self.head = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv(x)
        y = y * torch.sigmoid(self.gate(self.mean(y)) + self.gate(self.largest(y)))
        largest, _ = torch.max(y, dim=1, keepdim=True)
        y = y * torch.sigmoid(self.where(torch.cat([y.mean(1, keepdim=True), largest], 1)))
        logits: Tensor = self.head(F.relu(x + y).amax((2, 3)))
        return logits


class Pyramid(nn.Module):
    """The largest pixels of a pyramid of windows, of which some differ in size, some overlap; a maxout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(8 * (1 + 4 + 9 + 9 + 7), 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(x.shape[0], 8, 2, 8, 8).max(2)[0]
        parts = [F.adaptive_max_pool2d(x, size) for size in (1, 2, 3)]
        parts += [F.adaptive_avg_pool2d(x[..., :7, :7], 3), F.adaptive_max_pool1d(x.flatten(2)[..., :22], 7)]
        logits: Tensor = self.head(torch.cat([part.flatten(1) for part in parts], 1))
        return logits


class Clips(nn.Module):
    """Images in time: their convolutions see all as one batch, tokens are repeated for each, channels are shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.token, self.mix, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 4, 1, 4, 4)
        batch, time, channels, height, width = x.shape
        x = F.relu(self.first(x.reshape(batch * time, channels, height, width))).view(batch, time, 8, height, width)
        shifted = torch.zeros_like(x)
        shifted[:, :-1, :2] = x[:, 1:, :2]
        shifted[:, 1:, 2:4] = x[:, :-1, 2:4]
        shifted[:, :, 4:] = x[:, :, 4:]
        x = F.relu(self.second(shifted.flatten(0, 1))).flatten(2).transpose(1, 2)
        x = self.mix(torch.cat([self.token.expand(batch * time, -1, -1), x], 1))
        logits: Tensor = self.head(F.relu(x).mean(1).view(batch, time, -1).max(1).values)
        return logits


def windows_of(x: Tensor, size: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, size * size, channels)


class Shifted(nn.Module):
    """A block of Swin: shifted windows under a mask that is written region by region, biases looked up by place."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.all = nn.Conv2d(1, 16, 2, 2), nn.LayerNorm(16), nn.Linear(16, 48)
        self.table, self.project, self.head = nn.Parameter(torch.randn(9, 2)), nn.Linear(16, 16), nn.Linear(16, 10)
        self.register_buffer("places", torch.randint(0, 9, (4, 4)))

    def mask(self, height: int, width: int) -> Tensor:
        regions, count = torch.zeros(1, height, width, 1), 0
        for down in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            for across in (slice(0, -2), slice(-2, -1), slice(-1, None)):
                regions[:, down, across, :] = count
                count += 1
        found = windows_of(regions, 2).squeeze(2)
        apart = found.unsqueeze(1) - found.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        _, height, width, channels = x.shape
        windows = windows_of(torch.roll(self.norm(x), (-1, -1), (1, 2)), 2)
        count = windows.shape[0]
        query, key, value = self.all(windows).reshape(count, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = (query * 8**-0.5) @ key.transpose(-2, -1) + self.table[self.places].permute(2, 0, 1)
        scores = scores.view(count // 4, 4, 2, 4, 4) + self.mask(height, width).unsqueeze(1).unsqueeze(0)
        mixed = (scores.view(-1, 2, 4, 4).softmax(-1) @ value).transpose(1, 2).reshape(count, 4, channels)
        mixed = self.project(mixed).view(-1, 2, 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(mixed.reshape(-1, height, width, channels), (1, 1), (1, 2))
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


class Rotated(nn.Module):
    """Attention with rotary places, made without gradients and in float32, beside places written into a table."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.all, self.head = nn.Linear(8, 48), nn.Linear(16, 10)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, 8) / 8))

    @torch.no_grad()
    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(x.shape[1])[None].float().expand(x.shape[0], -1)
        with torch.autocast(device_type="cpu", enabled=False):
            angles = places[:, :, None] * self.frequencies[None, None, :]
            angles = torch.cat((angles, angles), -1)
            return angles.cos(), angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(8, 8)
        table[:, 0::2], table[:, 1::2] = torch.arange(8.0).sin()[:, None], torch.arange(8.0).cos()[:, None]
        x = x[:, 0] + table
        query, key, value = self.all(x).chunk(3, -1)
        cos, sin = self.rotation(x)
        query, key = (part * cos + torch.cat((-part[..., 8:], part[..., :8]), -1) * sin for part in (query, key))
        logits: Tensor = self.head(F.scaled_dot_product_attention(query, key, value).mean(1))
        return logits


class Related(nn.Module):
    """Every sample beside every other, and a convolution of what all have in common, which is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.common = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pair, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.common(x.mean(0))
        means = x.mean((2, 3))
        logits: Tensor = self.head(F.relu(self.pair(means.unsqueeze(0) - means.unsqueeze(1))).mean(0))
        return logits


class Compared(nn.Module):
    """Products of two activations whose sides are sums and means that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.third, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        summed = (self.one(x) + self.other(x)).flatten(2)
        pooled = F.avg_pool2d(self.third(x), 2).flatten(2)
        alike = summed @ summed.transpose(1, 2) / 64
        found: Tensor = self.last(torch.cat([alike.flatten(1), (alike @ pooled / 8)[:, :, :8].flatten(1)], 1))
        return found


class Columns(nn.Module):
    """Layers for some of the columns of what it is given each, and the last step of one of them added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(5, 8, 3, padding=1)
        self.both, self.head = nn.Conv1d(16, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        steps = x[:, 0]
        left, right = (layer(part.transpose(1, 2)) for layer, part in self._parts(steps))
        mixed = F.relu(self.both(F.relu(torch.cat([left, right], 1))))
        found: Tensor = steps[:, -1, :1] + self.head(mixed[:, :, -1])
        return found

    def _parts(self, steps: Tensor) -> list[tuple[nn.Conv1d, Tensor]]:
        return [(self.left, steps[:, :, :3]), (self.right, steps[..., 3:])]


WRITTEN: list[type[nn.Module]] = [Attended, Pyramid, Clips, Shifted, Rotated, Related, Compared, Columns]
"""Each takes (B, 1, 8, 8) and gives (B, 10)."""
