"""A task: a model to compress, the data to judge it on, a loss and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

from pydantic import Field

from qsweep.config import Config
from qsweep.errors import DataError
from qsweep.tasks._files import locate

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Metric = Callable[["Tensor"], float]
SplitName = Literal["train", "validation", "test"]
Schedule = Literal["one_cycle", "cosine"]
Optimizer = Literal["sgd", "adamw"]
Precision = Literal["fp32", "bf16"]


class Samples(NamedTuple):
    """A split in memory: `inputs` (N, ...) as stored (uint8 images, say) and `labels` (N, ...).

    A class of the user's own may have several of each, in tuples and dicts.
    """

    inputs: Tensor
    labels: Tensor


class Task(Protocol):
    """What a sweep needs of its user.

    A class of the user's own may store, take and give several tensors wherever one stands here, in tuples and dicts (a
    tuple of inputs is given to `forward` as its arguments, a dict by their names), and its inputs may be whole numbers.

    All tensors are on the CPU but those of a training on a GPU: `loss` is given tensors of that device then, and so is
    `transform`, with a generator of that device, if the task has an attribute `any_device` that is true.

    What is no mean over samples, such as AUC, mean IoU, F1 or R2, is a method `metric(scores)` more: `score` gives
    (B, K) numbers then (the logit and the label, intersections and unions by class, counts, squares), and `metric`
    makes of those of any samples, (n, K) for any n, the accuracy: in [0, 1], or NaN where these samples have none.

    Distillation follows the uncompressed model, or what a method `teacher()` returns: any trained model, mostly a
    larger one, that gives for the same inputs outputs of the same shapes.

    "Accuracy" is what a task judges by, whatever it is: higher is better. What is in no per cent, such as decibels or
    an error in metres (as its negative), has a `TaskMetric` in the spec, and then any finite values.
    """

    def model(self) -> nn.Module:
        """A new model, with trained weights where there are any."""

    def samples(self, split: SplitName) -> Samples:
        """One of three disjoint splits. Calibration and training see `train`, the search `validation`."""

    def transform(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        """Stored inputs (B, ...) as the model takes them, float32. With a `generator`: augmented by it. A class of the
        user's own may be without: its inputs are cast."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Scalar to train on, of the arguments alone: quantization-aware training on a GPU records what it does once
        and replays that."""

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """(B,) values in [0, 1], one a sample; their mean is the accuracy. (B, K) finite numbers for a `metric`."""


class TaskMetric(Config):
    """What the accuracy of a task is called and counted in. Higher is better: of an error its negative."""

    name: Annotated[str, Field(pattern=r"^[^<>|\s][^<>|\n]{0,23}$")] = "accuracy"
    unit: Annotated[str, Field(pattern=r"^[^<>|\s][^<>|\n]{0,11}$")] | None = "%"
    """%: values are from 0 to 1 and shown in per cent, and a drop of one is 100 percentage points. Any other, or null
    for numbers without: finite values of any size, shown as they are; drops are in the same unit."""
    decimals: Annotated[int, Field(ge=0, le=9)] | None = None
    """Digits behind the point in tables; null: 2 in per cent, else 3."""

    @property
    def share(self) -> bool:
        """Whether values are from 0 to 1."""
        return self.unit == "%"

    @property
    def scale(self) -> float:
        """What a value is multiplied by to be in the unit; one of accuracy is so many points of `accuracy_drop_pp`."""
        return 100.0 if self.share else 1.0

    def range(self, baseline: float) -> float:
        """By how much values differ that have nothing in common: 1 of shares, else the size of the baseline's."""
        return 1.0 if self.share else abs(baseline) or 1.0

    def text(self, value: float) -> str:
        """A value, or a difference of two, as a person reads it, without its unit."""
        digits = (2 if self.share else 3) if self.decimals is None else self.decimals
        return f"{round(self.scale * value, digits) + 0.0:,.{digits}f}"  # no -0.00


ACCURACY = TaskMetric()


class Usual(NamedTuple):
    """What an optimizer takes where nothing else is said."""

    learning_rate: float
    """From scratch."""
    fine_tuning: float
    """Learning rate of the stages."""
    weight_decay: float


