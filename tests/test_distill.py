from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_prune import context, model, zeros
from torch import Tensor, nn
from toy_task import Toy

from qsweep.build import Clock, compress
from qsweep.distill._loss import divergence, squared, with_teacher
from qsweep.distill.logits import Logits
from qsweep.distill.outputs import Outputs
from qsweep.errors import Refused, TaskFailure
from qsweep.evaluate import predict
from qsweep.prune._global import zero_smallest
from qsweep.prune.magnitude import Magnitude
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT
from qsweep.spec import Compression


def logits(seed: int, *shape: int) -> Tensor:
    return 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(temperature=st.floats(0.5, 20), seed=st.integers(0, 100))
def test_the_divergence_is_the_sum_of_its_definition(temperature: float, seed: int) -> None:
    student, teacher = logits(seed, 4, 3), logits(seed + 1, 4, 3)
    p, q = (F.softmax(each / temperature, 1) for each in (teacher, student))
    expected = (p * (p / q).log()).sum(1).mean()
    assert torch.allclose(divergence(student, teacher, temperature), expected, atol=1e-9)


def test_the_divergence_from_itself_is_zero() -> None:
    assert divergence(logits(0, 4, 3), logits(0, 4, 3), 2.0).item() == 0


def test_classes_are_the_second_dimension_of_dense_outputs() -> None:
    student, teacher = logits(0, 2, 3, 4, 4), logits(1, 2, 3, 4, 4)
    flat = [each.movedim(1, -1).reshape(-1, 3) for each in (student, teacher)]
    assert torch.allclose(divergence(student, teacher, 2.0), divergence(flat[0], flat[1], 2.0))


def test_classes_of_tokens_are_the_dimension_that_labels_lack() -> None:
    student, teacher = logits(0, 2, 5, 3), logits(1, 2, 5, 3)
    labels = torch.zeros(2, 5, dtype=torch.long)
    flat = [each.reshape(-1, 3) for each in (student, teacher)]
    expected = 2.0**2 * divergence(flat[0], flat[1], 2.0)
    assert torch.allclose(Logits(temperature=2.0).distance(student, teacher, labels), expected)


@pytest.mark.parametrize(("student", "teacher"), [((4,), (4,)), ((4, 3), (4, 2)), ((4, 1), (4, 1))])
def test_outputs_that_cannot_be_compared_are_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(TaskFailure, match="distillation needs logits"):
        divergence(torch.zeros(student), torch.zeros(teacher), 1.0)


@pytest.mark.parametrize(
    ("labels", "fits"),
    [((8,), True), ((8, 6), True), ((8, 5), False), ((8, 2, 6), False)],
)
def test_labels_that_are_no_classes_are_not_distilled_by_logits(labels: tuple[int, ...], fits: bool) -> None:
    """Two logits and four numbers of a box; shares of six classes."""
    outputs, targets = torch.randn(8, 6), torch.randn(8, 6)
    for found in (torch.rand(labels), torch.randint(0, 6, labels)):
        if fits or not found.is_floating_point():
            assert Logits().distance(outputs, targets, found).isfinite()
        else:
            with pytest.raises(TaskFailure, match="`method: outputs` follows outputs of any kind"):
                Logits().distance(outputs, targets, found)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_weighs_teacher_and_labels_by_alpha(alpha: float) -> None:
    teacher, inputs, outputs, labels = nn.Linear(4, 3), torch.randn(5, 4), torch.randn(5, 3), torch.arange(5) % 3
    loss = with_teacher(teacher, F.cross_entropy, Logits(temperature=4.0).distance, alpha)(inputs, outputs, labels)
    soft = F.kl_div(F.log_softmax(outputs / 4, 1), F.softmax(teacher(inputs) / 4, 1), reduction="batchmean")
    assert torch.allclose(loss, alpha * 16 * soft + (1 - alpha) * F.cross_entropy(outputs, labels), atol=1e-6)


