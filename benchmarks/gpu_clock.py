"""The device, the time that is left, and how long calls take."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qsweep.measure.gpu import calls_for, milliseconds

Call = Callable[[], object]
_ROUNDS = 9
_BLOCK_MS = 10.0
_MOST_TOGETHER = 200


class OutOfTime(Exception):
    """What was to come next does not fit into the budget any more."""


@dataclass
class Bench:
    """Where the benchmark runs, how large, and until when."""

    device: torch.device
    tiny: bool
    budget: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.begun)

    def need(self, seconds: float) -> None:
        """Raises OutOfTime where fewer than `seconds` are left; tiny runs need next to nothing."""
        if self.left < (seconds / 100 if self.tiny else seconds):
            raise OutOfTime

    def times(self, calls: dict[str, Call]) -> dict[str, float]:
        """Milliseconds of one call of each, by name: medians, the calls taking turns. All must be warm."""
        count = {name: self._together(call) for name, call in calls.items()}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(1 if self.tiny else _ROUNDS):
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                found[name].append(self._block(calls[name], count[name]))
        return {name: statistics.median(times) for name, times in found.items()}

    def _together(self, call: Call) -> int:
        if self.tiny:
            return 1
        self._block(call, 1)
        return min(_MOST_TOGETHER, calls_for(self._block(call, 3), _BLOCK_MS))

    def _block(self, call: Call, count: int) -> float:
        if self.gpu:
            return milliseconds(call, count)
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count

    def replayed(self, call: Call, repeat: int = 1) -> Call:
        """`repeat` calls as one CUDA graph; on a CPU just the calls. They must always use the same memory."""
        if self.gpu:
            from qsweep.cuda.capture import graph_of

            return graph_of(call, repeat).replay

        def calls() -> None:
            for _ in range(repeat):
                call()

        return calls

    def kernel_times(self, calls: dict[str, Call]) -> dict[str, float]:
        """As `times`, many launches of each in one graph: the cost of launching is not in it."""
        repeat = 1 if self.tiny else 20
        graphs = {name: self.replayed(call, repeat) for name, call in calls.items()}
        return {name: ms / repeat for name, ms in self.times(graphs).items()}

    def clear(self) -> None:
        """Give back what the compiler and the allocator hold, so that the next model has the memory."""
        torch.compiler.reset()
        if self.gpu:
            gc.collect()  # captured graphs and what they hold are cycles
            torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """One line of why something failed."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")
