"""Whether networks of timm, torchvision and transformers come through: exported, quantized, lowered, and to what share.

    pip install timm torchvision transformers      # of those that are missing their networks are left out
    python benchmarks/zoo.py [network] [token] [chain] [openvino] [litert] [alone] [latency] [phone] [server] [packed]
        [channels] [narrow]

Each is quantized to 8 bits with random weights, in a process of its own, and run by `onnxruntime`, which is held
against `reference`; where Triton is installed it is planned for `cuda`, too, which needs no GPU. Chains of its kernels
run small images on a GPU or, without one, in Triton's interpreter. Latencies, one image on one thread, are those of
int8 and of float32 by turns; of `executorch` and `openvino` beside those of `onnxruntime`; of transformers as large as
they are used, whose weights alone are quantized; of networks that have lost half of their channels beside those of
whole ones. Writes `zoo.json` and `zoo.md` beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import HERE, record, table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qsweep.engines.base import EngineConfig, Runner
    from qsweep.hub.form import QuantizedModel
    from qsweep.stage import Context

SECONDS = 600
HEADING = """
# Networks of other libraries, post-training 8 bits

    pip install timm torchvision transformers
    python benchmarks/zoo.py

Random weights, four inputs, smallest members of their families. Measured: deviation of the quantized outputs from the
model's, and of ONNX Runtime's from the reference's, over the deviation of the model's outputs; the share of multiply-
accumulates on integer kernels; what `cuda` leaves to PyTorch in floating point. Of chains of kernels: the integers of
one input (after @ an image's pixels a side) that are not the reference's; behind norms and softmax a float may fall
on the other side of a tie, and what follows from it. Tokens: ranges that each row of a linear sets itself; at the end
OpenVINO's deviation from the reference and its share of integers. Latencies are medians of ONNX Runtime on one thread
for one image of 224 pixels a side. OpenVINO, LiteRT: deviations as above, the share of integers. Phone: ExecuTorch
with XNNPACK, on this machine: the same, latency of int8 over that of float32 and of ONNX Runtime's int8. Server: the
same of OpenVINO. Weights alone: 4 bits and real activations; deviation of the simulation from the model and of both
runtimes from the simulation, their shares of integers. Of transformers (after @ tokens): latencies over float32's, by
bits and inputs that share a scale, beside int8 with fixed ranges and with those of tokens. Channels: half of those
that can go are zeros; deviation of the network without them, the shares of work (multiply- accumulates) and
parameters that are left. Narrow: latency of its int8 over that of the whole network's.
"""

HALF = {"sparsity": 0.5, "multiple": 8}


@contextmanager
def quantized(name: str, **fields: Any) -> Iterator[tuple[nn.Module, Tensor, QuantizedModel, Context]]:
    """A network in float and in 8 bits, or as `fields` of `ptq` say, its inputs, and what stages work in."""
    import torch

    sys.path.insert(0, str(HERE.parent / "tests"))
    from networks import Noise, context
    from zoo_models import made

    from qsweep.quantize.ptq import PTQ

    torch.set_num_threads(1)
    model, inputs = made(name)
    with tempfile.TemporaryDirectory() as folder:
        found = context(Path(folder), task=Noise(inputs=inputs))
        config = PTQ.model_validate({"calibration_samples": len(inputs)} | fields)
        yield model, inputs, config.apply(model, found), found


def lowered(engine: EngineConfig, graph: QuantizedModel, found: Context, kind: str) -> tuple[Path, Runner]:
    artifact = found.store.root.parent / kind
    artifact.mkdir()
    engine.lower(graph, artifact, found.store)
    return artifact, engine.load(artifact)


def deviations(wanted: Tensor, reference: Tensor, given: Tensor) -> dict[str, float]:
    """The reference from the model and an engine from the reference, over the deviation of the model's outputs."""
    scale = wanted.std()
    return {
        "quantized": ((reference - wanted).std() / scale).item(),
        "apart": ((given - reference).std() / scale).item(),
    }


def network(name: str, mode: str = "static") -> dict[str, Any]:
    """How far quantized outputs are from the model's, ONNX Runtime's from the reference's; shares of integers."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.hub.integer import IntegerInterpreter

    with quantized(name, activation_mode=mode) as (model, inputs, graph, found):
        wanted, reference = model(inputs).detach(), IntegerInterpreter(graph.graph)(inputs)
        engine = OnnxRuntime(batch_size=len(inputs))
        artifact, runner = lowered(engine, graph, found, "int8")
        work = len(inputs) * graph.macs
        figures: dict[str, Any] = {
            **deviations(wanted, reference, runner(inputs)),
            "onnxruntime": engine.integer_macs(artifact, runner, inputs) / work,
        }
    if find_spec("triton") is not None:
        from qsweep.cuda.plan import plan

        planned = plan(graph, len(inputs))
        figures |= {"cuda": planned.macs[0] / work, "islands": planned.islands}
    return figures


def token(name: str) -> dict[str, Any]:
    """The same with ranges by token, and beside it OpenVINO's."""
    return network(name, "token") | {"openvino": openvino(name, "token")}


def openvino(name: str, mode: str = "static") -> dict[str, Any]:
    """How far OpenVINO's outputs are from the reference's, and its share of integers."""
    from qsweep.engines.openvino import OpenVINO

    return beside_reference(name, OpenVINO(), mode)


def litert(name: str) -> dict[str, Any]:
    """The same of LiteRT."""
    from qsweep.engines.litert import LiteRT

    return beside_reference(name, LiteRT(), "static")


def beside_reference(name: str, engine: EngineConfig, mode: str) -> dict[str, Any]:
    from qsweep.hub.integer import IntegerInterpreter

    with quantized(name, activation_mode=mode) as (model, inputs, graph, found):
        wanted, reference = model(inputs).detach(), IntegerInterpreter(graph.graph)(inputs)
        artifact, runner = lowered(engine.model_copy(update={"batch_size": len(inputs)}), graph, found, "int8")
        return {
            **deviations(wanted, reference, runner(inputs)),
            "share": engine.integer_macs(artifact, runner, inputs) / (len(inputs) * graph.macs),
        }


def alone(name: str) -> dict[str, Any]:
    """Of weights of 4 bits alone: how far the simulation is from the model and each runtime from the simulation."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.engines.openvino import OpenVINO
    from qsweep.hub.simulate import simulation

    figures: dict[str, Any] = {}
    with quantized(name, activation_bits=None, weight_bits=4) as (model, inputs, graph, found):
        wanted, simulated = model(inputs).detach(), simulation(graph)(inputs)
        for engine in (OnnxRuntime(batch_size=len(inputs)), OpenVINO(batch_size=len(inputs))):
            artifact, runner = lowered(engine, graph, found, engine.engine)
            figures[engine.engine] = deviations(wanted, simulated, runner(inputs)) | {
                "share": engine.integer_macs(artifact, runner, inputs) / (len(inputs) * graph.macs)
            }
    return figures


def chain(name: str) -> dict[str, Any]:
    """Integers that a chain of kernels gives, and how many of them the reference does not."""
    import torch

    from qsweep.cuda.chain import Chain
    from qsweep.cuda.steps import Float, Norm
    from qsweep.hub.integer import IntegerInterpreter

    with quantized(name) as (_, inputs, graph, _):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reference = IntegerInterpreter(graph.graph)
        reference.keep = True
        reference(inputs[:1])
        run = Chain(graph, 1, device, {}, keep=True, products=torch.float32)
        run(inputs[:1].to(device))
    integers = run.integers()
    return {
        "tensors": len(integers),
        "integers": sum(values.numel() for values in integers.values()),
        "differ": sum(int((values.cpu() != reference.tensors[name]).sum()) for name, values in integers.items()),
        "floats": any(isinstance(step, Float | Norm) for step in run.plan.steps),
        "device": device,
    }


def latency(name: str) -> dict[str, Any]:
    """Milliseconds of int8 and of float32."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.hub.export import float_graph

    engine = OnnxRuntime(batch_size=1, threads=1)
    with quantized(name) as (model, inputs, graph, found):
        both = {"int8": graph, "float32": float_graph(model, found)}
        runners = {kind: lowered(engine, each, found, kind)[1] for kind, each in both.items()}
        return milliseconds(runners, inputs[:1])


def milliseconds(runners: dict[str, Runner], inputs: Tensor) -> dict[str, float]:
    """Medians of calls by turns."""
    seconds: dict[str, list[float]] = {kind: [] for kind in runners}
    for _ in range(40):
        for kind, runner in runners.items():
            start = time.perf_counter()
            runner(inputs)
            seconds[kind].append(time.perf_counter() - start)
    return {kind: 1e3 * statistics.median(taken[10:]) for kind, taken in seconds.items()}


def phone(name: str) -> dict[str, Any]:
    """Of `executorch` how far it is from the reference, its share of integers, and latencies beside `onnxruntime`'s."""
    from qsweep.engines.executorch import ExecuTorch

    return beside_onnxruntime(name, ExecuTorch(batch_size=1, threads=1))


def server(name: str) -> dict[str, Any]:
    """The same of `openvino`."""
    from qsweep.engines.openvino import OpenVINO

    return beside_onnxruntime(name, OpenVINO(batch_size=1, threads=1))


def beside_onnxruntime(name: str, engine: EngineConfig) -> dict[str, Any]:
    import torch

    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.hub.export import float_graph
    from qsweep.hub.integer import IntegerInterpreter

    with quantized(name) as (model, inputs, graph, found):
        wanted, reference = model(inputs).detach(), IntegerInterpreter(graph.graph)(inputs)
        work = graph.macs
        runners = {"onnxruntime": lowered(OnnxRuntime(batch_size=1, threads=1), graph, found, "onnxruntime")[1]}
        runners["float32"] = lowered(engine, float_graph(model, found), found, "float32")[1]
        artifact, runners["int8"] = lowered(engine, graph, found, "int8")
        given = torch.cat([runners["int8"](image).clone() for image in inputs.split(1)])
        return milliseconds(runners, inputs[:1]) | {
            **deviations(wanted, reference, given),
            "share": engine.integer_macs(artifact, runners["int8"], inputs[:1]) / work,
        }


WEIGHTS: dict[str, dict[str, Any]] = {
    "8 bits": {"activation_bits": None},
    "4 by 32": {"activation_bits": None, "weight_bits": 4, "group_size": 32},
    "4 by 128": {"activation_bits": None, "weight_bits": 4, "group_size": 128},
}


def packed(name: str) -> dict[str, Any]:
    """Milliseconds of one sample on both runtimes: weights alone, beside integers and float32."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.engines.openvino import OpenVINO
    from qsweep.hub.export import float_graph
    from qsweep.quantize.ptq import PTQ

    figures = {}
    with quantized(name) as (model, inputs, graph, found):
        graphs = {"float32": float_graph(model, found), "int8": graph}
        for kind, fields in ({"tokens": {"activation_mode": "token"}} | WEIGHTS).items():
            graphs[kind] = PTQ.model_validate(fields).apply(model, found)
        for engine in (OnnxRuntime(batch_size=1, threads=1), OpenVINO(batch_size=1, threads=1)):
            kinds = {kind: f"{engine.engine} {kind}" for kind in graphs}
            runners = {kind: lowered(engine, graphs[kind], found, place)[1] for kind, place in kinds.items()}
            figures[engine.engine] = milliseconds(runners, inputs[:1])
    return figures


def channels(name: str) -> dict[str, Any]:
    """How far a network without its empty channels is from the one that has them, and how much smaller."""
    import torch
    from zoo_models import made

    from qsweep.hub.export import export, traced
    from qsweep.prune._channels import zero_channels

    torch.set_num_threads(1)
    model, inputs = made(name)
    zero_channels(model, inputs[:2], **HALF)
    with torch.no_grad():
        wanted, whole, left = model(inputs), traced(model, inputs[:2]), export(model, inputs[:2])
        given = left.graph(inputs)
    sizes = [sum(value.numel() for value in each.graph.parameters()) for each in (left, whole)]
    return {
        "apart": ((given - wanted).std() / wanted.std()).item(),
        "macs": left.macs / whole.macs,
        "params": sizes[0] / sizes[1],
    }


def narrow(name: str) -> dict[str, Any]:
    """Milliseconds of int8 with half of the channels and with all."""
    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.prune._channels import zero_channels
    from qsweep.quantize.ptq import PTQ

    engine = OnnxRuntime(batch_size=1, threads=1)
    with quantized(name) as (model, inputs, graph, found):
        zero_channels(model, inputs[:2], **HALF)
        left = PTQ(calibration_samples=len(inputs)).apply(model, replace(found, key="narrow"))
        graphs = {"left": left, "whole": graph}
        runners = {kind: lowered(engine, each, found, kind)[1] for kind, each in graphs.items()}
        return milliseconds(runners, inputs[:1]) | {"macs": left.macs / graph.macs}


def said_of_network(found: dict[str, Any]) -> tuple[str, bool]:
    said = f"{found['quantized']:.2g}, {found['apart']:.1g}; onnxruntime {found['onnxruntime']:.1%}"
    if "cuda" in found:
        islands = ", ".join(island.split(".")[1] for island in found["islands"]) or "nothing"
        said += f", cuda {found['cuda']:.1%}; {islands}"
    if "openvino" in found:
        said += f"; openvino {found['openvino']['apart']:.1g}, {found['openvino']['share']:.1%}"
    return said, all(each["apart"] <= each["quantized"] for each in (found, found.get("openvino", found)))


def said_of_chain(found: dict[str, Any]) -> tuple[str, bool]:
    where = "on a GPU" if found["device"] == "cuda" else "in Triton's interpreter"
    said = f"{found['differ']} of {found['integers']:,} in {found['tensors']} tensors differ, {where}"
    said += "" if found["floats"] else "; no floats between"
    return said, found["differ"] <= (found["integers"] // 1000 if found["floats"] else 0)


def said_of_latency(found: dict[str, Any]) -> tuple[str, bool]:
    ratio = found["int8"] / found["float32"]
    return f"{ratio:.2f} of {found['float32']:.1f} ms", ratio < 1


def said_of_openvino(found: dict[str, Any]) -> tuple[str, bool]:
    said = f"{found['quantized']:.2g}, {found['apart']:.1g}; {found['share']:.1%}"
    return said, found["apart"] <= found["quantized"]


def said_of_alone(found: dict[str, Any]) -> tuple[str, bool]:
    said = [f"{kind} {each['apart']:.1g}, {each['share']:.1%}" for kind, each in found.items()]
    close = all(each["apart"] <= each["quantized"] for each in found.values())
    return f"{found['onnxruntime']['quantized']:.2g}; {'; '.join(said)}", close


def said_of_packed(found: dict[str, Any]) -> tuple[str, bool]:
    said, quicker = [], True
    for engine, times in found.items():
        ratios = {kind: taken / times["float32"] for kind, taken in times.items() if kind != "float32"}
        shown = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in ratios.items())
        said.append(f"{engine} {shown} of {times['float32']:.1f} ms")
        quicker &= max(ratios.values()) < 1
    return "; ".join(said), quicker


def said_of_phone(found: dict[str, Any]) -> tuple[str, bool]:
    apart, close = said_of_openvino(found)
    ratio, beside = (found["int8"] / found[other] for other in ("float32", "onnxruntime"))
    said = f"{ratio:.2f} of {found['float32']:.1f} ms, {beside:.2f} of onnxruntime's int8"
    return f"{apart}; {said}", close and found["int8"] < found["float32"]


def said_of_channels(found: dict[str, Any]) -> tuple[str, bool]:
    said = f"{found['apart']:.0e}; {found['macs']:.2f} of the work, {found['params']:.2f} of the parameters"
    return said, found["apart"] <= 1e-5 and found["macs"] < 1


def said_of_narrow(found: dict[str, Any]) -> tuple[str, bool]:
    ratio = found["left"] / found["whole"]
    return f"{ratio:.2f} of {found['whole']:.1f} ms for {found['macs']:.2f} of the work", ratio < 1


def row(part: str, name: str) -> tuple[str, str, str, bool]:
    """What a process of its own says of one network."""
    asked, suffix, say = PARTS[part]
    found = json.loads(_process(name, part))
    said, met = (f"refused: {found['refused']}", False) if "refused" in found else say(found)
    return f"{name}{suffix}", asked, said, met


Say = Callable[[dict[str, Any]], tuple[str, bool]]
PARTS: dict[str, tuple[str, str, Say]] = {
    "network": ("less apart from the reference than int8 from float", "", said_of_network),
    "token": ("less apart from the reference than int8 from float", ", tokens", said_of_network),
    "chain": ("none differs, one in 1000 behind floats", ", chain", said_of_chain),
    "openvino": ("less apart from the reference than int8 from float", ", openvino", said_of_openvino),
    "litert": ("less apart from the reference than int8 from float", ", litert", said_of_openvino),
    "alone": ("less apart from the simulation than 4 bits from float", ", weights alone", said_of_alone),
    "latency": ("under float32", ", latency", said_of_latency),
    "phone": ("less apart than int8 from float, under float32", ", phone", said_of_phone),
    "server": ("less apart than int8 from float, under float32", ", server", said_of_phone),
    "packed": ("under float32", ", weights alone", said_of_packed),
    "channels": ("the same outputs from less", ", channels", said_of_channels),
    "narrow": ("under the whole network's int8", ", narrow", said_of_narrow),
}


TIMED = "latency", "phone", "server", "packed", "narrow"
"""Parts that run alone."""


def _process(name: str, function: str) -> str:
    code = f"import json, zoo; print(json.dumps(zoo.{function}({name!r})))"
    alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if function == "chain" and not Path("/dev/nvidia0").exists():
        alone |= {"TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, cwd=HERE, env=alone
        )
    except subprocess.TimeoutExpired:
        return json.dumps({"refused": f"not done after {SECONDS} s"})
    lines = done.stdout.splitlines()
    return lines[-1] if done.returncode == 0 else json.dumps({"refused": (done.stderr.splitlines() or ["died"])[-1]})


def main() -> None:
    warnings.simplefilter("ignore")
    from zoo_models import CHAINS, LATENCIES, NAMES, SIZED

    transformers = [name for name in NAMES if name.startswith("transformers ")]
    names = {"network": NAMES, "token": transformers, "chain": CHAINS, "openvino": NAMES, "litert": NAMES}
    names |= {"alone": NAMES, "channels": NAMES} | dict.fromkeys(TIMED, LATENCIES) | {"packed": SIZED}
    for part in sys.argv[1:] or PARTS:
        there = [name for name in names[part] if find_spec(name.split()[0])]
        with ThreadPoolExecutor(1 if part in TIMED else os.cpu_count()) as pool:
            for figures in pool.map(partial(row, part), there):
                record("zoo", [figures])
    table("zoo", HEADING)


if __name__ == "__main__":
    main()
