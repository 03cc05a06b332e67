"""A task small enough to train in a test: which half of a 4 x 4 image is brighter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from qsweep.tasks.base import Samples, SplitName


class Toy:
    def __init__(self, count: int = 65, dropout: float = 0.0) -> None:
        self.count, self.dropout = count, dropout

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(64, 2),
        )

    def samples(self, split: SplitName) -> Samples:
        seed = {"train": 0, "validation": 1, "test": 2}[split]
        inputs = torch.randint(0, 256, (self.count, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
        halves = inputs.float().view(-1, 2, 8).mean(2)
        return Samples(inputs.to(torch.uint8), (halves[:, 1] > halves[:, 0]).long())

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        scaled = inputs.float() / 128 - 1
        return scaled if generator is None else scaled + 0.01 * torch.randn(scaled.shape, generator=generator)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()
