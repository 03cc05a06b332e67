"""Time, memory, clocks, power and energy on a CUDA device. Imports nothing but PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]

_COMMON_POOL = (0, 0)
"""Of all that is not captured."""
_LEAST_MS = 1.0
"""Of one timed block of calls: events resolve about half a microsecond, and recording two takes some more."""
_BLOCK_MS = 20.0
"""Of calls between two readings of the sensors, which change ten to fifty times a second."""
_LEAD_SECONDS = 1.0
"""Under load before energy counts: the sensor averages over up to a second, and clocks must have settled."""
_ENERGY_SECONDS = 0.5


def milliseconds(call: Call, calls: int) -> float:
    """Of one `call`, `calls` of them between two device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def calls_for(one_ms: float, together_ms: float = _LEAST_MS) -> int:
    """How many calls of `one_ms` take `together_ms`; at least one."""
    return max(1, math.ceil(together_ms / max(one_ms, 1e-4)))


def timer(call: Call) -> Callable[[], float]:
    """What gives milliseconds of one `call`, short ones timed many at a time. The call must be warm."""
    calls = calls_for(milliseconds(call, 1))
    calls = calls_for(milliseconds(call, calls))
    return lambda: milliseconds(call, calls)


class DeviceMemory:
    """Counts from its creation: `bytes(call)` is what tensors and graphs hold on the device above the level at the
    start, at the peak of one more `call`.

    What loading took for a while is not in it, as compilers and tuners try much; nor are the CUDA context and loaded
    kernels, the same for every artifact.
    """

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._start = torch.cuda.memory_allocated() + _kept()

    def bytes(self, call: Call) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return float(max(0, torch.cuda.max_memory_allocated() + _kept() - self._start))


def _kept() -> int:
    torch.cuda.empty_cache()  # what graphs kept that are gone
    return kept_by_graphs(torch.cuda.memory_snapshot())  # type: ignore[no-untyped-call]


def kept_by_graphs(segments: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of a snapshot's `segments` that no tensor holds and yet are taken: each replay of a graph writes there."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if tuple(segment["segment_pool_id"]) != _COMMON_POOL
    )


class Reading(NamedTuple):
    """What the sensors tell at one time."""

    seconds: float
    watts: float
    clock_mhz: float
    celsius: float


def read() -> Reading | None:
    """Of the current device, now; None where NVML is missing or does not tell."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        sensors = _sensors()
        watts = nvml.nvmlDeviceGetPowerUsage(sensors) / 1000
        clock = nvml.nvmlDeviceGetClockInfo(sensors, nvml.NVML_CLOCK_SM)
        celsius = nvml.nvmlDeviceGetTemperature(sensors, nvml.NVML_TEMPERATURE_GPU)
    except (RuntimeError, AssertionError, nvml.NVMLError):  # PyTorch asserts that it was built with CUDA
        return None
    return Reading(time.perf_counter(), watts, float(clock), float(celsius))


@cache
def _sensors() -> Any:
    """Of the current device, which NVML counts in another order than CUDA: by its name for life."""
    import pynvml as nvml

    nvml.nvmlInit()
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")


def joules(readings: list[Reading]) -> float:
    """The integral of power over the time from the first to the last reading, by trapezoids."""
    return sum((a.watts + b.watts) / 2 * (b.seconds - a.seconds) for a, b in pairwise(readings))


def under_load(call: Call, seconds: float) -> tuple[list[Reading], int]:
    """Readings over at least `seconds` of back-to-back calls, and the calls done between the first and the last.

    The next block of calls is on the device before the sensors are read, so that it never rests. No readings where
    there is no sensor.
    """
    calls = calls_for(milliseconds(call, 3), _BLOCK_MS)
    readings: list[Reading] = []
    before: torch.cuda.Event | None = None
    while len(readings) < 2 or readings[-1].seconds - readings[0].seconds < seconds:
        for _ in range(calls):
            call()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        if before is not None:
            before.synchronize()
            if (found := read()) is None:
                return [], 0
            readings.append(found)
        before = event
    torch.cuda.synchronize()
    return readings, calls * (len(readings) - 1)


def energy(call: Call, samples: int) -> dict[str, float]:
    """`energy_mj` of each of the `samples` of a call, and the clock, power and temperature meanwhile; empty where the
    machine does not tell."""
    if read() is None:
        return {}
    under_load(call, _LEAD_SECONDS)
    readings, calls = under_load(call, _ENERGY_SECONDS)
    return summary(readings, calls * samples) if readings else {}


def summary(readings: list[Reading], inferences: int) -> dict[str, float]:
    """Metrics of `inferences` done between the first and the last reading."""
    total = joules(readings)
    return {
        "energy_mj": 1000 * total / inferences,
        "gpu_power_w": total / (readings[-1].seconds - readings[0].seconds),
        "gpu_clock_mhz": sum(reading.clock_mhz for reading in readings) / len(readings),
        "gpu_temperature_c": max(reading.celsius for reading in readings),
    }
