"""What every source of labelled images is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qsweep.config import Config
from qsweep.tasks.base import Samples, SplitName


@dataclass(frozen=True)
class Images:
    """Labelled images, and how they become the inputs of a model."""

    classes: int
    """Labels go from 0 to one less."""
    mean: tuple[float, ...]
    """Per channel, in units of the stored pixels."""
    std: tuple[float, ...]
    padding: int
    """Augmentation: a random crop, of the image's size, of the image with this many black pixels on every side."""
    flip: bool
    """Augmentation: half of the images are mirrored, left to right."""
    load: Callable[[SplitName], Samples]
    """uint8 images (N, C, H, W) and int64 labels (N,). Raises DataError."""


class ImageData(Config, ABC):
    """A config that names labelled images in three splits."""

    discriminator: ClassVar[str | None] = "method"
    method: str

    @property
    def files(self) -> list[str]:
        """What it names of them, as the spec has them."""
        return []

    @abstractmethod
    def open(self, root: Path) -> Images:
        """Find the files; none is read before its split is loaded. Raises DataError for one that is missing."""

    @abstractmethod
    def fingerprint(self, root: Path) -> str:
        """SHA-256 over the images' content, their split and their transformation."""
