"""Models of several inputs and outputs, as their users write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEEDS = {"train": 0, "validation": 1, "test": 2}


class Detector(nn.Module):
    """An image and a row of numbers in; the logits and the box of what it shows out."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()
        )
        self.table = nn.Linear(5, 16)
        self.joint = nn.Linear(32, 32)
        self.kind = nn.Linear(32, 4)
        self.box = nn.Linear(32, 4)

    def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Any]:
        seen, told = self.features(image).mean((2, 3)), self.table(numbers).relu()
        joint = self.joint(torch.cat([seen, told], 1)).relu()
        return {"logits": self.kind(joint), "boxes": (self.box(joint).sigmoid() * 8, joint.sum(1)), "aux": None}


class Boxes:
    """A bright square on noise: of which of 4 kinds, told by its colour and the numbers, and where."""

    def model(self) -> nn.Module:
        return Detector()

    def samples(self, split: str) -> tuple[Any, Any]:
        draw = torch.Generator().manual_seed(SEEDS[split])
        kinds = torch.randint(0, 4, (96,), generator=draw)
        places = torch.randint(0, 5, (96, 2), generator=draw)
        images = torch.randint(0, 60, (96, 3, 8, 8), generator=draw, dtype=torch.uint8)
        for image, kind, (x, y) in zip(images, kinds, places, strict=True):
            image[int(kind) % 2, x : x + 3, y : y + 3] = 250
        numbers = 1000 * (kinds[:, None] // 2) + torch.randn(96, 5, generator=draw)
        corners = torch.cat([places, places + 3], 1).float()
        return (images, numbers), {"kind": kinds, "box": corners}

    def transform(self, inputs: tuple[Tensor, Tensor], generator: torch.Generator | None = None) -> Any:
        images, numbers = inputs
        assert images.dtype == torch.uint8
        return images.float() / 255, numbers / 1000

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, labels["kind"]) + F.l1_loss(outputs["boxes"][0], labels.box)

    def score(self, outputs: Any, labels: Any) -> Tensor:
        assert labels.kind.dtype == torch.int64
        near = (outputs["boxes"][0] - labels["box"]).abs().mean(1) < 2
        return 0.5 * (outputs["logits"].argmax(1) == labels["kind"]).float() + 0.5 * near.float()


class Reader(nn.Module):
    """Numbers of words and which of them count, by name, as tokenizers give them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(900, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        weights = attention_mask[..., None].float()
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return {"logits": self.head(pooled), "pooled": pooled}


class Words:
    """Which of three words above 300, more than bf16 can count, stands among others."""

    def model(self) -> nn.Module:
        return Reader()

    def samples(self, split: str) -> tuple[Any, Tensor]:
        draw = torch.Generator().manual_seed(SEEDS[split])
        labels = torch.randint(0, 3, (128,), generator=draw)
        ids = torch.randint(1, 300, (128, 12), generator=draw)
        ids[:, 3] = 700 + labels
        lengths = torch.randint(5, 13, (128, 1), generator=draw)
        mask = (torch.arange(12) < lengths).long()
        return {"input_ids": ids * mask, "attention_mask": mask}, labels

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, labels)

    def score(self, outputs: Any, labels: Tensor) -> Tensor:
        return (outputs["logits"].argmax(1) == labels).float()
