"""What is recorded once and replayed, training steps and calls: with QSWEEP_GPU=1 on a GPU, which alone records."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_GPU
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_task import Toy

import qsweep.train
from qsweep.cuda.capture import captured
from qsweep.optimizers import DeviceAdamW, DeviceSGD
from qsweep.quantize._training import prepared, start
from qsweep.quantize.dorefa import DoReFa
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.pact import PACT
from qsweep.quantize.qat import QAT
from qsweep.quantize.trained import Trained
from qsweep.replay import Recorded, own_stream
from qsweep.stage import Context
from qsweep.store import Store
from qsweep.tasks.base import Training

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a GPU records")
METHODS = (LSQ, QAT, PACT, DoReFa)


class Looks(TorchDispatchMode):
    """Collects the ops that make a number on the CPU of a tensor, or a tensor of numbers."""

    OPS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [name] if (name := op.name().split("::")[1].split(".")[0]) in self.OPS else []
        return op(*args, **(kwargs or {}))


def context(folder: Path, task: Toy, **training: Any) -> Context:
    settings = Training(batch_size=16, **training)
    return Context(task, Store(folder), "model", 0, task.model, settings, progress=lambda text: None)


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation_scheme": "asymmetric"}, {"weight_granularity": "tensor"}, {"activation_mode": "token"}],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_no_step_looks_at_values(method: type[Trained], fields: dict[str, Any], tmp_path: Path) -> None:
    if fields.get("activation_mode", "static") not in method.modes:
        pytest.skip("refused")
    task = Toy()
    inputs, labels = task.transform(task.samples("train").inputs[:16]), task.samples("train").labels[:16]
    graph = prepared(method(**fields), task.model().eval(), context(tmp_path, task)).graph
    start(graph, 8, inputs)
    qsweep.train.set_mode(graph, training=True)
    settle = [module.settle for module in graph.modules() if hasattr(module, "settle")]
    with Looks() as looks:
        task.loss(graph(inputs), labels).backward()
        for one in settle:
            one()
    assert settle
    assert looks.found == []
    with Looks() as looks:
        task.loss(graph(inputs), labels).item()
    assert looks.found == ["_local_scalar_dense"]


SETTINGS = {
    "sgd": (torch.optim.SGD, DeviceSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "without momentum": (torch.optim.SGD, DeviceSGD, {"lr": 0.1, "momentum": 0.0}),
    "adamw": (torch.optim.AdamW, DeviceAdamW, {"lr": 0.1, "betas": (0.9, 0.999)}),
}


@pytest.mark.parametrize(("known", "own", "settings"), SETTINGS.values(), ids=SETTINGS.keys())
def test_rates_on_the_device_are_those_of_the_schedule(known: Any, own: Any, settings: dict[str, Any]) -> None:
    found = []
    for kind in (known, own):
        values = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), nn.Parameter(torch.ones(2))]
        groups = [{"params": values[:1], "weight_decay": 0.1}, {"params": values[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, **settings)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
        for _ in range(4):
            optimizer.zero_grad()
            sum((value**2).sum() for value in values).backward()
            optimizer.step()
            rate.step()
        assert all(isinstance(group["lr"], float) for group in optimizer.state_dict()["param_groups"])
        found.append(values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def remembered(optimizer: torch.optim.Optimizer) -> set[int]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return {id(value) for value in values if isinstance(value, Tensor)}


@pytest.mark.parametrize(("known", "own", "settings"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_gradient_that_comes_late_finds_what_it_needs(known: Any, own: Any, settings: dict[str, Any]) -> None:
    found = []
    for kind in (known, own):
        values = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), nn.Parameter(torch.ones(2))]
        optimizer = kind([{"params": values}], **settings)
        kept = remembered(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            sum((value**2).sum() for value in (values if step > 1 else values[:1])).backward()
            optimizer.step()
        found.append(values)
        if kind is own:  # nothing new that a replay would not know
            assert kept >= {
                id(value) for state in optimizer.state.values() for value in state.values() if value is not None
            }
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


class Graph:
    """Of a device that is not here."""

    def replay(self) -> None:
        pass


def test_a_recording_that_is_let_go_of_frees_its_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Graph]] = []

    def graph() -> Graph:
        new = Graph()
        made.append(weakref.ref(new))
        return new

    fakes = {"CUDAGraph": graph, "graph": lambda *_, **__: nullcontext(), "empty_cache": lambda: None}
    fakes |= {"memory_reserved": lambda: 0, "mem_get_info": lambda: (1, 1), "current_stream": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(f"torch.cuda.{name}", fake)
    monkeypatch.setattr("torch._C._cuda_clearCublasWorkspaces", lambda: None, raising=False)
    recorded = Recorded(lambda inputs, labels: inputs.sum(), 2, lambda: None)
    monkeypatch.setattr(recorded, "_watched", recorded._step)
    for _ in range(5):
        recorded(torch.ones(2), torch.ones(2))
    assert made[0]() is not None
    gc.disable()
    try:
        monkeypatch.undo()
        del recorded
        assert made[0]() is None
    finally:
        gc.enable()


def weights(method: type[Trained], folder: Path, task: Toy, **training: Any) -> dict[str, Tensor]:
    """Of what a training on the GPU ships."""
    torch.manual_seed(0)
    found = method(epochs=2, weight_bits=4).apply(task.model().eval(), context(folder, task, device="cuda", **training))
    return found.graph.state_dict()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step that was to be recorded could be."""
    found: list[bool] = []
    record = Recorded._recorded

    def watched(self: Recorded, inputs: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        step = record(self, inputs, labels)
        found.append(self._records)
        return step

    monkeypatch.setattr(Recorded, "_recorded", watched)
    return found


def assert_as_issued(
    method: type[Trained], folder: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch, **training: Any
) -> None:
    """Replayed steps give the weights that issued ones give, bit for bit."""
    task = Toy(count=100)
    replayed = weights(method, folder / "replayed", task, **training)
    assert recorded == [True]
    monkeypatch.setattr(qsweep.train, "_replayed", lambda issued, *_: issued)
    issued = weights(method, folder / "issued", task, **training)
    assert recorded == [True]
    assert all(torch.equal(issued[name], replayed[name]) for name in issued)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_replayed_steps_train_to_the_same_bits(
    method: type[Trained], precision: str, tmp_path: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_issued(method, tmp_path, recorded, monkeypatch, precision=precision)


@needs_gpu
def test_replayed_steps_of_adamw_train_to_the_same_bits(
    tmp_path: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_issued(LSQ, tmp_path, recorded, monkeypatch, optimizer="adamw")


@needs_gpu
def test_a_recorded_training_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(LSQ, tmp_path / "whole", Toy(count=100))
    save, epochs = qsweep.train.Progress.save, list[int]()

    def stop(self: qsweep.train.Progress, path: Path, done: int) -> None:
        save(self, path, done)
        epochs.append(done)
        if epochs == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(qsweep.train.Progress, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        weights(LSQ, tmp_path / "killed", Toy(count=100))
    killed = weights(LSQ, tmp_path / "killed", Toy(count=100))
    assert epochs == [1, 2]
    assert recorded == [True, True, True]
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@needs_gpu
def test_a_compiled_step_is_recorded_and_trains_as_one_that_is_issued(
    tmp_path: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_issued(LSQ, tmp_path, recorded, monkeypatch, compile=True)


class Looking(Toy):
    """Its loss waits for the device."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        value = super().loss(outputs, labels)
        return value * (1.0 if value.item() > 0 else 2.0)


@needs_gpu
def test_a_loss_that_looks_at_values_is_issued_to_the_same_bits(tmp_path: Path, recorded: list[bool]) -> None:
    looking = weights(LSQ, tmp_path / "looking", Looking(count=100))
    assert recorded == []
    plain = weights(LSQ, tmp_path / "plain", Toy(count=100))
    assert recorded == [True]
    assert all(torch.equal(plain[name], looking[name]) for name in plain)


@needs_gpu
def test_where_memory_is_short_steps_are_issued_to_the_same_bits(
    tmp_path: Path, recorded: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = weights(LSQ, tmp_path / "plain", Toy(count=100))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 10, 1 << 30))
    short = weights(LSQ, tmp_path / "short", Toy(count=100))
    assert recorded == [True, False]
    assert all(torch.equal(plain[name], short[name]) for name in plain)


@needs_gpu
def test_a_step_that_cannot_be_recorded_is_issued() -> None:
    device = torch.device("cuda")
    weight, stream = torch.ones(4, device=device), torch.cuda.Stream()

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        weight.add_(1)
        if torch.cuda.is_current_stream_capturing():
            stream.synchronize()
            torch.cuda.synchronize()
        return weight.sum()

    with own_stream(device):
        run = Recorded(step, 2, lambda: None)
        values = [run(torch.ones(2, device=device), torch.ones(2, device=device)).item() for _ in range(6)]
    assert values == [8.0, 12.0, 16.0, 20.0, 24.0, 28.0]


@needs_gpu
def test_what_a_captured_call_reads_stays_where_it_is() -> None:
    model, inputs = nn.Linear(1000, 1000, device="cuda"), torch.randn(8, 1000, device="cuda")
    with torch.no_grad():
        expected = model(inputs)
    run = captured(model, inputs)
    del model
    others = [torch.full((1000, 1000), torch.nan, device="cuda") for _ in range(64)]
    assert torch.equal(run(inputs), expected)
    assert others
