"""The figures of the main road, from a spec to a measured front.

    QSWEEP_DATA=<folder of data> python benchmarks/spine.py [help demo cifar grid road exact same overhead kill]

Writes `spine.json` and `spine.md` beside it. Each part can be run alone and replaces its rows. Run it on a machine that
does nothing else: figures are ratios within one run, but a second load falls on both sides unevenly.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rows import HERE, record, table

from qsweep.records import Record

ROOT = HERE.parent
EXPERIMENTS = ROOT / "experiments"
PYTHON = Path(sys.executable)
Rows = list[tuple[str, str, str, bool]]
Change = Callable[[dict[str, Any]], None]


def sweep(
    name: str, place: Path, change: Callable[[dict[str, Any]], None] = lambda spec: None
) -> tuple[list[Record], float]:
    """Run an experiment by the command line in `place`; its records and the seconds it took."""
    place.mkdir(parents=True, exist_ok=True)
    spec = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    change(spec)
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    start = time.perf_counter()
    done = subprocess.run([PYTHON.parent / "qsweep", "run", path], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    files = sorted((place / "sweeps" / spec["name"] / "trials").glob("*/record.json"))
    return [Record.model_validate_json(file.read_text()) for file in files], seconds


def script(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([PYTHON, HERE / f"{name}.py", *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@contextmanager
def folder() -> Any:
    with tempfile.TemporaryDirectory(prefix="qsweep-bench-") as place:
        yield Path(place)


@contextmanager
def compiler_cache(place: Path) -> Any:
    """Let Inductor keep what it compiles in `place`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place)
    try:
        yield
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]


