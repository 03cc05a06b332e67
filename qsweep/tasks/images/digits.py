from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qsweep.config import content_hash
from qsweep.tasks._files import store_of
from qsweep.tasks.base import Samples, SplitName
from qsweep.tasks.images.base import ImageData, Images


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 0 to 16: 1,077 to train on, 360 and 360 to judge on.

    Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), its test set.
    """

    method: Literal["digits"] = "digits"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the stratified split."""

    def open(self, root: Path) -> Images:
        def load(split: SplitName) -> Samples:
            from safetensors.torch import load_file

            folder = store_of(root).folder(self.fingerprint(root), self._split)
            tensors = load_file(folder / f"{split}.safetensors")
            return Samples(tensors["images"], tensors["labels"])

        return Images(classes=10, mean=(4.9,), std=(6.0,), padding=1, flip=False, load=load)

    def fingerprint(self, root: Path) -> str:
        return content_hash([self.uid(), "scikit-learn", metadata.version("scikit-learn")])

    def _split(self, folder: Path) -> None:
        """Write each split to `folder`: importing scikit-learn takes longer than all the rest of a calibration."""
        import torch
        from safetensors.torch import save_file
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        kept, test = train_test_split(range(len(labels)), test_size=360, stratify=labels, random_state=self.seed)
        train, validation = train_test_split(kept, test_size=360, stratify=labels[kept], random_state=self.seed)
        for split, rows in {"train": train, "validation": validation, "test": test}.items():
            save_file({"images": images[rows], "labels": labels[rows]}, folder / f"{split}.safetensors")
