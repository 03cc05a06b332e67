"""The arithmetic of image classification: normalise, augment, loss, score."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from qsweep.tasks.base import Samples, SplitName
from qsweep.tasks.images.base import Images


class ImageTask:
    """A `Task` over `images` with the models that `build` makes."""

    any_device = True

    def __init__(self, images: Images, build: Callable[[], nn.Module]) -> None:
        self._images = images
        self._loaded: dict[SplitName, Samples] = {}
        self.model = build

    def samples(self, split: SplitName) -> Samples:
        if split not in self._loaded:
            self._loaded[split] = self._images.load(split)
        return self._loaded[split]

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        if generator is not None:
            inputs = augment(inputs, self._images.padding, self._images.flip, generator)
        return normalise(inputs, self._images.mean, self._images.std)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, C, H, W) less `mean`, by `std` (C values each, in units of the pixels): float32."""
    return images.float().sub_(_channels(mean, images.device)).div_(_channels(std, images.device))


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, C, 1, 1), made once: moving them to a GPU for each batch would wait for it."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def augment(images: Tensor, padding: int, flip: bool, generator: Generator) -> Tensor:
    """Each of `images` (B, C, H, W) padded by `padding` zeros, cropped to its size at random, and mirrored or not.

    `generator` must be of their device. Source: the augmentation of He et al. 2015, section 4.2.
    """
    (count, channels, height, width), device = images.shape, images.device
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=device)
    rows, columns = (
        shift + torch.arange(size, device=device) for shift, size in zip(shifts, (height, width), strict=True)
    )
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    each = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
