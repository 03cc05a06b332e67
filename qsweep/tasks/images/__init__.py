"""The `data` family of image classification: one file a source of images."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.tasks.images.base import ImageData

if TYPE_CHECKING:
    AnyImages = ImageData
else:
    AnyImages = family(ImageData, __name__)

__all__ = ["AnyImages", "ImageData"]
