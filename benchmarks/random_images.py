"""A task of random images, for trainings that are timed and not scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from qsweep.tasks.base import Samples, SplitName

_DIFFERENT = 256


class RandomImages:
    """`count` images of `side` x `side` bytes in three channels, not all different, in 10 classes."""

    any_device = True

    def __init__(self, model: Callable[[], nn.Module], count: int, side: int) -> None:
        from qsweep.tasks.base import Samples

        generator = torch.Generator().manual_seed(0)
        few = torch.randint(256, (min(count, _DIFFERENT), 3, side, side), generator=generator, dtype=torch.uint8)
        inputs = few.repeat(-(-count // len(few)), 1, 1, 1)[:count]
        self.found, self._model = Samples(inputs, torch.randint(10, (count,), generator=generator)), model

    def model(self) -> nn.Module:
        return self._model()

    def samples(self, split: SplitName) -> Samples:
        return self.found

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        return inputs.float().sub_(127.5).div_(64)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()
