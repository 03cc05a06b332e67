"""Whole networks: equality with the reference, int8 against every floating-point baseline, energy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_asked as asked
import torch
from gpu_baselines import DTYPES, Baselines, Compiled, compiled
from gpu_case import Case
from gpu_clock import Bench, Call, OutOfTime, reason
from gpu_kernels import differences, example_of, told
from gpu_models import HALVES
from gpu_prepare import Preparation
from gpu_rows import Rows
from torch import nn

from qsweep.cuda.chain import Chain
from qsweep.hub.integer import IntegerInterpreter
from qsweep.measure import gpu

_ALIKE = 0.99
"""Cosine of outputs that part in last bits, and in the levels that these decide."""
_PREPARED_SECONDS = 8.0
"""What a baseline takes that is in the compiler's cache."""


class Networks:
    """What has been measured on each network at each batch size."""

    def __init__(self, bench: Bench, rows: Rows, prepared: Preparation | None) -> None:
        self.bench, self.rows, self.prepared = bench, rows, prepared
        self.baselines = Baselines(bench)
        self.cases = {(name, batch): Case(name, batch) for name in asked.NETWORKS for batch in asked.NETWORK_BATCHES}
        self._taken: dict[tuple[str, str], float] = {}
        """Seconds to keep free for a baseline of a network, where one of it has been compiled."""
        self._expected: dict[str, torch.Tensor] = {}
        """What the reference gives for the two examples."""

    def equality(self, name: str) -> None:
        row = asked.equal_network(name)
        with self.rows.guard(row):
            self.bench.need(30)
            model = self.baselines.model(name)[1]
            chain = Chain(model, 2, self.bench.device, {}, keep=True)
            found = differences(chain, model, self.bench.device)
            if chain.integer_share == 1.0:
                self.rows.add(row, told(found), not found.wrong)
                return
            exact = Chain(model, 2, self.bench.device, {}, products=torch.float32, keep=True)
            parts = [f"{chain.integer_share:.1%} of the work on integers; elements that differ"]
            for label, one in (("fp32", differences(exact, model, self.bench.device)), ("fp16, as it is run", found)):
                share = f"{one.first:.3%} of the first tensor that does, {one.all:.1%} of all"
                parts.append(f"attention in {label}: {share}, {one.far:.2%} by more than a level")
            self.rows.add(row, "; ".join(parts), True)

    def quick(self, name: str, batch: int) -> None:
        """int8, each type eager and captured, and what has been compiled beforehand but for `max-autotune`, which
        chooses kernels once more."""
        case, row = self.cases[name, batch], asked.network(name, batch)
        if self.rows.settled(row):
            return
        plain, tuned = (compiled(name, batch, tuned=one) for one in (False, True))
        prepared = [way for way in plain if self.prepared and self.prepared.has(name, batch, way.label)]
        with self.rows.guard(row):
            self.bench.need(12 + _PREPARED_SECONDS * len(prepared))
            case.skipped += [way.label for way in (*plain, *tuned) if way not in prepared]
            chain, given = self.baselines.chain(name, batch)
            case.wrong = not self._as_reference(name, chain, chain(given))
            calls: dict[str, Call] = {}
            for label in DTYPES if (name, batch) == asked.MAIN else HALVES:  # fp32 is the fastest of none
                calls |= self._attempt(case, label, partial(self.baselines.plain, name, batch, label))
                if label in HALVES:
                    calls |= self._attempt(case, label, partial(self.baselines.fused, name, batch, label))
            for way in prepared:
                calls |= self._attempt(case, way.label, partial(self.baselines.compiled, name, batch, way))
            times = self.bench.times({"int8": lambda: chain(given)} | calls)
            case.int8 = times.pop("int8")
            case.times |= times
            case.write(self.rows)
        self.bench.clear()

    def _as_reference(self, name: str, chain: Chain, outputs: torch.Tensor) -> bool:
        """To the bit, or, where a part is in floating point, in direction."""
        if name not in self._expected:
            model = self.baselines.model(name)[1]
            self._expected[name] = IntegerInterpreter(model.graph)(model.example)
        expected, found = example_of(self._expected[name], len(outputs)), outputs.cpu()
        if chain.integer_share == 1.0:
            return torch.equal(found, expected)
        alike = nn.functional.cosine_similarity(found.flatten(1).double(), expected.flatten(1).double())
        return bool((alike > _ALIKE).all())  # not where one is no number

    def compiled(self, name: str, batch: int, way: Compiled) -> None:
        """One more baseline, where there is time for it."""
        case, bench = self.cases[name, batch], self.bench
        if way.label not in case.skipped:
            return
        needed = self._taken.get((name, way.label), way.seconds)
        if case.int8 is not None and bench.left >= (0 if bench.tiny else needed):
            case.skipped.remove(way.label)
            before = bench.left
            make = partial(self.baselines.compiled, name, batch, way)
            case.times |= self._attempt(case, way.label, lambda: bench.times(make()))
            self._taken[name, way.label] = 1.2 * (before - bench.left) + 3
            bench.clear()
            case.write(self.rows)

    def _attempt(self, case: Case, label: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return make()
        except OutOfTime:
            raise
        except Exception as error:  # a baseline that cannot run is said to, and the others count
            case.failed[label] = f"failed: {reason(error)}"
            return {}

    def memory(self) -> None:
        """Weights, inputs, buffers and the captured graph of each."""
        if not self.bench.gpu:
            return self.rows.add(asked.MEMORY, "not measured (a CPU has none)", None)
        with self.rows.guard(asked.MEMORY), torch.no_grad():
            self.bench.need(10)
            found, makers = {}, {"int8": self._int8}
            makers |= {f"{label} graph": partial(self._graph, label) for label in ("bf16", "fp32")}
            for label, make in makers.items():
                self.bench.clear()
                memory = gpu.DeviceMemory()
                call = make()
                found[label] = memory.bytes(call)
                del call
            self.rows.add(asked.MEMORY, ", ".join(f"{label} {n / 2**20:.0f} MiB" for label, n in found.items()), True)

    def energy(self) -> None:
        """Of int8, and of the quickest floating point that is at hand anywhere, each in both orders."""
        with self.rows.guard(asked.ENERGY), torch.no_grad():
            self.bench.need(15)
            runs = {"int8": self._int8(), **self.baselines.fused(*asked.MAIN, "fp16")}
            turns = [*runs, *reversed(runs)]
            found = [gpu.energy(runs[label], asked.MAIN[1]) if self.bench.gpu else {} for label in turns]
            if not all(found):
                self.rows.add(asked.ENERGY, "not measured (the machine does not tell: NVML is missing)", None)
                return
            texts = []
            for label in runs:
                one, other = (metrics for turn, metrics in zip(turns, found, strict=True) if turn == label)
                mean = {name: (one[name] + other[name]) / 2 for name in one}
                texts.append(
                    f"{label} {mean['energy_mj']:.2f} mJ ({one['energy_mj']:.2f} and {other['energy_mj']:.2f})"
                    f" at {mean['gpu_power_w']:.0f} W, {mean['gpu_clock_mhz']:.0f} MHz,"
                    f" {mean['gpu_temperature_c']:.0f} °C"
                )
            self.rows.add(asked.ENERGY, "; ".join(texts), True)

    def _int8(self) -> Call:
        """The main network."""
        chain, given = self.baselines.chain(*asked.MAIN)
        return lambda: chain(given)

    def _graph(self, label: str) -> Call:
        return self.baselines.plain(*asked.MAIN, label)[f"{label} graph"]


def floor(rows: Rows) -> None:
    """The least ratio of all that was measured at batch 128 and more, earlier too."""
    wanted = [asked.network(name, batch) for name in asked.NETWORKS for batch in asked.NETWORK_BATCHES if batch >= 128]
    wanted += [asked.convolution(shape, n) for shape in asked.SHAPES for n in asked.CONVOLUTION_BATCHES if n >= 128]
    if found := rows.ratios(wanted):
        least = min(found, key=found.__getitem__)
        met = found[least] >= 0.95 and (len(found) == len(wanted) or None)
        measured = f"{found[least]:.2f}x ({least}), of {len(found)} of {len(wanted)} measured{rows.signs(found)}"
        rows.add(asked.FLOOR, measured, met)