USUAL: dict[Optimizer, Usual] = {"sgd": Usual(0.05, 0.01, 5e-4), "adamw": Usual(1e-3, 3e-4, 1e-2)}


class Training(Config):
    """Settings of a training run from scratch, or of fine-tuning."""

    epochs: Annotated[int, Field(ge=1)] = 20
    optimizer: Optimizer = "sgd"
    """sgd: with Nesterov momentum; adamw: Adam with decoupled weight decay (Loshchilov & Hutter 2019,
    arXiv:1711.05101), as transformers are trained."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest of the schedule; null: 0.05 for sgd, 0.001 for adamw. Stages have their own."""
    schedule: Schedule = "one_cycle"
    """one_cycle warms up from a 25th of the rate in the first 30 % of the steps (Smith 2018, arXiv:1803.09820); cosine
    falls from its highest to 0 (Loshchilov & Hutter 2017)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of adamw: the decay of the mean of the gradients (beta1); that of their squares is 0.999."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of parameters of two dimensions and more; null: 0.0005 for sgd, 0.01 for adamw."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    precision: Precision = "fp32"
    """bf16: the model runs under autocast; its parameters, the loss and the optimizer stay float32. Quicker where the
    processor multiplies bf16 in hardware (AMX, GPUs), slower elsewhere. QAT methods have a field of their own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models are trained; where they are to run is the target's. On `cuda` the data lie on the GPU, and images
    are augmented there, with other random numbers than on the CPU."""
    compile: bool = False
    """Train through `torch.compile`, QAT too. Compiling takes a minute or so, once a training: for long ones."""

    def canonical(self) -> Self:
        usual = USUAL[self.optimizer]
        same = [name for name in ("learning_rate", "weight_decay") if getattr(self, name) == getattr(usual, name)]
        return self.with_defaults(*same)

    @property
    def rate(self) -> float:
        """`learning_rate`, that of the optimizer where it is null."""
        return USUAL[self.optimizer].learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """`weight_decay`, that of the optimizer where it is null."""
        return USUAL[self.optimizer].weight_decay if self.weight_decay is None else self.weight_decay

    def unavailable(self) -> str | None:
        """Why no model can be trained like this on this machine, or None."""
        from qsweep.machine import no_gpu

        return no_gpu() if self.device == "cuda" else None


class TaskConfig(Config, ABC):
    """The part of a spec that says what is compressed. `open` makes it real."""

    discriminator: ClassVar[str | None] = "method"
    method: str
    training: Training = Training()
    """How the baseline is trained when it has no checkpoint (once; the result is kept), and how every later training
    is where its stage does not say."""

    @abstractmethod
    def open(self, root: Path) -> Task:
        """Load what the config names; relative paths start at `root`, the folder of the spec.

        Raises DataError where a file is missing, damaged or does not fit, TaskFailure for the user's code.
        """

    def check(self, root: Path) -> None:
        """See that what the config names is there, without loading data. Raises DataError that tells every file that is
        missing, TaskFailure for the user's code."""
        missing = []
        for file in dict.fromkeys(self.files):
            try:
                locate(file, root)
            except DataError as error:
                missing.append(str(error))
        if missing:
            raise DataError("; ".join(missing))

    def about(self, root: Path) -> dict[str, Any]:
        """What a person who deploys the model must know of inputs and outputs, as plain data: it stands in the manifest
        of every bundle."""
        return {}

    @property
    def judged_by(self) -> TaskMetric:
        """What its accuracy is."""
        return ACCURACY

    @property
    @abstractmethod
    def files(self) -> list[str]:
        """What it names of them, as the spec has them; relative ones start at its folder."""

    @property
    def own_weights(self) -> bool:
        """Whether weights are what the user's code makes of whatever it reads: every `qsweep run` looks whether they
        are still the same."""
        return False

    @property
    @abstractmethod
    def pretrained(self) -> bool:
        """Whether `Task.model` comes with trained weights."""

    @property
    def doubt(self) -> str | None:
        """What a person is told before anything is spent on it."""
        return None

    @abstractmethod
    def fingerprint(self, root: Path) -> str:
        """SHA-256 over the content the results depend on: data files, checkpoint, the user's code."""
