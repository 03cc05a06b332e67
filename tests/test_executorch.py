"""XNNPACK's integer kernels in ExecuTorch give what the reference gives, to a level or the rounding of a last row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layout_networks import Tokens, Transposed
from networks import NETWORKS, Function, Noise, accuracy_lost, assert_close, context, made, network, shared
from networks import lowered as lowered_by
from pydantic import TypeAdapter
from test_gates import KINDS, Branches
from test_odd_networks import INPUTS, ODD
from test_odd_networks import made as odd
from test_recurrent import INPUTS as SOUNDS
from test_recurrent import Gated
from test_words import Classifier, texts
from torch import Tensor, nn
from written_networks import Attended, Rotated

from qsweep.engines import Engine
from qsweep.engines.executorch import ExecuTorch
from qsweep.errors import BundleError, Refused
from qsweep.hub.export import float_graph
from qsweep.hub.fixed import with_computed_layers
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.quantize.cast import Cast
from qsweep.quantize.ptq import PTQ
from qsweep.spec import Compression

pytest.importorskip("executorch", reason="ExecuTorch cannot be installed here")

COUNT = 50
NOISE = Noise(COUNT).inputs


def lowered(model: QuantizedModel, folder: Path, batch_size: int = COUNT) -> ExecuTorch:
    engine = ExecuTorch(batch_size=batch_size)
    lowered_by(engine, model, folder)
    return engine


NARROW: dict[str, dict[str, Any]] = {
    "depthwise": {"weight_bits": 2, "activation_bits": 4},
    "sequence": {"weight_bits": 3, "activation_bits": 2},
    "shortcut": {"activation_bits": 3, "sum_grid": "own", "edge_bits": 8},
}


def test_a_program_is_traced_again_only_where_that_changes_it_and_is_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decompositions: list[Any]
) -> None:
    from qsweep.engines import _executorch, _executorch_passes

    traces, traced = _executorch_passes._ExportPassBase, []
    own = traces.call
    monkeypatch.setattr(traces, "call", lambda self, module: traced.append(self) or own(self, module))
    model, counts, programs = PTQ().apply(network("digits_cnn"), shared("digits_cnn", NOISE)), [], []
    lowered(model, tmp_path / "first of the process")  # it traces what it looks for, too
    for name in ("where it changes", "always"):
        decompositions.clear()
        traced.clear()
        lowered(model, tmp_path / name)
        counts.append((len(decompositions), len(traced)))
        programs.append((tmp_path / name / "model.pte").read_bytes())
        monkeypatch.setattr(_executorch, "_changes", lambda *_, **__: True)
        monkeypatch.setattr(_executorch, "traced_where_changed", nullcontext)
    (decomposed, passes), (all_decomposed, all_passes) = counts
    assert decomposed < all_decomposed
    assert passes < all_passes
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("name", "fields"),
    [*((name, {}) for name in NETWORKS), *NARROW.items()],
    ids=[*NETWORKS, *(f"{name}, narrow" for name in NARROW)],
)
def test_every_layer_runs_on_integers_and_gives_what_the_reference_gives(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = PTQ.model_validate({"calibration_samples": 200} | fields).apply(network(name), shared(name, NOISE))
    engine = lowered(model, tmp_path / "artifact")
    run = engine.load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(model.graph)(NOISE), within=0.03)
    assert engine.integer_macs(tmp_path / "artifact", run, NOISE) == COUNT * model.macs


@pytest.mark.parametrize(
    "name",
    [
        "max pool, ceil",
        "transposed, in groups",
        "shuffled pixels",
        "layers of constants",
        "average pool, ceil and padding",
        "clamped above",
        "Branches",
        "Dense",
    ],
)
def test_what_is_odd_or_gated_is_on_integers_too(name: str, tmp_path: Path) -> None:
    model = odd(name) if name in ODD else made(next(kind for kind in KINDS if kind.__name__ == name))
    quantized = PTQ(calibration_samples=20).apply(model, shared(name, INPUTS))
    engine = lowered(quantized, tmp_path / "artifact", len(INPUTS))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(INPUTS), IntegerInterpreter(quantized.graph)(INPUTS), within=0.05)
    work = len(INPUTS) * with_computed_layers(quantized).macs
    share = engine.integer_macs(tmp_path / "artifact", run, INPUTS) / work
    assert share == 1


@pytest.mark.parametrize(
    ("kind", "inputs", "mode", "share"),
    [
        (Tokens, INPUTS, "token", 0.5),
        (Attended, INPUTS, "static", 1.0),
        (Rotated, INPUTS, "static", 0.61),
        (Gated, SOUNDS, "static", 0.01),
        (Classifier, texts(40), "token", 0.84),
    ],
)
def test_transformers_and_what_else_people_write(
    kind: type[nn.Module], inputs: Tensor, mode: str, share: float, tmp_path: Path
) -> None:
    fields = {"calibration_samples": 20, "activation_mode": mode}
    model = PTQ.model_validate(fields).apply(made(kind), shared(kind.__name__, inputs))
    engine = lowered(model, tmp_path / "artifact", len(inputs))
    run = engine.load(tmp_path / "artifact")
    assert_close(run(inputs), IntegerInterpreter(model.graph)(inputs), within=0.06)
    found = engine.integer_macs(tmp_path / "artifact", run, inputs) / (len(inputs) * model.macs)
    assert found >= share


@pytest.mark.parametrize("name", ["depthwise", "layers of constants", "Branches"])
def test_float_baselines_are_the_model(name: str, tmp_path: Path) -> None:
    model = network(name) if name in NETWORKS else odd(name) if name in ODD else made(Branches)
    inputs = NOISE if name in NETWORKS else INPUTS
    live = float_graph(model, shared(name, inputs))
    engine = lowered(live, tmp_path / "artifact", len(inputs))
    run = engine.load(tmp_path / "artifact")
    torch.testing.assert_close(run(inputs), model(inputs).detach(), atol=1e-4, rtol=1e-4)
    assert engine.integer_macs(tmp_path / "artifact", run, inputs) == 0


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.wide, self.last = nn.Flatten(), nn.Linear(64, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.wide(self.flat(x))))
        return found


def test_weights_of_4_bits_of_linears_that_quantize_rows_are_packed(tmp_path: Path) -> None:
    sizes = {}
    for bits in (4, 8):
        config = PTQ(activation_mode="token", weight_bits=bits)
        model = config.apply(made(Perceptron), shared("perceptron", NOISE))
        folder = tmp_path / str(bits)
        engine = lowered(model, folder)
        run = engine.load(folder)
        assert_close(run(NOISE), IntegerInterpreter(model.graph)(NOISE), within=0.06)
        assert engine.integer_macs(folder, run, NOISE) == COUNT * model.macs
        sizes[bits] = (folder / "model.pte").stat().st_size
    weights = 64 * 512 + 512 * 256
    assert weights < sizes[8] < weights + 15_000
    assert weights / 2 < sizes[4] < weights / 2 + 15_000


def test_nothing_is_written_that_is_not_read(tmp_path: Path) -> None:
    model = PTQ(calibration_samples=20).apply(made(Transposed), shared("Transposed", INPUTS))
    lowered(model, tmp_path / "artifact", len(INPUTS))
    weights = sum(value.numel() for value in made(Transposed).parameters())
    assert (tmp_path / "artifact" / "model.pte").stat().st_size < 4 * weights + 10_000


def test_a_program_takes_the_batches_that_it_was_made_for(tmp_path: Path) -> None:
    model = PTQ(calibration_samples=200).apply(network("mlp"), shared("mlp", NOISE))
    engine = lowered(model, tmp_path / "artifact", 1)
    run = engine.load(tmp_path / "artifact")
    single = torch.cat([run(sample).clone() for sample in NOISE.split(1)])
    assert_close(single, IntegerInterpreter(model.graph)(NOISE), within=0.03)
    with pytest.raises(Refused, match=r"takes inputs \[1, 1, 8, 8\] \(got \[2, 1, 8, 8\]\)"):
        run(NOISE[:2])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a small network."""
    folder = tmp_path_factory.mktemp("program") / "artifact"
    lowered(PTQ(calibration_samples=200).apply(network("mlp"), shared("mlp", NOISE)), folder)
    return folder


