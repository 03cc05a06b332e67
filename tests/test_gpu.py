"""What runs on a CUDA device: on one where there is one, and refused with the reason everywhere else."""

from __future__ import annotations

import gc
import itertools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Noise, context, network

from qsweep.engines.float import Float
from qsweep.engines.inductor import Inductor
from qsweep.errors import Refused
from qsweep.hub.export import float_graph
from qsweep.machine import fingerprint, gpu, no_gpu
from qsweep.measure.gpu import DeviceMemory, Reading, _sensors, calls_for, energy, joules, kept_by_graphs, read, summary
from qsweep.measure.latency import latency
from qsweep.records import Metrics
from qsweep.spec import Measure
from qsweep.tasks.base import Training
from qsweep.train import fit

GPU = torch.cuda.is_available()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_float_engine_on_a_gpu_is_refused_at_load_where_there_is_none(tmp_path: Path) -> None:
    engine, found = Float(device="cuda"), context(tmp_path)
    assert engine.available() == no_gpu()
    assert "`device: cuda` needs a" in str(engine.available())
    engine.lower(float_graph(network("digits_cnn"), found), tmp_path, found.store)
    with pytest.raises(Refused, match="`device: cuda` needs a"):
        engine.load(tmp_path)


def test_an_engine_on_the_cpu_does_not_ask_for_a_gpu() -> None:
    assert Float().available() is None
    with pytest.raises(ValueError, match="cpu"):
        Inductor.model_validate({"device": "cuda"})


def test_a_gpu_has_fp16_among_its_baselines() -> None:
    contents = Float(device="cuda").baselines()
    assert list(contents) == ["fp32", "bf16", "fp16", "int8"]
    names = [content.get("compress", {}).get("quantize", {}) for content in contents.values()]
    assert [name.get("dtype") for name in names] == [None, "bf16", "fp16", None]
    assert list(Float().baselines()) == ["fp32", "bf16", "int8"]


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("compile", "capture"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_float_engine_gives_the_models_outputs_on_a_gpu(compile: bool, capture: bool, tmp_path: Path) -> None:
    found, inputs = context(tmp_path), Noise(8).inputs
    engine = Float(device="cuda", batch_size=8, compile=compile, capture=capture)
    model = float_graph(network("digits_cnn"), found)
    engine.lower(model, tmp_path, found.store)
    run = engine.load(tmp_path)
    for _ in range(2):
        torch.testing.assert_close(run(inputs.cuda()).cpu(), model.graph(inputs), rtol=2e-3, atol=2e-3)
    with pytest.raises(Refused, match="takes inputs"):
        run(inputs[:4].cuda())


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_call_that_looks_at_a_result_is_refused_and_the_device_works_on() -> None:
    from qsweep.cuda.capture import captured

    example = torch.ones(4, device="cuda")
    with pytest.raises(Refused, match="cannot be captured in a CUDA graph"):
        captured(lambda x: x * float(x.sum()), example)
    assert captured(lambda x: x * 2, example)(example).tolist() == [2.0] * 4


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_what_a_graph_keeps_for_its_replays_counts_and_what_was_tried_before_does_not() -> None:
    from qsweep.cuda.capture import captured

    a = torch.randn(2048, 2048, device="cuda")
    memory = DeviceMemory()
    assert memory.bytes(lambda: (a + 1) + 2) == 2 * a.nbytes
    assert memory.bytes(lambda: None) == 0
    torch.cat([a] * 20)  # as a tuner does
    run = captured(lambda x: (x + 1) + 2, a)
    assert 3 * a.nbytes <= memory.bytes(partial(run, a)) < 4 * a.nbytes  # its input, both sums
    del run
    assert memory.bytes(lambda: None) == 0


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_graph_works_in_memory_of_its_own_when_the_one_before_is_gone() -> None:
    from qsweep.cuda.capture import captured

    a, weights = torch.randn(64, 8192, device="cuda"), torch.randn(8192, 64, device="cuda")  # few outputs: in parts
    before = captured(lambda x: x @ weights, a)
    run = captured(lambda x: x @ weights, a)
    wanted = run(a).clone()
    del before
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.ones(1 << 20, device="cuda") for _ in range(64)]
    assert torch.equal(run(a), wanted)
    assert all(bool((other == 1).all()) for other in others)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_training_leaves_nothing_on_the_device() -> None:
    task = Noise(inputs=torch.randn(1 << 20, 1, 8, 8))  # 256 MiB
    before = torch.cuda.memory_reserved()
    fit(network("digits_cnn"), task, Training(epochs=1, batch_size=4096, device="cuda"), seed=0)
    assert torch.cuda.memory_reserved() - before < 1 << 26


