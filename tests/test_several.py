"""Several inputs, outputs and labels, in tuples and dicts: one tensor each within, their own everywhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from networks import context, needs
from several_task import Boxes, Detector, Words
from torch import Tensor, nn

import qsweep
from qsweep.check import check
from qsweep.distill.logits import Logits
from qsweep.distill.outputs import Outputs
from qsweep.errors import DataError, Refused, TaskFailure
from qsweep.evaluate import accuracy, predict
from qsweep.hub.export import export
from qsweep.hub.insert import Place, insert_observers
from qsweep.machine import no_compiler
from qsweep.quantize.mixed import Mixed
from qsweep.ship import Selector, promote
from qsweep.ship import export as write
from qsweep.ship.model import LoadedModel, engine_of
from qsweep.tasks import Training
from qsweep.tasks._parts import NotParts, Parts, as_dicts, countable, mapped, tensors
from qsweep.tasks._user import UserTask, guarded
from qsweep.tasks.python import Python
from qsweep.train import fit

TRAINING = Training(epochs=20, batch_size=32, optimizer="adamw", learning_rate=3e-3)
TASKS = [Boxes, Words]


@cache
def trained(kind: type) -> tuple[UserTask, nn.Module]:
    task = guarded(kind())
    torch.manual_seed(0)
    model = task.model()
    fit(model, task, TRAINING, seed=0)
    return task, model


@pytest.fixture(params=TASKS, ids=lambda kind: kind.__name__)
def learnt(request: pytest.FixtureRequest) -> tuple[UserTask, nn.Module]:
    return trained(request.param)


def own(learnt: tuple[UserTask, nn.Module]) -> nn.Module:
    """The model as its user has it."""
    task, model = learnt
    plain: nn.Module = task._task.model()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def given(learnt: tuple[UserTask, nn.Module]) -> Any:
    """What the model takes, of the first test samples."""
    task, _ = learnt
    return task.parts["inputs"].apart(task.transform(task.samples("test").inputs[:20]))


def called(model: Callable[..., Any], inputs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def test_a_model_learns_and_gives_what_it_gives_its_user(learnt: tuple[UserTask, nn.Module]) -> None:
    task, model = learnt
    check(task, model)
    inputs, labels = task.samples("validation")
    outputs = predict(model, task, inputs)
    assert accuracy(task, outputs, labels) > 0.8
    wanted = called(own(learnt), task.parts["inputs"].apart(task.transform(inputs)))
    found = task.parts["outputs"].apart(outputs)
    assert dict(tensors(wanted)).keys() == dict(tensors(found)).keys()
    for path, value in tensors(wanted):
        torch.testing.assert_close(dict(tensors(found))[path], value)


def own_joined(learnt: tuple[UserTask, nn.Module]) -> nn.Module:
    """A copy of the model, which a stage may change."""
    return deepcopy(learnt[1])


ENGINES = ["reference", "onnxruntime", "openvino", *(["inductor"] if no_compiler() is None else [])]


@pytest.fixture(
    scope="module",
    params=[*((kind, engine) for kind in TASKS for engine in ENGINES), (Boxes, "executorch"), (Boxes, "litert")],
    ids=lambda both: f"{both[0].__name__} on {both[1]}",
)
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type, LoadedModel, Path]:
    """The int8 model of a task on an engine, and its bundle."""
    kind, engine = request.param
    needs(engine)
    folder = tmp_path_factory.mktemp("shipped") / "bundle"
    config = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": engine, "batch_size": 8}}
    return kind, qsweep.compress(own(trained(kind)), config, kind(), folder), folder


def test_what_ships_takes_and_gives_what_the_model_does(shipped: tuple[type, LoadedModel, Path]) -> None:
    learnt, model = trained(shipped[0]), shipped[1]
    inputs = given(learnt)
    wanted, found = called(own(learnt), inputs), model(inputs)
    assert [path for path, _ in tensors(wanted)] == [path for path, _ in tensors(found)]
    for (_, value), (_, other) in zip(tensors(found), tensors(wanted), strict=True):
        assert value.shape == other.shape
        assert (value - other).abs().max() < 0.03 * other.abs().max()
    assert torch.equal(found.logits, found["logits"])
    arrays = model(mapped(inputs, lambda value: value.numpy()))
    assert isinstance(arrays.logits, np.ndarray)
    if isinstance(inputs, tuple):
        assert isinstance(model(list(inputs)).logits, Tensor)
    np.testing.assert_array_equal(arrays.logits, found.logits)


def test_numbers_of_rows_that_a_table_does_not_have_are_refused(shipped: tuple[type, LoadedModel, Path]) -> None:
    kind, model, _ = shipped
    if kind is Boxes:  # which looks nothing up
        assert not any("below" in row for row in model.manifest.interface["inputs"])
        return
    rows = {row["path"][0]: row.get("below") for row in model.manifest.interface["inputs"]}
    assert rows == {"input_ids": 900, "attention_mask": None}
    inputs = given(trained(kind))
    for number in (900, -1):
        wrong = inputs["input_ids"].clone()
        wrong[7, 2] = number
        told = rf"`input_ids` must be numbers of rows of a table, 0 to 899 \(got {number} in sample 7\)"
        with pytest.raises(DataError, match=told):
            model({**inputs, "input_ids": wrong})


def run_onnx(path: Path, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == names
    found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return {each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), found, strict=True)}


def run_openvino(path: Path, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    from qsweep.engines._openvino_graph import core

    settings = json.loads((path.parent / "settings.json").read_text())
    model = core().compile_model(path, "CPU", settings["CPU"])
    found = model({name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return {port.get_any_name(): torch.from_numpy(found[port].copy()) for port in model.outputs}


def run_program(path: Path, given: Any) -> dict[str, Tensor]:
    import torch.ao.quantization.fx._decomposed

    found = torch.export.load(path).module()(as_dicts(given))
    assert type(found) is dict
    return {".".join(map(str, place)): value for place, value in tensors(found)}


def test_what_is_exported_takes_and_gives_them_by_name(shipped: tuple[type, LoadedModel, Path], tmp_path: Path) -> None:
    kind, model, folder = shipped
    inputs = given(trained(kind))
    parts = {role: Parts.read(rows) for role, rows in model.manifest.interface.items()}
    engine = engine_of(model.manifest, folder)
    engine.export(folder / "artifact", tmp_path, parts)
    names = list(inputs) if isinstance(inputs, dict) else ["input_0", "input_1"]
    values = [value for _, value in tensors(inputs)]
    wanted = {".".join(map(str, path)): value for path, value in tensors(model(inputs))}
    match engine.engine:
        case "onnxruntime":
            found = run_onnx(tmp_path / "model.onnx", values, names)
        case "openvino":
            found = run_openvino(tmp_path / "model.xml", values, names)
        case "executorch" | "litert":
            interface = json.loads((tmp_path / "interface.json").read_text())
            assert interface == model.manifest.interface
            return
        case _:
            found = run_program(tmp_path / "model.pt2", inputs)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["float", "openvino"])
def test_numbers_of_words_among_inputs_are_not_rounded_by_bf16(engine: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    task, model = trained(Words)
    config = {"compress": {"quantize": {"method": "cast", "dtype": "bf16"}}, "target": {"engine": engine}}
    try:
        shipped = qsweep.compress(own((task, model)), config, task._task)
    except Refused as error:
        pytest.skip(str(error))
    inputs, labels = task.samples("validation")
    assert shipped.metrics.accuracy == pytest.approx(accuracy(task, predict(model, task, inputs), labels), abs=0.02)


def test_inputs_of_different_scales_have_grids_of_their_own() -> None:
    task = guarded(Boxes())
    example = task.transform(task.samples("train").inputs[:2])
    places: list[Place] = []
    insert_observers(export(task.model(), example), places.append, lambda place: None)
    assert [place.layers for place in places if place.inputs] == [("features.0.weight",), ("table.weight",)]


def test_kernels_of_gpus_take_several_inputs(device: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from qsweep.cuda.chain import Chain
    from qsweep.quantize.ptq import PTQ

    for kind in TASKS:
        task = guarded(kind())
        torch.manual_seed(0)
        model = task.model().eval()
        inputs = task.transform(task.samples("test").inputs[:4])
        quantized = PTQ(calibration_samples=40).apply(model, context(tmp_path, kind.__name__, task))
        found = Chain(quantized, 4, device)(inputs.to(device)).cpu()
        torch.testing.assert_close(found, quantized.graph(inputs), atol=1e-4, rtol=1e-4)


class Map(nn.Module):
    """A model of one input and one output, both in dicts, as torchvision's segmentation has its."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(pixel_values)}