def test_the_teacher_gets_no_gradient_and_is_in_eval_mode() -> None:
    teacher = Toy(dropout=0.5).model().train()
    outputs = torch.randn(6, 2, requires_grad=True)
    loss = with_teacher(teacher, F.cross_entropy, Logits(temperature=2.0).distance, 0.5)
    loss(torch.randn(6, 1, 4, 4), outputs, torch.zeros(6, dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_a_student_that_follows_only_its_teacher_comes_closer_to_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher, inputs = Toy().model().eval(), Toy().samples("validation").inputs
    targets = predict(teacher, Toy(), inputs)
    before = divergence(predict(model(), Toy(), inputs), targets, 1.0)
    stage = Logits(temperature=2.0, alpha=1.0, epochs=10, learning_rate=0.1)
    student = stage.apply(model(), context(tmp_path, original=lambda: teacher))
    assert divergence(predict(student, Toy(), inputs), targets, 1.0) < 0.5 * before


class Measured(Toy):
    """A number for each sample, (B,)."""

    def model(self) -> nn.Module:
        return nn.Sequential(super().model(), nn.Linear(2, 1), nn.Flatten(0))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels.float())


def test_numbers_are_followed_by_their_squared_difference(tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher, student, inputs = Measured().model().eval(), Measured().model(), Measured().samples("validation").inputs
    targets = predict(teacher, Measured(), inputs)
    before = squared(predict(student, Measured(), inputs), targets)
    stage = Outputs(alpha=1.0, epochs=10, learning_rate=0.1)
    found = stage.apply(student, replace(context(tmp_path, original=lambda: teacher), task=Measured()))
    assert squared(predict(found, Measured(), inputs), targets) < 0.5 * before
    assert stage.label() == "outputs"
    with pytest.raises(TaskFailure, match="`method: outputs`"):
        Logits().apply(student, replace(context(tmp_path, original=lambda: teacher), task=Measured()))


def test_numbers_of_another_count_cannot_be_followed() -> None:
    with pytest.raises(TaskFailure, match="distillation needs outputs alike"):
        squared(torch.zeros(4), torch.zeros(4, 1))


def test_zeros_of_a_pruned_student_stay(tmp_path: Path) -> None:
    student = model()
    zero_smallest(student, 0.5)
    count = zeros(student)
    assert zeros(Logits().apply(student, context(tmp_path))) == count


def test_distillation_is_computed_once(tmp_path: Path) -> None:
    lines: list[str] = []
    one, other = (Logits(epochs=2).apply(model(), context(tmp_path, progress=lines.append)) for _ in range(2))
    assert len(lines) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_without_epochs_the_model_stays_as_it_is_and_the_rate_counts_for_nothing(tmp_path: Path) -> None:
    given, stage = model(), Logits(epochs=0, learning_rate=0.1)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    after = stage.apply(given, context(tmp_path)).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert stage.uid() == Logits(epochs=0).uid() != Logits().uid()


@pytest.mark.parametrize(("temperature", "label"), [(4, "T4"), (2.5, "T2.5"), (10.0, "T10"), (3.14159, "T3.1")])
def test_the_name_of_a_distillation_tells_its_temperature(temperature: Any, label: str) -> None:
    assert Logits(temperature=temperature).label() == label


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({"distill": Logits(outputs=["logit"])}, TaskFailure, "`distill.outputs`: must be outputs of the model"),
        ({"quantize": QAT(layer_bits={"clasifier.*": 8})}, Refused, r"`layer_bits`: `clasifier\.\*` must match"),
        ({"quantize": PTQ(float_layers=["front.*"])}, Refused, r"`float_layers`: `front\.\*` must match"),
    ],
    ids=["output", "layer_bits", "float_layers"],
)
def test_what_a_later_stage_refuses_is_told_before_anything_is_trained(
    stages: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    begun: list[str] = []
    found = replace(context(tmp_path), progress=begun.append)
    config = Compression(prune=Magnitude(sparsity=0.5), **stages)
    with pytest.raises(error, match=message):
        compress(config, found.original(), found, Clock())
    assert "prune" not in begun
