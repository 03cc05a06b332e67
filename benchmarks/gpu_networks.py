"""Whole networks: equality with the reference, int8 against every floating-point baseline, energy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import gpu_asked as asked
import torch
from gpu_case import Case
from gpu_clock import Bench, Call, OutOfTime, reason
from gpu_fused import fused
from gpu_kernels import differences, example_of, told
from gpu_models import build, folded, quantized
from gpu_rows import Rows
from torch import fx, nn

from qsweep.cuda.capture import captured
from qsweep.cuda.chain import Chain
from qsweep.hub.form import QuantizedModel
from qsweep.hub.integer import IntegerInterpreter
from qsweep.measure import gpu

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = HALVES | {"fp32": torch.float32}
"""All for the main network; fp32 is the fastest of none."""
_ALIKE = 0.99
"""Cosine of outputs that part in last bits, and in the levels that these decide."""
_COMPILE_SECONDS = {"compiled": 25.0, "max-autotune": 110.0, "torchao int8": 60.0, "torchao fp8": 60.0}
"""What is kept free for each; replaced by what the network's last compilation of the kind has taken."""


class Networks:
    """The models, each built and quantized once, and what has been measured on them."""

    def __init__(self, bench: Bench, rows: Rows) -> None:
        self.bench, self.rows = bench, rows
        self.cases = {(name, batch): Case(name, batch) for name in asked.NETWORKS for batch in asked.NETWORK_BATCHES}
        self.taken = {name: dict(_COMPILE_SECONDS) for name in asked.NETWORKS}
        self._models: dict[str, tuple[nn.Module, QuantizedModel]] = {}
        self._expected: dict[str, torch.Tensor] = {}
        """What the reference gives for the two examples."""

    def model(self, name: str) -> tuple[nn.Module, QuantizedModel]:
        """The float model that baselines run, batch norms folded, and the integer one."""
        if name not in self._models:
            module, side = build(name, self.bench.tiny)
            found = folded(module, 3, side, side)
            self._models[name] = (module if name == "ViT-S" else found.graph), quantized(found)
        return self._models[name]

    def equality(self, name: str) -> None:
        row = asked.equal_network(name)
        with self.rows.guard(row):
            self.bench.need(30)
            model = self.model(name)[1]
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

    def quick(self, name: str, batch: int, seconds: float = 12) -> None:
        """int8, and each type eager and captured."""
        case, row = self.cases[name, batch], asked.network(name, batch)
        if self.rows.settled(row):
            return
        with self.rows.guard(row):
            self.bench.need(seconds)
            case.skipped += ["compiled", "max-autotune"]
            chain, given = self.chain(name, batch)
            case.wrong = not self._as_reference(name, chain, chain(given))
            calls: dict[str, Call] = {}
            for label, dtype in DTYPES.items() if (name, batch) == asked.MAIN else HALVES.items():
                calls |= self._attempt(case, partial(self._plain, name, batch, label, dtype))
                if label in HALVES:
                    calls |= self._attempt(case, partial(self._fused, name, batch, label, dtype))
            times = self.bench.times({"int8": lambda: chain(given)} | calls)
            case.int8 = times.pop("int8")
            case.times |= times
            case.write(self.rows)
        self.bench.clear()

    def _as_reference(self, name: str, chain: Chain, outputs: torch.Tensor) -> bool:
        """To the bit, or, where a part is in floating point, in direction."""
        if name not in self._expected:
            model = self.model(name)[1]
            self._expected[name] = IntegerInterpreter(model.graph)(model.example)
        expected, found = example_of(self._expected[name], len(outputs)), outputs.cpu()
        if chain.integer_share == 1.0:
            return torch.equal(found, expected)
        alike = nn.functional.cosine_similarity(found.flatten(1).double(), expected.flatten(1).double())
        return bool((alike > _ALIKE).all())  # not where one is no number

    def chain(self, name: str, batch: int) -> tuple[Chain, torch.Tensor]:
        model = self.model(name)[1]
        count = min(batch, 2) if self.bench.tiny else batch
        given = example_of(model.example, count).to(self.bench.device)
        chain = Chain(model, count, self.bench.device)
        chain(given)
        return chain, given

    def compiled(self, name: str, batch: int, way: str) -> None:
        """bf16 in one more `way`, where there is time for it."""
        case, bench = self.cases[name, batch], self.bench
        if case.int8 is None or bench.left < (0 if bench.tiny else self.taken[name][way]):
            case.skipped += [] if way in case.skipped else [way]
        else:
            case.skipped = [other for other in case.skipped if other != way]
            before = bench.left
            case.times |= self._attempt(case, partial(self._timed, name, batch, way))
            self.taken[name][way] = 1.2 * (before - bench.left) + 3
            bench.clear()
        if case.int8 is not None:
            case.write(self.rows)

    def _attempt(self, case: Case, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            with torch.no_grad():
                return make()
        except OutOfTime:
            raise
        except Exception as error:  # a baseline that cannot run is said to, and the others count
            label = ", ".join(str(part) for part in getattr(make, "args", ())[2:3])
            case.failed[label] = f"failed: {reason(error)}"
            return {}

    def _float(self, name: str, batch: int, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
        model, example = copy.deepcopy(self.model(name)[0]), self.model(name)[1].example
        model = model.to(self.bench.device, dtype)
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        given = example_of(example, min(batch, 2) if self.bench.tiny else batch).to(self.bench.device, dtype)
        return model, given.contiguous(memory_format=torch.channels_last)

    def _plain(self, name: str, batch: int, label: str, dtype: torch.dtype) -> dict[str, Call]:
        model, given = self._float(name, batch, dtype)
        model(given)
        return {f"{label} eager": without_gradient(model, given), f"{label} graph": self._captured(model, given)}

    def _captured(self, model: Callable[..., Any], given: torch.Tensor) -> Call:
        """As the integers are run: inputs copied to where the graph wants them, and a replay."""
        if not self.bench.gpu:
            return without_gradient(model, given)
        run = captured(model, given)
        return lambda: run(given)

    def _fused(self, name: str, batch: int, label: str, dtype: torch.dtype) -> dict[str, Call]:
        model, given = self._float(name, batch, dtype)
        if not isinstance(model, fx.GraphModule) or not self.bench.gpu:
            return {}
        joined = fused(model)
        joined(given)
        return {f"{label} cudnn fused": self._captured(joined, given)}

    def _timed(self, name: str, batch: int, way: str) -> dict[str, float]:
        return self.bench.times(self._compiled(name, batch, way))

    def _compiled(self, name: str, batch: int, way: str) -> dict[str, Call]:
        model, given = self._float(name, batch, torch.bfloat16)
        if way.startswith("torchao"):
            torchao(model, way)
        if not self.bench.gpu:  # what it traces is checked, what it compiles is the GPU's
            call = without_gradient(torch.compile(model, backend="eager", dynamic=False), given)
            call()
            return {label_of(way): call}
        mode = None if way == "compiled" else "max-autotune-no-cudagraphs"
        run = torch.compile(model, mode=mode, dynamic=False)
        without_gradient(run, given)()
        return {label_of(way): self._captured(run, given)}

    def memory(self) -> None:
        """Weights, inputs, buffers and the captured graph of each."""
        if not self.bench.gpu:
            return self.rows.add(asked.MEMORY, "not measured (a CPU has none)", None)
        name, batch = asked.MAIN
        with self.rows.guard(asked.MEMORY), torch.no_grad():
            self.bench.need(10)
            found, makers = {}, {"int8": partial(self._chained, name, batch)}
            for label in ("bf16", "fp32"):
                makers[f"{label} graph"] = partial(self._graph, name, batch, DTYPES[label])
            for label, make in makers.items():
                self.bench.clear()
                memory = gpu.DeviceMemory()
                call = make()
                found[label] = memory.bytes(call)
                del call
            self.rows.add(asked.MEMORY, ", ".join(f"{label} {n / 2**20:.0f} MiB" for label, n in found.items()), True)

    def _chained(self, name: str, batch: int) -> Call:
        chain, given = self.chain(name, batch)
        return lambda: chain(given)

    def _graph(self, name: str, batch: int, dtype: torch.dtype) -> Call:
        return self._captured(*self._float(name, batch, dtype))

    def energy(self) -> None:
        """Of int8, and of bf16 captured, on the same images."""
        name, batch = asked.MAIN
        with self.rows.guard(asked.ENERGY), torch.no_grad():
            self.bench.need(10)
            runs = {"int8": self._chained(name, batch), "bf16 graph": self._graph(name, batch, torch.bfloat16)}
            found = {label: gpu.energy(call, batch) if self.bench.gpu else {} for label, call in runs.items()}
            if not all(found.values()):
                self.rows.add(asked.ENERGY, "not measured (the machine does not tell: NVML is missing)", None)
                return
            texts = [
                f"{label} {m['energy_mj']:.2f} mJ at {m['gpu_power_w']:.0f} W, {m['gpu_clock_mhz']:.0f} MHz,"
                f" {m['gpu_temperature_c']:.0f} °C"
                for label, m in found.items()
            ]
            self.rows.add(asked.ENERGY, "; ".join(texts), True)


def label_of(way: str) -> str:
    return way if way.startswith("torchao") else f"bf16 {way}"


def without_gradient(model: Callable[..., Any], given: torch.Tensor) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(given)

    return call


def torchao(model: nn.Module, way: str) -> None:
    """Linears of `model` quantized by torchao, activations at each call, in place."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if way == "torchao int8":
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    else:
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def ways(name: str, way: str) -> list[str]:
    """How the baselines of a network are compiled in this part; torchao quantizes linears alone."""
    quantizes = way == "max-autotune" and name == "ViT-S" and find_spec("torchao") is not None
    return [way, "torchao int8", "torchao fp8"] if quantizes else [way]


def floor(rows: Rows) -> None:
    """The least ratio of all that was measured at batch 128 and more, earlier too."""
    wanted = [asked.network(name, batch) for name in asked.NETWORKS for batch in asked.NETWORK_BATCHES if batch >= 128]
    wanted += [asked.convolution(shape, n) for shape in asked.SHAPES for n in asked.CONVOLUTION_BATCHES if n >= 128]
    if found := rows.ratios(wanted):
        least = min(found, key=found.__getitem__)
        met = found[least] >= 0.95 and (len(found) == len(wanted) or None)
        measured = f"{found[least]:.2f}x ({least}), of {len(found)} of {len(wanted)} measured{rows.signs(found)}"
        rows.add(asked.FLOOR, measured, met)