class Maps(Boxes):
    def model(self) -> nn.Module:
        return Map()

    def samples(self, split: str) -> tuple[Any, Any]:
        (images, _), _ = super().samples(split)
        return {"pixel_values": images}, images[:, 0].long() // 64

    def transform(self, inputs: Any, generator: torch.Generator | None = None) -> Any:
        return {"pixel_values": inputs["pixel_values"] / 255}

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        return F.cross_entropy(outputs["out"], labels)

    def score(self, outputs: Any, labels: Any) -> Tensor:
        return (outputs["out"].argmax(1) == labels).float().mean((1, 2))


def test_one_tensor_in_a_dict_keeps_its_shape() -> None:
    task = guarded(Maps())
    model = task.model()
    check(task, model)
    inputs, labels = task.samples("validation")
    assert predict(model, task, inputs).shape == (96, 5, 8, 8)
    config = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "onnxruntime", "batch_size": 32}}
    shipped = qsweep.compress(Map(), config, Maps())
    assert shipped({"pixel_values": inputs / 255}).out.shape == (96, 5, 8, 8)
    teacher = Logits().distance(predict(model, task, inputs), torch.zeros(96, 5, 8, 8), labels)
    assert torch.isfinite(teacher)


class Tokens(Words):
    """Whole numbers without a dict around them."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(900, 8), nn.Flatten(), nn.Linear(96, 3))

    def samples(self, split: str) -> tuple[Any, Any]:
        inputs, labels = super().samples(split)
        return inputs["input_ids"], labels

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Any, labels: Tensor) -> Tensor:
        return (outputs.argmax(1) == labels).float()


def test_a_model_of_whole_numbers_is_given_whole_numbers(tmp_path: Path) -> None:
    config = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "onnxruntime", "batch_size": 32}}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(900, 8), nn.Flatten(), nn.Linear(96, 3)).eval()
    shipped = qsweep.compress(model, config, Tokens(), tmp_path / "bundle")
    inputs, _ = Tokens().samples("test")
    torch.testing.assert_close(shipped(inputs), model(inputs).detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(shipped(inputs.numpy()), shipped(inputs).numpy())
    parts = {role: Parts.read(rows) for role, rows in shipped.manifest.interface.items()}
    engine_of(shipped.manifest, tmp_path).export(tmp_path / "bundle" / "artifact", tmp_path, parts)
    (found,) = run_onnx(tmp_path / "model.onnx", [inputs], ["input"]).values()
    torch.testing.assert_close(found, shipped(inputs))


class Rated(nn.Module):
    """The number of one thing and a row of numbers, as recommenders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.things = nn.Embedding(7000, 16)
        self.rest = nn.Linear(4, 16)

    def forward(self, item: Tensor, dense: Tensor) -> Tensor:
        return self.things(item) + self.rest(dense)


