from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_task import Toy

from qsweep.baseline import baseline, baseline_key, kept, weights_hash
from qsweep.batches import Losses, parts
from qsweep.check import check
from qsweep.errors import DataError, NotFinite, Refused, SpecError, TaskFailure
from qsweep.evaluate import accuracy, judged, predict
from qsweep.prune.magnitude import Magnitude
from qsweep.ship import compress
from qsweep.spec import Spec
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.study.plan import check as check_plan
from qsweep.tasks.base import Samples, SplitName, Task, Training
from qsweep.tasks.image_classification import ImageClassification
from qsweep.train import fine_tune, fit
from qsweep.weights import masks, weight_names

TRAINING = Training(batch_size=16, epochs=3, learning_rate=0.1)


def trained(task: Toy, seed: int = 0, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """`options`: fields of `Training`, and what `fit` takes."""
    torch.manual_seed(0)
    model = model or task.model()
    fields = {name: options.pop(name) for name in list(options) if name in Training.model_fields}
    fit(model, task, TRAINING.model_copy(update=fields), seed=seed, **options)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    assert same(trained(Toy(dropout=0.5)), trained(Toy(dropout=0.5)))


def test_another_seed_gives_other_weights() -> None:
    assert not same(trained(Toy()), trained(Toy(), seed=1))


def of_validation(model: nn.Module, task: Task) -> float:
    inputs, labels = task.samples("validation")
    return accuracy(task, predict(model, task, inputs), labels)


@pytest.mark.parametrize("fields", [{}, {"optimizer": "adamw", "learning_rate": 0.01}], ids=["sgd", "adamw"])
def test_training_raises_the_accuracy(fields: dict[str, Any]) -> None:
    task = Toy(count=256)
    model = task.model()
    before = of_validation(model, task)
    trained(task, model=model, epochs=10, **fields)
    assert of_validation(model, task) > max(0.85, before)


def test_a_model_of_images_may_have_weights_of_volumes() -> None:
    volumes = nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 4, 1), nn.Flatten()
    model = nn.Sequential(nn.Conv2d(1, 4, 1), *volumes, nn.Linear(256, 2))
    before = model[2].weight.detach().clone()
    assert not torch.equal(trained(Toy(), model=model)[2].weight, before)  # type: ignore[index]


def test_training_leaves_the_random_numbers_of_the_process_alone() -> None:
    task, model = Toy(), Toy(dropout=0.5).model()
    before = torch.get_rng_state()
    fit(model, task, TRAINING, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trained_model_is_contiguous_in_eval_mode_and_without_gradients() -> None:
    model = trained(Toy())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(value.is_contiguous() for value in model.state_dict().values())


@given(count=st.integers(2, 200), size=st.integers(2, 50))
def test_every_sample_is_in_one_batch_and_none_is_alone(count: int, size: int) -> None:
    batches = parts(torch.arange(count), size)
    assert torch.equal(torch.cat(batches), torch.arange(count))
    assert all(2 <= len(batch) <= size + 1 for batch in batches)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_biases_and_batch_norm(optimizer: str) -> None:
    task, model = Toy(), Toy().model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained(task, model=model, epochs=1, optimizer=optimizer, loss=lambda x, outputs, y: 0 * outputs.sum())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.dim() < 2), name


