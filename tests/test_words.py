"""Models of words: numbers of words come as float32, and the model makes indices and a mask of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from networks import Noise, context, shared
from pydantic import ValidationError
from torch import Tensor, nn

from qsweep.engines._onnx import complete
from qsweep.engines.base import EngineConfig
from qsweep.engines.inductor import Inductor
from qsweep.engines.onnxruntime import OnnxRuntime
from qsweep.engines.reference import Reference
from qsweep.hub.convert import convert
from qsweep.hub.export import float_graph
from qsweep.hub.form import QuantizedModel, stored_bits, weight_bits_of
from qsweep.hub.integer import IntegerInterpreter
from qsweep.hub.kinds import EMBEDDING
from qsweep.hub.nodes import attributes, constant, nodes_of, source
from qsweep.hub.save import load, save
from qsweep.hub.simulate import simulation
from qsweep.hub.tables import with_tables
from qsweep.hub.weights import real_weight
from qsweep.measure.files import file_sizes
from qsweep.measure.sizes import work
from qsweep.quantize._training import finished, prepared, start
from qsweep.quantize.apot import APoT
from qsweep.quantize.base import LowBit
from qsweep.quantize.codebook import Codebook
from qsweep.quantize.lsq import LSQ
from qsweep.quantize.ptq import PTQ
from qsweep.quantize.qat import QAT

WORDS, LENGTH = 5000, 12


class Classifier(nn.Module):
    """A block of a transformer over the words of a text; 0 is no word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Parameter(0.1 * torch.randn(1, LENGTH, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, numbers: Tensor) -> Tensor:
        words = numbers.long()
        there = (words != 0).float().unsqueeze(2)
        x = self.words(words) + self.places
        read = self.block(x, src_key_padding_mask=words == 0) * there
        return self.head(read.sum(1) / there.sum(1))


def texts(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (count, 1), generator=generator)
    return torch.where(torch.arange(LENGTH) < lengths, numbers, 0).float()


def quantized(**fields: Any) -> tuple[QuantizedModel, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, inputs = Classifier().eval(), texts(40)
    config = PTQ.model_validate({"calibration_samples": 40} | fields)
    return config.apply(model, shared("words, 40 texts", inputs)), model, inputs


@pytest.mark.parametrize(
    "engine", [Reference, Inductor, OnnxRuntime, None], ids=["reference", "inductor", "ort", "cuda"]
)
def test_integers_run_on_every_engine(engine: type[EngineConfig] | None, tmp_path: Path, device: str) -> None:
    model, plain, inputs = quantized()
    expected = IntegerInterpreter(model.graph)(inputs)
    with torch.no_grad():
        assert nn.functional.cosine_similarity(expected, plain(inputs)).min() > 0.98
    if engine is None:
        pytest.importorskip("triton")
        from qsweep.cuda.chain import Chain

        found = Chain(model, len(inputs), device, {}, products=torch.float32)(inputs.to(device)).cpu()
    else:
        found_in = context(tmp_path, task=Noise(inputs=inputs))
        config = engine(batch_size=len(inputs))
        (tmp_path / "artifact").mkdir()
        config.lower(model, tmp_path / "artifact", found_in.store)
        found = config.load(tmp_path / "artifact")(inputs)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_numbers_of_words_are_not_rounded_to_half_precision(dtype: str, tmp_path: Path) -> None:
    _, plain, inputs = quantized()
    graph = float_graph(plain, shared("words, 40 texts", inputs))
    with torch.no_grad():
        found = simulation(graph.cast_to(dtype))(inputs)
        torch.testing.assert_close(found, plain(inputs), atol=0.05, rtol=0)


def test_words_are_trained_with_quantization(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = texts(64)
    found = context(tmp_path, task=Noise(inputs=inputs))
    model = LSQ(epochs=1, calibration_samples=40, learning_rate=0.01).apply(Classifier(), found)
    assert IntegerInterpreter(model.graph)(inputs).isfinite().all()


def rows_of(model: QuantizedModel) -> Tensor | None:
    """The table that the words are looked up in, as it is stored."""
    (node,) = nodes_of(model.graph, {EMBEDDING})
    return constant(model.graph, node.args[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_words_are_nearest_integers_with_a_scale_each(bits: int, tmp_path: Path) -> None:
    model, plain, _ = quantized(embedding_bits=bits)
    (node,) = nodes_of(model.graph, {EMBEDDING})
    table = plain.get_parameter("words.weight").detach()
    step = table.abs().amax(1, keepdim=True) / ((1 << (bits - 1)) - 1)
    error = (real_weight(model.graph, source(node)) - table).abs()
    assert (error <= step * 0.5001).all()
    assert weight_bits_of(source(node)) == bits
    (saved := tmp_path / "saved").mkdir()
    save(model, saved)
    torch.testing.assert_close(rows_of(load(saved)), rows_of(model), atol=0, rtol=0)
    rows = WORDS * 16 * bits / 8 + 4 * WORDS
    assert rows < file_sizes(saved)["size_bytes"] < rows + 60_000
    assert rows < work(model)["size_theoretical_bytes"] < rows + 10_000


@pytest.mark.parametrize("config", [PTQ, Codebook, APoT, LSQ, QAT], ids=lambda config: config.__name__)
def test_every_method_stores_them_so_or_leaves_them(config: type[LowBit]) -> None:
    torch.manual_seed(0)
    model, inputs = Classifier().eval(), texts(64)
    found = shared("words, 64 texts", inputs)
    for bits in (5, None):
        made = config.model_validate({"embedding_bits": bits}).apply(model, found)
        table = rows_of(made)
        assert table is not None
        assert table.dtype == (torch.float32 if bits is None else torch.int8)
        assert bits is None or int(table.abs().max()) == 15


def test_training_sees_the_rows_that_are_shipped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = texts(64)
    found = context(tmp_path, task=Noise(inputs=inputs))
    config = QAT(embedding_bits=2, activation_bits=None)
    live = prepared(config, Classifier(), found)
    start(live.graph, 2, None)
    with torch.no_grad():
        seen = live.graph(inputs)
        (saved := tmp_path / "saved").mkdir()
        save(convert(finished(live)), saved)
        shipped = simulation(load(saved))(inputs)
    torch.testing.assert_close(shipped, seen, atol=1e-5, rtol=0)


def test_onnx_has_the_integers_and_makes_them_real_once(tmp_path: Path) -> None:
    model, _, inputs = quantized()
    found, artifact = context(tmp_path, task=Noise(inputs=inputs)), tmp_path / "artifact"
    artifact.mkdir()
    OnnxRuntime(batch_size=40).lower(model, artifact, found.store)
    content = complete(artifact)
    onnx.checker.check_model(content)
    (table,) = [tensor for tensor in content.graph.initializer if tensor.name == "words.weight"]
    assert table.data_type == onnx.TensorProto.INT8
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(content.SerializeToString(), options)
    session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    shapes = [event["args"]["output_type_shape"] for event in events if event["name"].endswith("_kernel_time")]
    assert shapes
    assert not [shape for shape in shapes if {"float": [WORDS, 16]} in shape]


def test_a_program_makes_the_rows_real_that_it_reads(tmp_path: Path) -> None:
    model, _, inputs = quantized()
    (artifact := tmp_path / "artifact").mkdir()
    Inductor(batch_size=40).lower(model, artifact, context(tmp_path, task=Noise(inputs=inputs)).store)
    Inductor(batch_size=40).export(artifact, tmp_path)
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(inputs), simulation(model)(inputs), atol=1e-4, rtol=0)
    sizes = [node.meta["val"].shape for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert sum(size == (WORDS, 16) for size in sizes) == 1


class Tied(nn.Module):
    """Which word comes next: the table of words is the last layer's weight, too."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.words(numbers.long()).mean(1).tanh())


@pytest.mark.parametrize("engine", [Reference, Inductor, OnnxRuntime], ids=["reference", "inductor", "ort"])
def test_a_tied_table_is_stored_once_as_the_weight_that_it_is(engine: type[EngineConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = texts(40) % 50
    model, found = Tied(bias=True).eval(), context(tmp_path, task=Noise(inputs=inputs))
    made = PTQ(calibration_samples=40, weight_bits=4).apply(model, found)
    assert stored_bits(made.graph) == {"head.weight": 4}
    (tmp_path / "artifact").mkdir()
    config = engine(batch_size=len(inputs))
    config.lower(made, tmp_path / "artifact", found.store)
    expected = simulation(made)(inputs)
    torch.testing.assert_close(config.load(tmp_path / "artifact")(inputs), expected, atol=0.03, rtol=0)


def test_a_table_of_fixed_places_stays_as_it_is(tmp_path: Path) -> None:
    class Placed(Tied):
        def __init__(self) -> None:
            super().__init__(bias=False)
            self.places = nn.Embedding(LENGTH, 16)

        def forward(self, numbers: Tensor) -> Tensor:
            x = self.words(numbers.long()) + self.places(torch.arange(LENGTH))
            return self.head(x.mean(1).tanh())

    inputs = texts(40) % 50
    made = PTQ(calibration_samples=40).apply(Placed().eval(), context(tmp_path, task=Noise(inputs=inputs)))
    (places,) = [value for name, value in attributes(made.graph) if name == "places.weight"]
    assert places.dtype == torch.float32
    assert list(stored_bits(made.graph)) == ["head.weight"]


class Compared(Tied):
    """The table is compared with what was found, as it is."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.head = nn.Linear(16, 50)

    def forward(self, numbers: Tensor) -> Tensor:
        found = (self.words(numbers.long()).mean(1).tanh().unsqueeze(1) * self.words.weight).sum(2)
        return self.head(found[:, :16])


class Linear(nn.Module):
    """A number for each word, as in the first term of factorization machines."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 1), nn.Linear(LENGTH, 50)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.words(numbers.long()).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Compared, Linear])
def test_a_table_that_would_take_more_bytes_stays_as_it_is(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = texts(40) % 50
    made = PTQ(calibration_samples=40).apply(kind().eval(), context(tmp_path, task=Noise(inputs=inputs)))
    assert list(stored_bits(made.graph)) == ["head.weight"]
    assert {name for name, value in attributes(made.graph) if value.dtype == torch.float32} >= {"words.weight"}


def test_the_label_says_it() -> None:
    assert PTQ(embedding_bits=4).label() == "ptq-w8s-a8a-emb4"
    assert PTQ(embedding_bits=None).label() == "ptq-w8s-a8a-emb32"
    assert Codebook(embedding_bits=4).label() == "codebook-w4-emb4"


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValidationError, match="embedding_bits"):
        PTQ.model_validate({"embedding_bits": bits})


class Categories(nn.Module):
    """Numbers of five columns: of two tables, of a third one twice, once shifted, and no number of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 4) for rows in (10, 20, 7))
        self.places, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, columns: Tensor) -> Tensor:
        numbers = columns.long()
        first, second, third = self.tables
        x = first(numbers[:, 0]) + second(numbers[:, :2])[:, 1] + third(numbers[:, 2:4]).sum(1)
        places = self.places(torch.arange(5))  # which no number of theirs decides
        return self.head(x + third(numbers[:, 3] - 1) + places.mean(0)) * columns[:, 4:]


def test_the_rows_of_tables_are_known_by_column(tmp_path: Path) -> None:
    inputs = torch.ones(6, 5)
    graph = float_graph(Categories().eval(), context(tmp_path, task=Noise(inputs=inputs)))
    parts: list[dict[str, Any]] = [{"path": ["a"], "shape": [4], "dtype": "int64"}, {"path": ["b"], "shape": []}]
    found = with_tables({"inputs": parts, "outputs": []}, graph)
    assert found == {"inputs": [parts[0] | {"below": [10, 20, 7, 7]}, parts[1]], "outputs": []}
    one = with_tables({"inputs": [{"path": [], "shape": [5]}]}, graph)["inputs"]
    assert one == [{"path": [], "shape": [5], "below": [10, 20, 7, 7, None]}]
    assert with_tables({}, graph) == {}
    words = float_graph(Classifier().eval(), context(tmp_path, "words", task=Noise(inputs=texts(2))))
    assert with_tables({"inputs": [{"path": [], "shape": [LENGTH]}]}, words)["inputs"][0]["below"] == WORDS
