"""Networks for the chain of kernels: what `networks.py` does not have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottlenecks(nn.Module):
    """A ResNet's stem and bottlenecks: one with a convolution, one with nothing beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.narrow, self.middle, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 32, 1)
        self.beside = nn.Conv2d(16, 32, 1, stride=2)
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        x = F.relu(self.wide(F.relu(self.middle(F.relu(self.narrow(x))))) + self.beside(x))
        x = F.relu(self.last(x) + x)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Joined(nn.Module):
    """Concatenations: growing as in DenseNet, of branches as in Inception, one part of them pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.third = nn.Conv2d(11, 7, 3, padding=1)
        self.left, self.right = nn.Conv2d(18, 6, 1), nn.Conv2d(18, 4, 3, padding=1)
        self.last = nn.Conv2d(10, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        second = F.relu(self.second(first))
        third = F.relu(self.third(torch.cat([first, second], 1)))
        whole = torch.cat([first, second, third], 1)
        x = torch.cat([self.left(whole), F.max_pool2d(self.right(whole), 3, 1, 1)], 1)
        logits: Tensor = self.linear(F.relu(self.last(x)).mean((2, 3)))
        return logits


class Windows(nn.Module):
    """Strides and dilations, paddings that differ by side, groups, a bounded activation, a resize, rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Conv2d(1, 6, (3, 5), stride=(2, 1), padding=(0, 2))
        self.dilated = nn.Conv2d(6, 8, 3, dilation=2, padding=2)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False)
        self.spread = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.linear = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.tall(F.pad(x, (0, 0, 0, 1))))
        x = F.hardtanh(self.dilated(x), -1.0, 1.0)
        x = F.relu6(self.grouped(F.pad(x, (0, 1, 1, 0))))
        x = F.interpolate(x, size=(4, 4))
        logits: Tensor = self.linear(F.relu(self.same(F.relu(self.spread(x)))).flatten(1))
        return logits


class Transformer(nn.Module):
    """One block of a vision transformer over four patches and a class token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.all, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(batch, -1, -1), x], 1) + self.places
        heads = self.all(self.norms[0](x)).reshape(batch, 5, 3, 2, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        x = x + self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, 5, -1))
        x = x + self.narrow(F.gelu(self.wide(self.norms[1](x))))
        logits: Tensor = self.head(self.norms[2](x)[:, 0])
        return logits
