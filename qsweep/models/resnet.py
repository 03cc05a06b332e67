"""Residual networks for 32 x 32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n+2 with parameter-free shortcuts (option A): images (B, C, H, W) to logits (B, classes).

    Source: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2. Keys of the state dict:
    `conv1 bn1 layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2} linear`.
    """

    def __init__(self, depth: int, classes: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _layer(16, 16, blocks)
        self.layer2 = _layer(16, 32, blocks)
        self.layer3 = _layer(32, 64, blocks)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean([2, 3]))
        return logits


def _layer(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*[_Block(outputs if i else inputs, outputs) for i in range(blocks)])


class _Block(nn.Module):
    """Two convolutions and a shortcut; a block that widens also halves height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.widened = outputs - inputs
        stride = 2 if self.widened else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.widened:  # option A: take every other pixel, and put zero channels on both sides
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widened // 2, self.widened // 2))
        return F.relu(y + x)
