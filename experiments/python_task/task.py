"""A task of one's own: tell malignant from benign tumours by 30 measurements of cell nuclei.

Data: Breast Cancer Wisconsin (Diagnostic), 569 rows, bundled with scikit-learn. qsweep needs four methods of a task,
`model`, `samples`, `loss` and `score`, and takes `transform` where inputs need more than a cast to float32.

What qsweep asks of them, and says before it trains where one does not hold: the model's parameters are float32, and it
takes and gives tensors (N, ...), such as logits (N, C), maps (N, C, H, W) or numbers (N,). Scores go from 0 to 1, one a
sample, as their mean is shown in per cent. Data that are read from files belong into `depends_on`. Every job is a
process of its own that opens the task anew: keep what takes long to prepare in a file. Inputs that do not fit into
memory may be a memory-mapped array, `torch.from_numpy(numpy.load(file, mmap_mode="c"))`.

Inputs, labels and outputs may be several tensors, in tuples and dicts, and inputs whole numbers. A tuple of inputs is
given to `forward` as its arguments, a dict by their names; None among outputs is left out:

    def samples(self, split):  # as tokenizers and transformers have them
        return {"input_ids": ids, "attention_mask": mask}, {"start": starts, "end": ends}

    def loss(self, outputs, labels):  # values of dicts are attributes, too
        return cross_entropy(outputs.start_logits, labels.start) + cross_entropy(outputs.end_logits, labels.end)

What is no mean over samples is a `metric` of all of them, from 0 to 1 as well: AUC, mean IoU (of intersections and
unions by class), F1 (of counts), or R2 of a regression:

    def score(self, outputs, labels):  # what the metric needs to know of each sample, (N, K)
        return torch.stack([outputs[:, 1] - outputs[:, 0], labels], 1)

    def metric(self, scores):  # those of any samples; NaN where they are of one class alone
        return roc_auc_score(scores[:, 1], scores[:, 0])

Distillation follows the uncompressed model unless there is a better one, which may be of any size and takes and gives
what the model does:

    def teacher(self):  # with its weights
        return large_model(torch.load("large.pt"))

What goes from no 0 to 1 has a name and a unit in the spec, `task: {metric: {name: PSNR, unit: dB}}`, and stands under
them in tables and charts. Higher is better, so that of an error or a perplexity its negative is given, as scorers of
scikit-learn do (`metric: {name: negative RMSE, unit: mm}`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor, nn


class BreastCancer:
    """`hidden` is an argument of the spec (`task.arguments`)."""

    def __init__(self, hidden: int = 64) -> None:
        self.hidden = hidden
        table = load_breast_cancer()
        self.inputs = torch.from_numpy(table.data).float()
        self.labels = torch.from_numpy(table.target)
        rest, test = train_test_split(range(len(self.labels)), test_size=120, stratify=self.labels, random_state=0)
        train, validation = train_test_split(rest, test_size=120, stratify=self.labels[rest], random_state=0)
        self.rows = {"train": train, "validation": validation, "test": test}
        self.mean, self.std = self.inputs[train].mean(0), self.inputs[train].std(0)

    def model(self) -> nn.Module:
        """A new network; qsweep trains it once, since the spec does not say that it is trained."""
        return nn.Sequential(
            nn.Linear(30, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 2),
        )

    def samples(self, split: str) -> tuple[Tensor, Tensor]:
        """Inputs (N, 30) as stored and labels (N,): 0 malignant, 1 benign."""
        rows = self.rows[split]
        return self.inputs[rows], self.labels[rows]

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        """Standardise; while training (`generator` is given) add a little noise."""
        scaled = (inputs - self.mean) / self.std
        return scaled if generator is None else scaled + 0.05 * torch.randn(scaled.shape, generator=generator)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """1 where the class is right: its mean is the accuracy."""
        return (outputs.argmax(1) == labels).float()