@pytest.mark.parametrize(
    ("optimizer", "rates"), [("sgd", (0.05, 0.01, 5e-4)), ("adamw", (1e-3, 3e-4, 1e-2))], ids=["sgd", "adamw"]
)
def test_what_is_not_said_is_what_the_optimizer_usually_takes(
    optimizer: Any, rates: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, fine_tuning, decay = rates
    training = Training(optimizer=optimizer)
    assert (training.rate, training.decay) == (scratch, decay)
    assert Training(optimizer=optimizer, learning_rate=scratch, weight_decay=decay).uid() == training.uid()
    assert Training(optimizer=optimizer, weight_decay=0.0).decay == 0
    assert Training(optimizer=optimizer, weight_decay=0.0).uid() != training.uid()
    seen = list[Training]()
    monkeypatch.setattr("qsweep.train.fit", lambda model, task, training, **_: seen.append(training))
    context = Context(Toy(), Store(tmp_path), "model", 0, Toy().model, training)
    for stage in (Magnitude(), Magnitude(learning_rate=0.5)):
        fine_tune(Toy().model(), stage, context)
    assert [found.rate for found in seen] == [fine_tuning, 0.5]


def test_a_diverging_training_raises_not_finite() -> None:
    with pytest.raises(NotFinite, match="training loss"):
        trained(Toy(), learning_rate=1e20, epochs=10)


def test_one_training_sample_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2 samples"):
        trained(Toy(count=1))


def test_no_epochs_change_nothing() -> None:
    model = trained(Toy(), epochs=0)
    torch.manual_seed(0)
    assert same(model, Toy().model())


def test_parameters_settle_after_each_step() -> None:
    settled: list[None] = []
    trained(Toy(count=65), epochs=2, settle=lambda: settled.append(None))
    assert len(settled) == 8


def test_the_loss_sees_the_batch_that_the_model_saw() -> None:
    task, model = Toy(), Toy().model()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))

    def loss(inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        assert inputs is seen[-1]
        return task.loss(outputs, labels)

    trained(task, model=model, loss=loss)
    assert seen


def with_zeros(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter("0.weight")[:2] = 0
        model.get_parameter("5.weight")[:, ::2] = 0
    return model


def exported(model: nn.Module) -> torch.fx.GraphModule:
    batch = {0: torch.export.Dim("batch", min=2)}
    graph = torch.export.export(model.train(), (torch.randn(2, 1, 4, 4),), dynamic_shapes=(batch,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    return graph


@pytest.mark.parametrize("form", [with_zeros, lambda model: exported(with_zeros(model))])
def test_kept_zeros_stay_zero_and_the_others_train(form: Any) -> None:
    model = form(Toy().model())
    keep, before = masks(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(Toy(), model=model, keep_zeros=True)
    assert keep.keys() == {"0.weight", "5.weight"}
    for name, parameter in model.named_parameters():
        if name in keep:
            assert torch.equal(parameter != 0, keep[name])
            assert not torch.equal(parameter, before[name])


def test_zeros_move_unless_they_are_to_be_kept() -> None:
    model = trained(Toy(), model=with_zeros(Toy().model()))
    assert (model.get_parameter("5.weight")[:, 32:] != 0).all()  # those of live channels


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.layers = nn.ModuleList([nn.Conv1d(4, 4, 1), nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0]((self.table(x) + self.position).transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.layers[1](x.mean(1))
        return found


def test_the_weights_of_a_graph_are_those_of_its_model_without_embeddings() -> None:
    model, names = Tokens(), ["layers.0.weight", "layers.1.weight"]
    graph = torch.export.export(model, (torch.zeros(2, 3, dtype=torch.long),)).module()
    assert weight_names(model) == names
    assert sorted(weight_names(graph)) == names


def test_prediction_is_in_eval_mode_and_puts_every_mode_back() -> None:
    model = Toy(dropout=0.9).model().train()
    model.get_submodule("1").eval()
    modes = [module.training for module in model.modules()]
    inputs = Toy().samples("test").inputs
    assert torch.equal(predict(model, Toy(), inputs), predict(model, Toy(), inputs))
    assert [module.training for module in model.modules()] == modes


def test_evaluation_scores_every_sample_whatever_the_batch_size() -> None:
    task, model = Toy(), Toy().model()
    inputs, labels = task.samples("test")
    scores = judged(task, predict(model, task, inputs, batch_size=10), labels)
    assert scores.shape == (65,)
    assert torch.equal(scores, judged(task, predict(model, task, inputs, batch_size=1000), labels))


def test_outputs_that_are_not_finite_raise() -> None:
    with pytest.raises(NotFinite, match="outputs must be finite"):
        predict(lambda inputs: inputs.flatten(1) / 0, Toy(), Toy().samples("test").inputs)


def test_a_result_is_computed_once_and_a_failure_is_not_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute_on(model: nn.Module, fail: bool) -> None:
        calls.append(1)
        nn.init.ones_(model.get_parameter("5.weight"))
        if fail:
            raise NotFinite("no")

    for fail in (True, False, True):
        model = Toy().model()
        try:
            kept(model, Store(tmp_path), "ab" * 32, lambda checkpoint, model=model, fail=fail: compute_on(model, fail))  # type: ignore[misc]
        except NotFinite:
            assert fail
    assert len(calls) == 2
    assert (model.get_parameter("5.weight") == 1).all()


DIGITS = {"model": {"arch": "digits_cnn"}, "data": {"method": "digits"}, "training": {"epochs": 8}}


def test_the_baseline_is_trained_once_and_the_same_for_all_who_ask(tmp_path: Path) -> None:
    config = ImageClassification.model_validate(DIGITS)
    task, store = config.open(tmp_path), Store(tmp_path / "sweeps" / "store")
    lines: list[str] = []
    models = [baseline(task, config, root=tmp_path, store=store, seed=0, progress=lines.append) for _ in range(2)]
    assert same(*models)
    assert len(lines) == 1 + 8
    assert of_validation(models[0], task) >= 0.95


class Windowed(Toy):
    """Its window is a part of a larger tensor."""

    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("window", torch.hann_window(8))
        return model


def test_a_model_with_a_part_of_a_tensor_is_kept_with_it(tmp_path: Path) -> None:
    found = [kept(Windowed().model(), Store(tmp_path), "ab" * 32, lambda checkpoint: None) for _ in range(2)]
    assert all(torch.equal(model.get_buffer("window"), torch.hann_window(8)) for model in found)


def test_the_identity_of_a_baseline_holds_its_training_and_seed(tmp_path: Path) -> None:
    config = ImageClassification.model_validate(DIGITS)
    other = config.model_copy(update={"training": Training(epochs=9)})
    keys = {baseline_key(config, tmp_path, 0), baseline_key(config, tmp_path, 1), baseline_key(other, tmp_path, 0)}
    assert len(keys) == 3


def test_the_identity_of_weights_holds_their_names_numbers_types_and_shapes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("table", torch.zeros(2), persistent=False)
    others = [copy.deepcopy(model) for _ in range(6)]
    with torch.no_grad():
        others[0][0].weight[1, 1] += 1e-6
        others[1][1].running_mean[0] += 1e-6
    others[2][0].weight.data = others[2][0].weight.data.reshape(2, 3)
    others[3].half()
    others[4] = nn.Sequential(nn.Identity(), *others[4])
    others[5].table[0] = 1
    assert weights_hash(copy.deepcopy(model)) == weights_hash(model)
    assert len({weights_hash(each) for each in (model, *others)}) == 7


class Broken(Toy):
    """A task with one thing wrong."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong = wrong

    def samples(self, split: SplitName) -> Samples:
        if self.wrong == split:
            raise DataError(f"no {split}")
        return super().samples(split)

    def transform(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        transformed = super().transform(inputs, generator)
        return transformed[:, :, 1:] if self.wrong == "augmentation" and generator else transformed

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels) * (torch.nan if self.wrong == "loss" else 1)


@pytest.mark.parametrize(
    ("wrong", "error", "complaint"),
    [
        ("test", DataError, "no test"),
        ("augmentation", TaskFailure, r"must keep shape \(4, 1, 4, 4\)"),
        ("loss", NotFinite, "loss of the first samples of `train`"),
    ],
)
def test_a_check_finds_what_is_wrong_before_any_trial(wrong: str, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        check(Broken(wrong), Toy().model())


def test_a_check_names_what_a_model_raises_or_returns_wrongly() -> None:
    with pytest.raises(TaskFailure, match="the model raised RuntimeError"):
        check(Toy(), nn.Conv2d(3, 1, 1))
    with pytest.raises(TaskFailure, match="must give 4 outputs"):
        check(Toy(), nn.Flatten(0))


def test_a_check_asks_for_one_sample_alone() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2].unsqueeze(1).squeeze()

    class Compared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] - x.mean()

    with pytest.raises(
        TaskFailure, match=r"must give \(1, 2\) for one sample, as for each of 4 \(got \(2,\)\): `squeeze"
    ):
        check(Toy(), Squeezed())
    (told,) = {note.partition(" (")[0] for note in check(Toy(), Compared())}
    assert told == "the model's outputs for a sample depend on the others of its batch"


def test_a_loss_without_a_gradient_and_random_inputs_are_told() -> None:
    class Detached(Toy):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().loss(outputs.detach(), labels)

    class Augmented(Toy):
        def transform(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return super().transform(inputs) + torch.rand(len(inputs), 1, 1, 1)

    class InPlace(Toy):
        def transform(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
            found = super().transform(inputs)
            inputs += 1
            return found

    with pytest.raises(TaskFailure, match="must leave the samples as they are"):
        check(InPlace(), Toy().model())
    (told,) = check(Detached(), Toy().model())
    assert told.startswith("the task's `loss` gives the model's parameters no gradient (`no_grad`, `detach()`)")
    assert check(Detached(), Toy().model().requires_grad_(False)) == []
    with pytest.raises(TaskFailure, match="`transform` must give the same each time when it is given no generator"):
        check(Augmented(), Toy().model())


def test_a_loss_may_need_more_samples_than_a_few() -> None:
    class Pairs(Toy):
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return super().loss(outputs, labels) if len(labels) > 4 else outputs.sum() * torch.nan

    assert check(Pairs(), Toy().model()) == []


def test_a_number_that_is_in_no_table_is_told_with_its_samples() -> None:
    stored, task = torch.full((12, 2), 128), Toy()  # which `Toy.transform` makes 0 of
    stored[9, 1] = 128 * 51
    table = nn.Embedding(50, 4)
    with pytest.raises(TaskFailure, match=r"IndexError for one of samples 8 to 11, counted from 0: index out of range"):
        predict(lambda x: table(x.long()), task, stored, batch_size=4)


def test_a_model_that_draws_random_numbers_is_told() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] + torch.randn(len(x), 2)

    with pytest.raises(TaskFailure, match="the same outputs for the same inputs"):
        check(Toy(), Noisy())


def test_a_sound_task_passes_the_check() -> None:
    check(Toy(), Toy().model())


@pytest.mark.parametrize("fields", [{}, {"schedule": "cosine"}, {"optimizer": "adamw"}], ids=str)
def test_a_training_that_was_killed_goes_on_from_its_checkpoint_to_the_same_bits(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def stop() -> None:
        before.append(None)
        if len(before) == 6:
            raise KeyboardInterrupt

    checkpoint, before, after, all_ = tmp_path / "epoch.pt", list[None](), list[None](), list[None]()
    whole = trained(Toy(dropout=0.5), **fields, settle=lambda: all_.append(None))
    with pytest.raises(KeyboardInterrupt):
        trained(Toy(dropout=0.5), **fields, checkpoint=checkpoint, settle=stop)
    assert checkpoint.exists()
    found = trained(Toy(dropout=0.5), **fields, checkpoint=checkpoint, settle=lambda: after.append(None))
    assert same(found, whole)
    assert len(all_) - 6 <= len(after) < len(all_)


def test_a_training_on_the_cpu_asks_nothing_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # as NVML says of a driver that PyTorch cannot use
    monkeypatch.setattr("torch.cuda._lazy_init", too_old)
    trained(Toy(), checkpoint=tmp_path / "epoch.pt")
    assert (tmp_path / "epoch.pt").exists()


def test_a_damaged_checkpoint_counts_as_none(tmp_path: Path) -> None:
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "epoch.pt").write_bytes(content)
        assert same(trained(Toy(), checkpoint=tmp_path / "epoch.pt"), trained(Toy()))


def test_bf16_trains_float32_parameters(tmp_path: Path) -> None:
    found, exact = trained(Toy(), precision="bf16"), trained(Toy())
    assert not same(found, exact)
    assert all(parameter.dtype is torch.float32 for parameter in found.parameters())
    pairs = zip(found.parameters(), exact.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=0.1) for one, other in pairs)


@pytest.mark.parametrize("look", [1, 4])
def test_a_loss_that_is_not_finite_is_seen_at_the_next_look_or_at_the_end_of_the_epoch(look: int) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        losses, seen = Losses(torch.device("cpu"), look), list[int]()
        for step, value in enumerate([1.0, bad, -bad, 1.0, 1.0], 1):
            try:
                losses.add(torch.tensor(value), 2, step)
            except NotFinite:
                seen.append(step)
        assert seen[0] == {1: 2, 4: 4}[look]
        with pytest.raises(NotFinite, match="training loss"):
            losses.mean()


@given(values=st.lists(st.integers(-8, 8), min_size=1, max_size=9), look=st.integers(1, 9))
def test_the_mean_loss_is_that_over_samples(values: list[int], look: int) -> None:
    losses = Losses(torch.device("cpu"), look)
    for step, value in enumerate(values, 1):
        losses.add(torch.tensor(float(value)), step, step)
    weights = range(1, len(values) + 1)
    assert losses.mean() == sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # the compiler's own
def test_compiled_training_takes_the_same_steps() -> None:
    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

    task = Toy(count=64 + 6)  # four batches that are compiled for, and one that is not
    found, eager = (trained(task, model=linear(), compile=compiled, epochs=2) for compiled in (True, False))
    assert not same(found, linear())
    for one, other in zip(found.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_model_that_does_not_compile_is_refused_rather_than_run_without() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.linear(x.flatten(1))
            return found if found.sum().item() > 0 else -found

    with pytest.raises(TaskFailure, match=r"task\.training\.compile"):
        trained(Toy(), model=Branching(), compile=True)


def test_training_on_a_gpu_that_is_not_there_is_refused_with_the_reason() -> None:
    reason = Training(device="cuda").unavailable()
    assert Training().unavailable() is None
    assert (reason is None) == torch.cuda.is_available()
    assert reason is None or "device: cuda" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_and_a_compression_that_would_train_on_it_do_not_start() -> None:
    spec = Spec.model_validate(
        {
            "name": "toy",
            "task": DIGITS | {"method": "image_classification"},
            "compress": {},
            "target": {"engine": "float"},
        }
    )
    check_plan(spec)
    training = Training(device="cuda")
    other = spec.task.model_copy(update={"training": training})
    with pytest.raises(SpecError, match=r"`task\.training\.device`: `device: cuda` needs"):
        check_plan(spec.model_copy(update={"task": other}))
    with pytest.raises(Refused, match="`device: cuda` needs"):
        compress(Toy().model(), {"target": {"engine": "float"}}, Toy(), training=training)


class Detached(Toy):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels).detach()


@pytest.mark.parametrize("task", [Toy(), Detached()], ids=["frozen", "detached"])
def test_a_loss_without_a_gradient_is_a_typed_failure(task: Toy) -> None:
    model = task.model().requires_grad_(isinstance(task, Detached))
    with pytest.raises(TaskFailure, match="the loss must depend on the model's parameters"):
        trained(task, model=model)