class Ratings(Tokens):
    def samples(self, split: str) -> tuple[Any, Any]:
        draw = torch.Generator().manual_seed(0)
        items, dense = torch.randint(0, 7000, (64,), generator=draw), torch.randn(64, 4, generator=draw)
        return {"item": items, "dense": dense}, items % 16


def test_a_number_a_sample_is_not_rounded_by_bf16() -> None:
    torch.manual_seed(0)
    model, (inputs, _) = Rated().eval(), Ratings().samples("test")
    target = {"engine": "float", "batch_size": 8, "compile": False}
    found = qsweep.compress(model, {"compress": {"quantize": {"method": "cast"}}, "target": target}, Ratings())(inputs)
    torch.testing.assert_close(found, called(model, inputs), atol=0.05, rtol=0.05)


def test_where_openvino_would_round_whole_numbers_beside_real_ones_bf16_is_refused() -> None:
    pytest.importorskip("openvino")
    config = {"compress": {"quantize": {"method": "cast"}}, "target": {"engine": "openvino"}}
    with pytest.raises(Refused, match="bf16"):
        qsweep.compress(Rated(), config, Ratings())


class Scaled(nn.Module):
    """An output that no sample changes: beside it OpenVINO computes the other wrongly, for batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.second(self.first(pixel_values).relu())
        return {"out": found.mean((2, 3)), "scale": self.scale.exp().expand(pixel_values.shape[0])}


class Scales(Maps):
    def samples(self, split: str) -> tuple[Any, Any]:
        inputs, labels = super().samples(split)
        return inputs, labels.flatten(1)[:, 0]

    def score(self, outputs: Any, labels: Any) -> Tensor:
        return (outputs["out"].argmax(1) == labels).float()


def test_what_openvino_is_given_computes_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    config = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "openvino", "batch_size": 8}}
    shipped = qsweep.compress(Scaled().eval(), config, Scales(), tmp_path / "bundle")
    parts = {role: Parts.read(rows) for role, rows in shipped.manifest.interface.items()}
    engine_of(shipped.manifest, tmp_path).export(tmp_path / "bundle" / "artifact", tmp_path, parts)
    inputs = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found, wanted = run_openvino(tmp_path / "model.xml", [inputs], ["pixel_values"]), shipped({"pixel_values": inputs})
    for name in ("out", "scale"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-3, rtol=1e-3)


class Masked(nn.Module):
    """Whole numbers alone, of which one is nothing but a mask, as transformers make it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(900, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        words = self.words(input_ids).masked_fill(~attention_mask.bool()[..., None], 0)
        return {"logits": self.head(words.mean(1))}


def test_whole_numbers_that_are_only_masks_run_on_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    config = {"compress": {"quantize": {"method": "ptq"}}, "target": {"engine": "openvino", "batch_size": 8}}
    torch.manual_seed(0)
    shipped = qsweep.compress(Masked().eval(), config, Words(), tmp_path / "bundle")
    inputs, _ = Words().samples("test")
    parts = {role: Parts.read(rows) for role, rows in shipped.manifest.interface.items()}
    engine_of(shipped.manifest, tmp_path).export(tmp_path / "bundle" / "artifact", tmp_path, parts)
    (found,) = run_openvino(tmp_path / "model.xml", list(inputs.values()), list(inputs)).values()
    torch.testing.assert_close(found, shipped(inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_sweep_promotes_what_mlflow_and_qsweep_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    spec = {
        "name": "words",
        "task": {"method": "python", "file": "several_task.py:Words", "training": TRAINING.model_dump()},
        "compress": {"distill": {"method": "outputs", "epochs": 1}, "quantize": {"method": "ptq"}},
        "target": {"engine": "onnxruntime", "batch_size": 8},
        "measure": {"latency_pairs": 5},
        "standard_baselines": [],
    }
    (tmp_path / "several_task.py").write_bytes((Path(__file__).parent / "several_task.py").read_bytes())
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    records = {record.number: record for record in qsweep.run(tmp_path / "spec.yaml")}
    record, sweep = records[1], tmp_path / "sweeps" / "words"
    assert record.state == "complete", record.failure
    promoted = promote(sweep, Selector(trial=record.number), "words")
    inputs, labels = Words().samples("test")
    found = qsweep.load(promoted.uri, promoted.tracking_uri)(inputs)
    assert Words().score(found, labels).mean().item() == pytest.approx(record.metrics.accuracy_test)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", promoted.tracking_uri)
    model = mlflow.pyfunc.load_model(promoted.uri)
    assert model.metadata.signature.inputs.input_names() == ["input_ids", "attention_mask"]
    arrays = model.predict({name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_array_equal(arrays["logits"], found.logits)
    out = write(record, sweep, tmp_path / "out")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["logits", "pooled"]


def test_trainings_may_be_compiled(compiler: None) -> None:
    task = guarded(Boxes())
    torch.manual_seed(0)
    model = task.model()
    before = predict(model, task, task.samples("test").inputs)
    fit(model, task, TRAINING.model_copy(update={"epochs": 1, "compile": True}), seed=0)
    assert not torch.equal(predict(model, task, task.samples("test").inputs), before)


def test_distillation_follows_each_output_alike() -> None:
    outputs, targets = torch.tensor([[1.0, 100.0], [1.0, 100.0]]), torch.tensor([[2.0, 200.0], [2.0, 200.0]])
    labels = torch.zeros(2)
    parts = Parts.of({"a": outputs[:, 0], "b": outputs[:, 1]})
    assert Outputs().distance(outputs, targets, labels, parts) == pytest.approx(0.25)
    assert Outputs().distance(outputs, targets, labels) == pytest.approx((1 + 100**2) / 2)
    targets[:, 0] = 0
    assert Outputs().distance(outputs, targets, labels, parts) == pytest.approx((1 / (1e-6 * 200**2) + 0.25) / 2)


def test_distillation_by_logits_follows_the_outputs_that_are_logits() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs, targets = (
        {"start": torch.randn(4, 3, generator=draw), "end": torch.randn(4, 5, generator=draw)} for _ in "12"
    )
    parts, labels = Parts.of(outputs), torch.zeros(4)

    def distance(*names: str) -> Tensor:
        return Logits(outputs=names).distance(parts.joined(outputs), parts.joined(targets), labels, parts)

    alone = {name: Logits().distance(outputs[name], targets[name], labels.long()) for name in outputs}
    assert distance("end") == pytest.approx(alone["end"].item())
    assert distance("start", "end") == pytest.approx(sum(alone.values()).item() / 2)  # type: ignore[union-attr]
    with pytest.raises(TaskFailure, match="needs `outputs`, those of `start`, `end` that are logits"):
        distance()
    with pytest.raises(TaskFailure, match=r"must be outputs of the model, `start`, `end` \(got `middle`\)"):
        distance("middle")
    with pytest.raises(TaskFailure, match=r"must be outputs of the model, one, without a name \(got `end`\)"):
        Logits(outputs=("end",)).distance(outputs["end"], targets["end"], labels.long())
    one = Parts.of({"end": outputs["end"]})
    for names in ((), ("end",)):
        found = Logits(outputs=names).distance(outputs["end"], targets["end"], labels.long(), one)
        assert found == pytest.approx(alone["end"].item())


class Weighed(Tokens):
    """Several labels of one output."""

    def samples(self, split: str) -> tuple[Any, Any]:
        inputs, labels = super().samples(split)
        return inputs, {"kind": labels, "weight": torch.ones(len(labels))}

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        return (F.cross_entropy(outputs, labels.kind, reduction="none") * labels.weight).mean()


def test_several_labels_do_not_keep_one_output_from_being_logits(tmp_path: Path) -> None:
    task = guarded(Weighed())
    inputs, labels = task.samples("train")
    given, model = task.transform(inputs), task.model().eval()
    loss = Logits(alpha=0.5).loss(context(tmp_path, "model", task))
    assert loss(given, model(given), labels).item() > 0


def test_bits_by_layer_are_told_by_each_output_alike(learnt: tuple[UserTask, nn.Module], tmp_path: Path) -> None:
    task, _ = learnt
    given = context(tmp_path, "model", task)
    fields = {"average_bits": 6, "sensitivity_samples": 32}
    mixed = Mixed.model_validate(fields | {"sensitivity": "output_error"}).apply(own_joined(learnt), given)
    assert set(mixed.layer_bits().values()) > {8}
    with pytest.raises(Refused, match="`sensitivity`: must be `output_error` or `fisher`"):
        Mixed.model_validate(fields | {"sensitivity": "kl"}).apply(own_joined(learnt), given)


BAD = [
    (
        "return (images, numbers), ",
        "return (images, 'numbers'), ",
        r"samples\('train'\)` must return two .* \(got str at `1`",
    ),
    (
        "return (images, numbers), ",
        "return (images, numbers[:5]), ",
        "must return as many inputs as labels, at least one",
    ),
    (
        "return (images, numbers), ",
        "return (images, numbers[:, : 5 - (split == 'test')]), ",
        r"samples\('test'\)` must return two .* \(got `0` .*, `1` \(N, 4\), and `0` .*, `1` \(N, 5\) before",
    ),
    ("/ 255, numbers / 1000", "/ 255, numbers[:1]", r"transform` must return a tensor of 96 samples, or tuples"),
    (
        "/ 255, numbers / 1000",
        "/ 255, numbers.double()",
        r"must return float32 and whole numbers \(got `1` in torch.float64\)",
    ),
    (
        "/ 255, numbers / 1000",
        "/ 255, (numbers * 1e9).long()",
        r"must return whole numbers up to 2\^24, .* \(got larger ones\)",
    ),
    ('"aux": None', '"aux": 3', r"must give a tensor, or tuples and dicts of tensors \(got int at `aux`\)"),
    (
        '"aux": None',
        '"aux": joint.sum()',
        r"output `aux` must be floating point, of shape \(4, ...\) for 4 samples \(got torch.float32, \(\)\)",
    ),
    ('"aux": None', '"aux": joint.long()', r"output `aux` must be floating point, .* \(got torch.int64, \(4, 32\)\)"),
    ("outputs.logits, labels[", "outputs.scores, labels[", r"line \d+: `Boxes.loss` raised AttributeError: scores"),
]


@pytest.mark.parametrize(("old", "new", "complaint"), BAD)
def test_what_a_task_does_wrongly_with_several_is_told(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "several_task.py").read_text()
    assert text.count(old) == 1
    (tmp_path / "task.py").write_text(text.replace(old, new))
    task = Python(file="task.py:Boxes").open(tmp_path)
    with pytest.raises(TaskFailure, match=complaint):
        check(task, task.model())


class Helped(Detector):
    def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Any]:
        found = super().forward(image, numbers)
        return found | {"aux": found["logits"]} if self.training else found


def test_a_model_that_gives_more_in_training_is_told() -> None:
    task = guarded(Boxes())
    model = task.whole(Helped())
    check(task, model)
    with pytest.raises(TaskFailure, match=r"the model must give .* `aux` \(N, 4\), and `logits` .* before\)"):
        fit(model, task, TRAINING, seed=0)


def test_inputs_that_a_loaded_model_does_not_take_are_told(shipped: tuple[type, LoadedModel, Path]) -> None:
    model, inputs = shipped[1], given(trained(shipped[0]))
    if isinstance(inputs, dict):
        wrong = [
            (
                {"input_ids": inputs["input_ids"]},
                r"must be `input_ids` \(N, 12\), `attention_mask` .* no `attention_mask`",
            ),
            (inputs["input_ids"], "there is no `input_ids`"),
            (inputs | {"input_ids": inputs["input_ids"][:, :3]}, r"`input_ids` must have the shape \['N', 12\] \(got"),
            (inputs | {"attention_mask": inputs["attention_mask"][:3]}, r"as many in each tensor \(got \[20, 3\]\)"),
            (inputs | {"input_ids": "text"}, "`input_ids` must be a tensor or an array"),
            (inputs | {"input_ids": inputs["input_ids"] + 2**24}, r"`input_ids` must be whole numbers up to 2\^24"),
            (inputs | {"input_ids": inputs["input_ids"] + 0.7}, r"`input_ids` must be whole numbers \(got others\)"),
            (
                inputs | {"input_ids": inputs["input_ids"] * torch.nan},
                r"`input_ids` must be whole numbers \(got others\)",
            ),
        ]
    else:
        image, numbers = inputs
        wrong = [
            ((image,), r"inputs must be `0` \(N, 3, 8, 8\), `1` \(N, 5\) \(there is no `1`\)"),
            ((image.to(torch.uint8), numbers), "`0` must be float32, preprocessed as the task does"),
            ((image, numbers * torch.nan), r"inputs must not hold NaN \(sample 0 does\)"),
        ]
    for value, complaint in wrong:
        with pytest.raises(DataError, match=complaint):
            model(value)


def test_parts_come_back_in_their_places_and_types() -> None:
    value = {
        "pixels": torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8),
        "deep": (torch.rand(4), [None, torch.rand(4, 2).half()]),
        "count": torch.tensor([0, 1, -5, 2**40 + 1]),
        "there": torch.tensor([True, False, True, True]),
        "none": None,
    }
    parts = Parts.of(value)
    assert Parts.read(json.loads(json.dumps(parts.rows()))) == parts
    joined = parts.joined(value)
    assert joined.dtype == torch.float64
    assert joined.shape == (4, 12 + 1 + 2 + 1 + 1)
    back = parts.apart(joined[1:])
    assert back.keys() == {"pixels", "deep", "count", "there"}
    assert back.deep[1][0] is None
    for (path, one), (other_path, other) in zip(tensors(value), tensors(back), strict=True):
        assert path == other_path
        assert one.dtype == other.dtype
        assert torch.equal(one[1:], other)
    with pytest.raises(AttributeError, match="boxes"):
        _ = back.boxes
    assert type(as_dicts(back)) is dict


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"a.b": {"c": torch.ones(2)}, "a": {"b.c": torch.ones(2)}}, "two that are called `a.b.c`"),
        (3, "int"),
        (None, "NoneType"),
        ({"a": torch.ones(2), "b": "text"}, "str at `b`"),
        ((), "no tensor"),
    ],
)
def test_what_holds_anything_but_tensors_is_told(value: object, got: str) -> None:
    with pytest.raises(NotParts, match=got):
        Parts.of(value)


def test_float32_tells_whole_numbers_apart_up_to_a_bound() -> None:
    assert countable({"a": torch.tensor([2**24]), "b": torch.rand(2)})
    assert not countable((torch.tensor([-(2**24) - 1]),))
