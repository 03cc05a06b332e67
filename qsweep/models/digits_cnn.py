"""A small network for 8 x 8 digits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Four convolutions, one of them residual: images (B, C, H, W) to logits (B, classes); 45,000 parameters."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = _Convolution(channels, 32)
        self.residual = _Convolution(32, 32)
        self.down = _Convolution(32, 48, stride=2)
        self.top = _Convolution(48, 48)
        self.linear = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.residual(x))
        x = F.relu(self.top(F.relu(self.down(x))))
        logits: Tensor = self.linear(x.mean([2, 3]))
        return logits


class _Convolution(nn.Module):
    """3 x 3 convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.bn(self.conv(x))
        return normalised