def test_memory_of_graphs_is_what_no_tensor_holds_in_their_pools() -> None:
    sizes = [(0, 0, 100, 30), (0, 1, 100, 30), (0, 2, 50, 50), (1, 1, 8, 0)]
    segments = [
        {"segment_pool_id": (one, other), "total_size": total, "allocated_size": held, "blocks": []}
        for one, other, total, held in sizes
    ]
    assert kept_by_graphs(segments) == 78


def readings(*points: tuple[float, float]) -> list[Reading]:
    return [Reading(seconds, watts, 1980.0, 40.0 + seconds) for seconds, watts in points]


def test_energy_is_the_integral_of_power_however_unevenly_it_was_read() -> None:
    ramp = readings((0.0, 100.0), (0.1, 110.0), (0.7, 170.0), (1.0, 200.0))
    assert joules(ramp) == pytest.approx(150.0)
    assert joules(readings((5.0, 300.0), (5.5, 300.0))) == pytest.approx(150.0)
    assert joules(readings((0.0, 100.0))) == 0.0


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(50, 700)), min_size=2, max_size=20), st.integers(1, 10_000))
def test_energy_lies_between_the_least_and_the_greatest_power(steps: list[tuple[float, float]], count: int) -> None:
    times = list(itertools.accumulate(step for step, _ in steps))
    found = summary(readings(*zip(times, (watts for _, watts in steps), strict=True)), count)
    least, greatest = (end(watts for _, watts in steps) for end in (min, max))
    assert least <= found["gpu_power_w"] * (1 + 1e-9)
    assert found["gpu_power_w"] <= greatest * (1 + 1e-9)
    assert found["energy_mj"] == pytest.approx(1000 * found["gpu_power_w"] * (times[-1] - times[0]) / count)
    assert found["gpu_temperature_c"] == 40.0 + times[-1]


def test_every_figure_of_a_gpu_is_a_metric_by_name() -> None:
    assert set(summary(readings((0.0, 1.0), (1.0, 1.0)), 1)) <= set(Metrics.model_fields)
    assert {"energy_mj", "peak_device_memory_bytes"} <= set(Metrics.directions())


@pytest.mark.parametrize("one_ms", [0.0, 0.002, 0.3, 1.0, 50.0])
def test_short_calls_are_timed_many_at_a_time(one_ms: float) -> None:
    calls = calls_for(one_ms)
    assert calls >= 1
    assert calls == 1 or 1.0 <= calls * max(one_ms, 1e-4) < 1.0 + max(one_ms, 1e-4)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_sensors_tell_nothing_where_there_is_no_gpu() -> None:
    assert read() is None
    assert energy(lambda: None, 1) == {}
    assert gpu() == ""
    assert fingerprint("cuda").startswith(fingerprint())


class Sensors:
    """NVML of two cards, that of PyTorch the second."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVMLError = 1, 0, OSError

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return ["GPU-first", "GPU-second"].index(name)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return [10_000, 300_000][handle]

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return [210, 1980][handle]

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return [30, 60][handle]


def test_sensors_are_those_of_the_card_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Sensors())
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda: SimpleNamespace(uuid="second"))
    monkeypatch.setattr("qsweep.measure.gpu._sensors", _sensors.__wrapped__)
    found = read()
    assert found is not None
    assert found[1:] == (300.0, 1980.0, 60.0)


@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_latency_memory_and_energy_are_measured_on_a_gpu() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    found = latency(lambda x: x @ x, lambda x: x @ x @ x, a, Measure(latency_pairs=10, latency_seconds=0.1))
    assert 0 < found["latency_low_ms"] <= found["latency_ms"] <= found["latency_high_ms"]
    assert found["latency_ratio"] < 1
    metrics = energy(lambda: a @ a, 1)
    assert not metrics or metrics["energy_mj"] > 0