def test_programs_of_a_process_share_the_threads_of_the_first(program: Path) -> None:
    loads = "; ".join(f"run{n} = ExecuTorch(threads={n}).load(Path('artifact'))" for n in (2, 1))
    imports = "import torch; from pathlib import Path; from qsweep.engines.executorch import ExecuTorch"
    counted = "from qsweep.engines._executorch import portable_lib; print(portable_lib._threadpool_get_thread_count())"
    code = f"{imports}; {loads}; x = torch.rand({COUNT}, 1, 8, 8); assert torch.equal(run2(x), run1(x)); {counted}"
    done = subprocess.run([sys.executable, "-c", code], cwd=program.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
    assert not done.stderr


def test_what_is_exported_is_the_program(program: Path, tmp_path: Path) -> None:
    from executorch.runtime import Runtime

    engine = ExecuTorch(batch_size=COUNT)
    engine.export(program, tmp_path)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    assert method is not None
    assert torch.equal(method.execute([NOISE])[0], engine.load(program)(NOISE))


def test_a_damaged_program_is_told(program: Path, tmp_path: Path) -> None:
    content = (program / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="cannot be read"):
        ExecuTorch(batch_size=COUNT).load(tmp_path)


@pytest.mark.parametrize(
    "function", [F.softplus, lambda x: F.softplus(x, beta=3), F.mish], ids=["softplus", "beta", "mish"]
)
def test_logarithms_of_images_are_in_their_place(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(512, 4)
    model = Function(lambda x, one, other, last: last((function(y := one(x)) + other(y)).flatten(1)), *layers).eval()
    quantized = PTQ(calibration_samples=200).apply(model, context(tmp_path, task=Noise(inputs=NOISE)))
    run = lowered(quantized, tmp_path / "artifact").load(tmp_path / "artifact")
    assert_close(run(NOISE), IntegerInterpreter(quantized.graph)(NOISE), within=0.05)


def test_a_softplus_that_ends_early_is_refused(tmp_path: Path) -> None:
    live = float_graph(nn.Sequential(nn.Flatten(), nn.Softplus(threshold=2)), context(tmp_path, "odd"))
    with pytest.raises(Refused, match=r"a threshold of at least 15 \(got 2"):
        lowered(live, tmp_path / "artifact")


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x).flatten(1)


def test_an_op_that_it_does_not_have_is_refused_with_its_name(tmp_path: Path) -> None:
    live = float_graph(Odd().eval(), context(tmp_path, "odd"))
    with pytest.raises(Refused, match=r"ExecuTorch has no kernel for `aten::special_bessel_j0\.out`"):
        lowered(live, tmp_path / "artifact")


@pytest.mark.parametrize(
    "config",
    [
        Cast(dtype="bf16"),
        PTQ(activation_bits=None),
        PTQ(activation_mode="dynamic"),
        PTQ(weight_scheme="asymmetric"),
        PTQ(weight_bits=4, group_size=8),
    ],
    ids=lambda config: config.label(),
)
def test_what_has_no_integer_kernels_is_refused(config: Any) -> None:
    engine = TypeAdapter(Engine).validate_python({"engine": "executorch"})
    assert "use `float`" in engine.refuses(Compression(quantize=config))


def test_a_trained_network_keeps_its_accuracy(tmp_path: Path) -> None:
    assert accuracy_lost(ExecuTorch(), tmp_path / "artifact", within=0.02) < 0.01
