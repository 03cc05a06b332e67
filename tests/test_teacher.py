"""Distillation from a model of the task's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from several_task import Boxes, Detector
from torch import Tensor, nn
from toy_task import Toy

import qsweep
from qsweep.build import context_of
from qsweep.check import check, doubts_of_teacher
from qsweep.errors import TaskFailure
from qsweep.store import Store
from qsweep.tasks._user import guarded
from qsweep.tasks.python import Python

QAT = {"method": "qat", "epochs": 15, "learning_rate": 0.1}
DISTILLED = {"method": "logits", "alpha": 1.0, "epochs": 15, "learning_rate": 0.1}


class Reversed(nn.Module):
    """Takes the brighter half for the darker one, and is sure of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.reshape(len(x), 2, 8).mean(2).unbind(1)
        return self.weight * torch.stack([second - first, first - second], 1)


class Taught(Toy):
    def teacher(self) -> nn.Module:
        return Reversed()


def accuracy(task: Any, compress: dict[str, Any]) -> float:
    torch.manual_seed(0)
    model = qsweep.compress(task.model(), {"compress": compress, "target": {"engine": "reference"}}, task)
    assert model.metrics.accuracy is not None
    return model.metrics.accuracy


@pytest.mark.parametrize("quantize", [None, QAT], ids=["float", "qat"])
def test_a_student_follows_the_teacher_of_its_task(quantize: dict[str, Any] | None) -> None:
    distill = DISTILLED if quantize is None else DISTILLED | {"epochs": 0}
    assert accuracy(Taught(257), {"distill": distill, "quantize": quantize or {"method": "ptq"}}) < 0.3
    assert accuracy(Taught(257), {"quantize": QAT}) > 0.7


class Knowing(Toy):
    """Its teacher is right."""

    def teacher(self) -> nn.Module:
        teacher = Reversed()
        teacher.weight.data.neg_()
        return teacher


def test_a_teacher_that_is_worse_than_the_model_is_told() -> None:
    right, wrong = Knowing().teacher(), Taught().teacher()
    (said,) = doubts_of_teacher(Taught(), right)
    assert said == (
        "`teacher()` scores 0 on the first 65 validation samples, less than the model (1), which would follow it"
    )
    assert not [*doubts_of_teacher(Knowing(), right), *doubts_of_teacher(Knowing(), wrong)]
    assert not [*doubts_of_teacher(Toy(), right)]


WITH_TEACHER = """
import sys
from pathlib import Path
sys.path.append({here!r})
from test_teacher import Reversed
from toy_task import Toy

class Task(Toy):
    def teacher(self):
        model = Reversed()
        model.weight.data.fill_(float(Path({file!r}).read_text()))
        return model

class Plain(Toy):
    pass
"""


def test_what_follows_another_teacher_is_not_taken_for_the_same(tmp_path: Path) -> None:
    file = tmp_path / "weight"
    code = WITH_TEACHER.format(here=str(Path(__file__).parent), file=str(file))
    (tmp_path / "task.py").write_text(code)

    def key(name: str, weight: str) -> str:
        file.write_text(weight)
        config = Python(file=f"task.py:{name}")
        return context_of(config, config.open(tmp_path), tmp_path, Store(tmp_path / "store"), 0, print).key

    assert key("Task", "4") == key("Task", "4") != key("Task", "5")
    assert key("Plain", "4") == key("Plain", "5") != key("Task", "4")


class Larger(Boxes):
    """Its teacher has more channels; loss and score are those of `Boxes`."""

    def teacher(self) -> nn.Module:
        torch.manual_seed(3)
        model = Detector()
        model.features = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 16, 3), nn.ReLU())
        return model


def test_a_teacher_gives_several_outputs_like_its_student() -> None:
    config = {"compress": {"distill": {"method": "outputs", "alpha": 0.5}, "quantize": {"method": "ptq"}}}
    task = Larger()
    model = qsweep.compress(task.model(), config | {"target": {"engine": "reference"}}, task)
    assert model.metrics.accuracy is not None


class Others(Boxes):
    """Its teacher lacks an output."""

    def teacher(self) -> nn.Module:
        class Fewer(Detector):
            def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Any]:
                return {"logits": super().forward(image, numbers)["logits"]}

        return Fewer()


class Wide(Toy):
    def teacher(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


class Odd(Toy):
    def teacher(self) -> nn.Module:
        return nn.Linear(5, 2)


class Missing(Toy):
    def teacher(self) -> nn.Module:
        raise FileNotFoundError("teacher.pt")


class Nothing(Toy):
    def teacher(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (Wide(), r"`teacher\(\)` must give outputs \(4, 2\), as the model does \(got \(4, 3\)\)"),
        (Odd(), r"`teacher\(\)`: the model raised RuntimeError"),
        (Missing(), r"`Missing.teacher` raised FileNotFoundError: teacher.pt"),
        (Nothing(), r"`Nothing.teacher` must return a torch.nn.Module \(got NoneType\)"),
        (Others(), r"`teacher\(\)`: the model must give .*`logits` \(N, 4\), and `logits`"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_teacher_that_cannot_be_followed_is_told_before_anything_is_spent(task: Any, complaint: str) -> None:
    own = guarded(task)
    with pytest.raises(TaskFailure, match=complaint):
        check(own, own.model())
