from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsweep.config import Config, content_hash
from qsweep.models import Arch, build, load_checkpoint
from qsweep.tasks._files import file_hash, locate, store_of
from qsweep.tasks.base import Task, TaskConfig
from qsweep.tasks.images import AnyImages

if TYPE_CHECKING:
    from torch import nn


class ImageModel(Config):
    """An architecture that ships with qsweep, and its weights."""

    arch: Arch
    checkpoint: str | None = None
    """A safetensors file, relative to the spec's folder; `~` and `$VARIABLES` are expanded. null: the model is trained
    first, once."""


class ImageClassification(TaskConfig):
    """Images of one size, one class each, judged by top-1 accuracy."""

    method: Literal["image_classification"] = "image_classification"
    model: ImageModel
    data: AnyImages

    def open(self, root: Path) -> Task:
        from qsweep.tasks.images._task import ImageTask

        images = self.data.open(root)
        checkpoint = self.model.checkpoint and locate(self.model.checkpoint, root)

        def new_model() -> nn.Module:
            model = build(self.model.arch, images.classes, len(images.mean))
            if checkpoint:
                load_checkpoint(model, checkpoint)
            return model

        return ImageTask(images, new_model)

    def about(self, root: Path) -> dict[str, Any]:
        images = self.data.open(root)
        scaled = "each channel of the pixels as they are stored, float32, less `mean`, by `std`"
        channels = "RGB" if len(images.mean) == 3 else "grey"
        return {
            "classes": images.classes,
            "output": "logits, one a class; the largest is the prediction",
            "preprocessing": {"channels": channels, "scaled": scaled, "mean": images.mean, "std": images.std},
        }

    @property
    def files(self) -> list[str]:
        return [*([self.model.checkpoint] if self.model.checkpoint else []), *self.data.files]

    def check(self, root: Path) -> None:
        from qsweep.models import check_checkpoint

        super().check(root)
        if self.model.checkpoint:
            check_checkpoint(locate(self.model.checkpoint, root))

    @property
    def pretrained(self) -> bool:
        return self.model.checkpoint is not None

    def fingerprint(self, root: Path) -> str:
        checkpoint = self.model.checkpoint and file_hash(locate(self.model.checkpoint, root), store_of(root))
        return content_hash([self.method, self.version, self.model.arch, checkpoint, self.data.fingerprint(root)])