def help_() -> Rows:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([PYTHON.parent / "qsweep", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return [("`qsweep --help`", "under 0.5 s", f"{median:.2f} s (median of 7)", median < 0.5)]


def demo() -> Rows:
    with folder() as place:
        records, seconds = sweep("digits", place)
    trials = [r for r in records if r.kind == "trial" and r.state == "complete" and r.duplicate_of is None]
    knobs = {key for r in trials for key, value in r.config["compress"].items() if value is not None}
    knobs |= {str(r.config["compress"]["quantize"]["method"]) for r in trials}
    baselines = {r.name for r in records if r.kind == "baseline"}
    needed = ("accuracy", "parity_top1", "size_bytes", "size_zstd_bytes", "size_theoretical_bytes", "latency_ms")
    whole = all(getattr(r.metrics, name) is not None for r in records if r.state == "complete" for name in needed)
    int8 = [r for r in records if r.kind == "baseline" and r.name.startswith("ptq-w8s")]
    drop = max(abs(r.metrics.accuracy_drop_pp or 0.0) for r in int8)
    parity = min(r.metrics.parity_top1 or 0.0 for r in int8)
    macs = {r.engine: r.metrics.int8_mac_fraction or 0.0 for r in int8}
    enough = len(trials) >= 12 and knobs >= {"prune", "distill", "quantize", "ptq", "qat"}
    shares = ", ".join(f"{engine} {value:.3f}" for engine, value in macs.items())
    both = len(macs) == 2 and min(macs.values()) >= 0.95
    found = f"{len(trials)}: {', '.join(sorted(knobs))}"
    there = {"fp32", "bf16", "ptq-w8s-a8a"} <= baselines
    return [
        ("demo, time of `qsweep run`", "under 6 min", f"{seconds / 60:.1f} min", seconds < 360),
        ("demo, finished trials", "at least 12, all knobs", found, enough),
        ("demo, baselines", "fp32, bf16, int8", ", ".join(sorted(baselines)), there),
        ("demo, accuracy, parity, sizes, latency", "of every trial", "all there" if whole else "some missing", whole),
        ("demo, int8 PTQ accuracy", "within 1.0 pp of fp32", f"{drop:.2f} pp", drop <= 1.0),
        ("demo, int8 PTQ parity", "at least 99 %", f"{parity:.2%}", parity >= 0.99),
        ("demo, int8 PTQ `int8_mac_fraction`", "at least 0.95 on both engines", shares, both),
    ]


def cifar() -> Rows:
    with folder() as place:
        records, _ = sweep("cifar10-resnet20", place)
    named = {(r.name, r.engine, r.config["target"].get("compile")): r.metrics for r in records if r.kind == "baseline"}
    ratio = {key: metrics.latency_ratio or 0.0 for key, metrics in named.items()}
    int8, onnx = ("ptq-w8s-a8a", "inductor", None), ("ptq-w8s-a8a", "onnxruntime", None)
    fp32, onnx_fp32 = ("fp32", "float", True), ("fp32", "onnxruntime", None)
    faster = ratio["fp32", "float", False] / ratio[int8]
    onnx_faster = ratio[onnx_fp32] / ratio[onnx]
    bf16 = min(value for key, value in ratio.items() if key[0] == "bf16") / ratio[int8]
    drop = max(abs(named[key].accuracy_drop_pp or 0.0) for key in (int8, onnx))
    bytes_ = {key: metrics.size_bytes or 0.0 for key, metrics in named.items()}
    sizes = [bytes_[int8] / bytes_[fp32], bytes_[onnx] / bytes_[onnx_fp32]]
    by_bits = {
        bits: max(r.metrics.size_bytes or 0.0 for r in records if r.state == "complete" and f"-w{bits}s" in r.name)
        for bits in sorted({int(r.name.split("-w")[1][0]) for r in records if "-w" in r.name})
    }
    falling = len(by_bits) > 1 and list(by_bits.values()) == sorted(by_bits.values())
    listed = ", ".join(f"{bits}: {size:,.0f}" for bits, size in by_bits.items())
    shares = ", ".join(f"{size:.3f}" for size in sizes)
    return [
        ("ResNet-20, batch 128: `inductor` int8 against fp32 eager", "at least 3x", f"{faster:.2f}x", faster >= 3),
        ("the same against fp32 compiled", "shown", f"{ratio[fp32] / ratio[int8]:.2f}x", True),
        ("the same against the best bf16", "shown", f"{bf16:.2f}x", True),
        ("`onnxruntime` int8 against its fp32", "at least 1.5x", f"{onnx_faster:.2f}x", onnx_faster >= 1.5),
        ("ResNet-20, W8A8 PTQ accuracy", "within 0.5 pp of fp32", f"{drop:.2f} pp", drop <= 0.5),
        ("ResNet-20, W8A8 files of fp32's (inductor, onnxruntime)", "at most 0.33", shares, max(sizes) <= 0.33),
        ("ResNet-20, largest files by weight bits", "falling", listed, falling),
    ]


def _grid(images: int) -> Change:
    def change(spec: dict[str, Any]) -> None:
        train = spec["task"]["data"]["train"]
        spec["task"]["data"]["train"] = {"file": train, "rows": [0, 2048]}  # calibration's
        spec["task"]["data"]["validation"] = {"file": train, "rows": [50_000 - images, 50_000]}

    return change


def grid() -> Rows:
    with folder() as place:
        with compiler_cache(place / "cache-a"):  # each begins as on a machine that has compiled nothing yet
            records, seconds = sweep("ptq-grid", place / "a", _grid(10_000))
        with compiler_cache(place / "cache-hand"):
            start = time.perf_counter()
            script("hand_grid")
            hand = time.perf_counter() - start
        again, _ = sweep("ptq-grid", place / "b", _grid(10_000))
    measured = [r for r in records if r.name.startswith("ptq") and r.state == "complete" and r.duplicate_of is None]
    failed = sum(r.state != "complete" for r in records)
    sizes = {bits: {r.metrics.size_bytes or 0 for r in measured if f"w{bits}s" in r.name} for bits in (4, 6, 8)}
    ratios = [[r.metrics.latency_ratio or 0.0 for r in measured if f"w{bits}s" in r.name] for bits in (4, 6, 8)]
    four, six, eight = map(statistics.median, ratios)
    falling = max(sizes[4]) < min(sizes[6]) and max(sizes[6]) < min(sizes[8])
    fronts = [sorted(r.uid for r in each if r.front) for each in (records, again)]
    same_front = fronts[0] == fronts[1]
    exact = {r.uid: r.metrics.accuracy for r in records} == {r.uid: r.metrics.accuracy for r in again}
    time_ = f"{seconds / hand:.2f} ({seconds:.0f} s; by hand {hand:.0f} s)"
    members = f"{'the same' if same_front else 'different'} ({len(fronts[0])} members)"
    return [
        ("grid, points measured, failed", "12, 0", f"{len(measured)}, {failed}", len(measured) == 12 and not failed),
        ("grid, size falls with the bits", "yes", "yes" if falling else "no", falling),
        ("grid, latency of 4 and of 6 bits over that of 8", "shown", f"{four / eight:.2f}, {six / eight:.2f}", True),
        ("grid, front in two runs", "the same", members, same_front),
        ("grid, accuracies in two runs", "the same to the bit", "the same" if exact else "different", exact),
        ("grid, 10,000 images, total time of the hand-written loop's", "at most 1.0", time_, seconds <= hand),
    ]


def road() -> Rows:
    ours, hand = [], []
    for _ in range(3):
        ours.append(script("road"))
        hand.append(script("hand_road"))
    ratio = statistics.median(o["total"] / h["total"] for o, h in zip(ours, hand, strict=True))
    last = [f"{found['total']:.1f} s, accuracy {found['accuracy']:.4f}" for found in (ours[-1], hand[-1])]
    name = "checkpoint to W8A8 artifact and its accuracy on 10,000 images, of by hand"
    return [(name, "at most 1.3", f"{ratio:.2f} ({'; by hand '.join(last)})", ratio <= 1.3)]


def exact() -> Rows:
    found = script("exact")
    rows: Rows = []
    for name, title in (("digits", "digits CNN"), ("resnet", "ResNet-20")):
        differ, total = found[f"{name}_onnx"], found[f"{name}_total"]
        rows.append(
            (f"reference = onnxruntime on all int8 tensors, {title}", "0 differ", f"{differ} of {total:,}", not differ)
        )
        share, agree = found[f"{name}_inductor"], found[f"{name}_top1"]
        asked = "within 1 level on at most 1e-4"
        rows.append((f"inductor, layer by layer on identical inputs, {title}", asked, f"{share:.1e}", share <= 1e-4))
        rows.append(
            (f"inductor, top-1 agreement end to end, {title}", "at least 99.8 %", f"{agree:.2%}", agree >= 0.998)
        )
    return rows


def same() -> Rows:
    def short(spec: dict[str, Any]) -> None:
        spec["search"]["trials"] = 5

    with folder() as place:
        runs = [sweep("digits", place / name, short)[0] for name in "ab"]
        folders = [place / name / "sweeps" / "digits" for name in "ab"]
        files = [[_weights(at / r.folder) for r in each] for at, each in zip(folders, runs, strict=True)]
    equal = [[(r.uid, r.metrics.accuracy) for r in each] for each in runs]
    met = equal[0] == equal[1] and files[0] == files[1]
    measured = f"{'equal' if met else 'different'} ({len(files[0])} configs)"
    return [("same spec and seed twice: configs, weights, accuracies", "to the bit", measured, met)]


def _weights(trial: Path) -> bytes:
    path = trial / "artifact" / "weights.safetensors"
    return path.read_bytes() if path.exists() else b""


def overhead() -> Rows:
    found = script("overhead", "--track")
    rows: Rows = []
    for place in (10, 500):
        seconds = found[f"seconds_at_{place}"]
        name = f"overhead of a trial, MLflow included, at trial {place}"
        rows.append((name, "median under 0.25 s", f"{seconds:.3f} s", seconds < 0.25))
    return rows


def kill() -> Rows:
    tests = ROOT / "tests" / "test_kill.py"
    done = subprocess.run([PYTHON, "-m", "pytest", "-q", tests], capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1]
    name = "kill -9 of driver and worker, then `qsweep run` again (`tests/test_kill.py`)"
    return [(name, "nothing lost, repeated or RUNNING", last, done.returncode == 0)]


PARTS = {
    "help": help_,
    "demo": demo,
    "cifar": cifar,
    "grid": grid,
    "road": road,
    "exact": exact,
    "same": same,
    "overhead": overhead,
    "kill": kill,
}
HEADING = """# The spine: from a spec to a measured front

    QSWEEP_DATA=<folder of data> python benchmarks/spine.py"""


def main() -> None:
    if "QSWEEP_DATA" not in os.environ:
        raise SystemExit("QSWEEP_DATA must name the folder of data")
    os.environ["QSWEEP_DATA"] = str(Path(os.environ["QSWEEP_DATA"]).resolve())
    for part in sys.argv[1:] or PARTS:
        record("spine", PARTS[part]())
        table("spine", HEADING)


if __name__ == "__main__":
    main()
