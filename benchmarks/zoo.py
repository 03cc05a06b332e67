"""Whether networks of timm, torchvision and transformers come through: exported, quantized, lowered, and to what share.

    pip install timm torchvision transformers      # of those that are missing their networks are left out
    python benchmarks/zoo.py [networks] [chains] [latency]

Each is quantized to 8 bits with random weights, in a process of its own, and run by `onnxruntime`, which is held
against `reference`; where Triton is installed it is planned for `cuda`, too, which needs no GPU. Chains of its kernels
run small images on a GPU or, without one, in Triton's interpreter. Latencies, one image on one thread, are those of
int8 and of float32 by turns. Writes `zoo.json` and `zoo.md` beside it.
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
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rows import HERE, record, table

ASKED = "less apart from the reference than int8 from float"
EQUAL = "none differs, one in 1000 behind floats"
SECONDS = 600
HEADING = """
# Networks of other libraries, post-training 8 bits

    pip install timm torchvision transformers
    python benchmarks/zoo.py

Random weights, four inputs, smallest members of their families. Measured: deviation of the quantized outputs from the
model's, and of ONNX Runtime's from the reference's, over the deviation of the model's outputs; the share of multiply-
accumulates on integer kernels; what `cuda` leaves to PyTorch in floating point. Of chains of kernels: the integers of
one input (after @ an image's pixels a side) that are not the reference's; behind norms and softmax a float may fall
on the other side of a tie, and what follows from it. Latencies are medians of ONNX Runtime on one thread for one
image of 224 pixels a side.
"""


def one(name: str) -> dict[str, Any]:
    """The figures of a network, or why it is refused."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import torch
    from networks import Noise, context
    from zoo_models import made

    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.errors import QsweepError
    from qsweep.hub.integer import IntegerInterpreter
    from qsweep.quantize.ptq import PTQ

    torch.set_num_threads(1)
    model, inputs = made(name)
    with torch.no_grad():
        wanted = model(inputs)
    with tempfile.TemporaryDirectory() as folder:
        found, engine = context(Path(folder), task=Noise(inputs=inputs)), OnnxRuntime(batch_size=len(inputs))
        try:
            quantized = PTQ(calibration_samples=len(inputs)).apply(model, found)
            reference = IntegerInterpreter(quantized.graph)(inputs)
            artifact = Path(folder) / "artifact"
            artifact.mkdir()
            engine.lower(quantized, artifact, found.store)
            runner = engine.load(artifact)
            given = runner(inputs)
        except QsweepError as error:
            return {"refused": str(error)}
        integers, work = engine.integer_macs(artifact, runner, inputs), len(inputs) * quantized.macs
        figures: dict[str, Any] = {
            "quantized": ((reference - wanted).std() / wanted.std()).item(),
            "apart": ((given - reference).std() / wanted.std()).item(),
            "onnxruntime": integers / work,
        }
        if find_spec("triton") is not None:
            from qsweep.cuda.plan import plan

            planned = plan(quantized, len(inputs))
            figures |= {"cuda": planned.macs[0] / work, "islands": planned.islands}
    return figures


def chain(name: str) -> dict[str, Any]:
    """Integers that a chain of kernels gives, and how many of them the reference does not."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import torch
    from networks import Noise, context
    from zoo_models import made

    from qsweep.cuda.chain import Chain
    from qsweep.hub.integer import IntegerInterpreter
    from qsweep.quantize.ptq import PTQ

    torch.set_num_threads(1)
    model, inputs = made(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        found = context(Path(folder), task=Noise(inputs=inputs))
        quantized = PTQ(calibration_samples=len(inputs)).apply(model, found)
    reference = IntegerInterpreter(quantized.graph)
    reference.keep = True
    reference(inputs[:1])
    run = Chain(quantized, 1, device, {}, keep=True, products=torch.float32)
    run(inputs[:1].to(device))
    integers = run.integers()
    differ = [int((values.cpu() != reference.tensors[name]).sum()) for name, values in integers.items()]
    return {
        "tensors": len(integers),
        "integers": sum(values.numel() for values in integers.values()),
        "differ": sum(differ),
        "floats": sorted({type(step).__name__ for step in run.plan.steps} & {"Float", "Norm"}),
        "device": device,
    }


def chain_row(name: str) -> tuple[str, str, str, bool]:
    found = json.loads(_process(name, "chain"))
    if "refused" in found:
        return f"{name}, chain", EQUAL, f"refused: {found['refused']}", False
    where = "on a GPU" if found["device"] == "cuda" else "in Triton's interpreter"
    said = f"{found['differ']} of {found['integers']:,} in {found['tensors']} tensors differ, {where}"
    said += "" if found["floats"] else "; no floats between"
    most = found["integers"] // 1000 if found["floats"] else 0
    return f"{name}, chain", EQUAL, said, found["differ"] <= most


def network_row(name: str) -> tuple[str, str, str, bool]:
    found = json.loads(_process(name, "one"))
    if "refused" in found:
        return name, ASKED, f"refused: {found['refused']}", False
    said = f"{found['quantized']:.2g}, {found['apart']:.1g}; onnxruntime {found['onnxruntime']:.1%}"
    if "cuda" in found:
        islands = ", ".join(island.split(".")[1] for island in found["islands"]) or "nothing"
        said += f", cuda {found['cuda']:.1%}; {islands}"
    return name, ASKED, said, found["apart"] <= found["quantized"]


def latency(name: str) -> dict[str, Any]:
    """Milliseconds of int8 and of float32."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import torch
    from networks import Noise, context
    from zoo_models import made

    from qsweep.engines.onnxruntime import OnnxRuntime
    from qsweep.hub.export import float_graph
    from qsweep.quantize.ptq import PTQ

    torch.set_num_threads(1)
    model, inputs = made(name)
    engine, runners = OnnxRuntime(batch_size=1, threads=1), []
    with tempfile.TemporaryDirectory() as folder:
        found = context(Path(folder), task=Noise(inputs=inputs))
        quantized = PTQ(calibration_samples=len(inputs)).apply(model, found)
        for kind, graph in (("int8", quantized), ("float32", float_graph(model, found))):
            artifact = Path(folder) / kind
            artifact.mkdir()
            engine.lower(graph, artifact, found.store)
            runners.append(engine.load(artifact))
    seconds: list[list[float]] = [[], []]
    for _ in range(40):
        for runner, taken in zip(runners, seconds, strict=True):
            start = time.perf_counter()
            runner(inputs[:1])
            taken.append(time.perf_counter() - start)
    int8, real = (1e3 * statistics.median(taken[10:]) for taken in seconds)
    return {"int8": int8, "float32": real}


def latency_row(name: str) -> tuple[str, str, str, bool]:
    found = json.loads(_process(name, "latency"))
    if "refused" in found:
        return f"{name}, latency", "under float32", f"refused: {found['refused']}", False
    ratio = found["int8"] / found["float32"]
    return f"{name}, latency", "under float32", f"{ratio:.2f} of {found['float32']:.1f} ms", ratio < 1


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
    from zoo_models import CHAINS, LATENCIES, NAMES

    many = os.cpu_count() or 1
    parts = {
        "networks": (network_row, NAMES, many),
        "chains": (chain_row, CHAINS, many),
        "latency": (latency_row, LATENCIES, 1),
    }
    for part in sys.argv[1:] or parts:
        row, names, at_once = parts[part]
        with ThreadPoolExecutor(at_once) as pool:
            for figures in pool.map(row, [name for name in names if find_spec(name.split()[0])]):
                record("zoo", [figures])
    table("zoo", HEADING)


if __name__ == "__main__":
    main()
