"""Latency of an artifact beside the fp32 baseline: interleaved, so that what disturbs one disturbs the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qsweep.engines import Runner
from qsweep.measure import gpu
from qsweep.spec import Measure

_WARM_UP_SECONDS = 0.1
_WARM_UP_CALLS = 3
_FEWEST_PAIRS = 10
_TURN = 5
_REST_SECONDS = 0.005
_RESAMPLES = 1000

Milliseconds = npt.NDArray[np.float64]


def latency(run: Runner, baseline: Runner | None, inputs: Tensor, settings: Measure) -> dict[str, float]:
    """Metrics of one call on `inputs`: median, p95, 95 % interval of the median, ratio of medians to `baseline`.

    Without a baseline the artifact is the baseline, and its ratio 1. `inputs` on a GPU: by the device's clock, short
    calls many at a time.
    """
    _warm_up(run, inputs)
    if baseline is not None:
        _warm_up(baseline, inputs)
    times, others = _pairs(run, baseline, inputs, settings)
    low, high = median_interval(times)
    median = float(np.median(times))
    return {
        "latency_ms": median,
        "latency_p95_ms": float(np.percentile(times, 95)),
        "latency_low_ms": low,
        "latency_high_ms": high,
        "latency_ratio": median / float(np.median(others)) if baseline is not None else 1.0,
        "throughput": 1000 * len(inputs) / median,
    }


def _warm_up(run: Runner, inputs: Tensor) -> None:
    """The first call of a process may cost a hundred times the later ones."""
    end = time.perf_counter() + _WARM_UP_SECONDS
    calls = 0
    while calls < _WARM_UP_CALLS or time.perf_counter() < end:
        run(inputs)
        calls += 1
        if inputs.is_cuda:
            torch.cuda.synchronize()


def _pairs(
    run: Runner, baseline: Runner | None, inputs: Tensor, settings: Measure
) -> tuple[Milliseconds, Milliseconds]:
    """Times of both, taken in turns of a few calls, the first of each turn not counted.

    Threads of one runtime spin for a while after a call and would slow the other's first one: it waits until they rest.
    """
    runs = [run] if baseline is None else [run, baseline]
    timers = [_timer(each, inputs) for each in runs]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + settings.latency_seconds
    while len(times[0]) < settings.latency_pairs and (len(times[0]) < _FEWEST_PAIRS or time.perf_counter() < end):
        for each, timer, found in zip(runs, timers, times, strict=False):
            time.sleep(_REST_SECONDS)
            each(inputs)
            found += [timer() for _ in range(_TURN)]
    return np.array(times[0]), np.array(times[1])


def _timer(run: Runner, inputs: Tensor) -> Callable[[], float]:
    return gpu.timer(partial(run, inputs)) if inputs.is_cuda else partial(_call, run, inputs)


def _call(run: Runner, inputs: Tensor) -> float:
    start = time.perf_counter()
    run(inputs)
    return 1e3 * (time.perf_counter() - start)


def median_interval(times: Milliseconds) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap with a fixed seed."""
    drawn = np.random.default_rng(0).choice(times, (_RESAMPLES, len(times)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)
