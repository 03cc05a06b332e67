"""Records as a sweep of a small network leaves them, made by hand, and their sweep's folder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from small_sweep import small_spec

from qsweep.config import content_hash
from qsweep.records import Failure, Metrics, Record, Repetition
from qsweep.spec import Spec
from qsweep.study import SweepFolder
from qsweep.study.repeats import with_repetition

FLOAT, BF16 = None, {"method": "cast", "dtype": "bf16"}
MAGNITUDE = {"method": "magnitude", "sparsity": 0.5}
TARGET = {"engine": "onnxruntime", "batch_size": 4}
BITS = {"conv1.weight": 8, "conv2.weight": 2, "linear.weight": 2}


def record(number: int, name: str, accuracy: float, size: float, latency: float, **changes: Any) -> Record:
    """A finished trial of `onnxruntime`, batch size 4."""
    quantize = changes.pop("quantize", {"method": "ptq", "weight_bits": 8, "activation_bits": 8})
    compress = {"prune": changes.pop("prune", None), "distill": None, "quantize": quantize}
    config = {"compress": compress, "target": changes.pop("target", TARGET)}
    metrics = Metrics(
        accuracy=accuracy, accuracy_drop_pp=100 * (0.97 - accuracy), size_bytes=size, latency_ms=latency,
        latency_low_ms=0.98 * latency, latency_high_ms=1.02 * latency, latency_ratio=latency, parity_top1=0.995,
    )  # fmt: skip
    known: dict[str, Any] = {
        "number": number, "uid": content_hash([number, config]), "name": name, "state": "complete", "config": config,
        "engine": "onnxruntime", "metrics": metrics, "seconds": {"quantize": 0.5, "measure": 1.5}, "machine": "m1",
        "folder": f"trials/{number:04d}",
    }  # fmt: skip
    return Record(**known | changes)


def records() -> list[Record]:
    """Three baselines, two trials on the front, one off it, one that failed, one equal to an earlier one."""
    failed = Failure(kind="ParityFailure", message="top-1 agreement must be at least 0.95 (got 0.31) <on w2>")
    return [
        record(0, "fp32", 0.97, 40_000.0, 1.0, kind="baseline", quantize=FLOAT),
        record(1, "bf16", 0.969, 20_000.0, 0.8, kind="baseline", quantize=BF16, engine="float"),
        record(2, "ptq-w8s-a8a", 0.968, 10_000.0, 0.5, kind="baseline"),
        record(3, "ptq-w4s-a8a", 0.95, 5_000.0, 0.5, quantize={"method": "ptq", "weight_bits": 4}, layer_bits=BITS),
        record(4, "qat-w8s-a8a-prune50", 0.971, 9_000.0, 0.58, prune=MAGNITUDE, quantize={"method": "qat"}),
        record(5, "ptq-w6s-a8a", 0.94, 7_500.0, 0.6, quantize={"method": "ptq", "weight_bits": 6}),
        record(6, "ptq-w2s-a8a", 0.0, 0.0, 0.0, state="failed", failure=failed, metrics=Metrics()),
        record(7, "ptq-w4s-a8a", 0.95, 5_000.0, 0.5, duplicate_of=3, folder="trials/0003"),
    ]  # fmt: skip


def finished(found: Sequence[Record]) -> list[Record]:
    """The records as the driver leaves them at the end: the front named and tested, a near tie repeated."""
    places = {2: "probable", 3: "certain", 4: "certain"}
    other = found[2].metrics.model_copy(update={"accuracy": 0.964}) if len(found) > 2 else Metrics()
    failed = Failure(kind="NotFinite", message="NaN in a loss")
    known = {"seed": 1, "folder": "repeats/0002-1"}
    found = [
        with_repetition(
            with_repetition(r, Repetition(round=1, metrics=other, **known)),  # type: ignore[arg-type]
            Repetition(round=2, failure=failed, **known),  # type: ignore[arg-type]
        )
        if r.number == 2
        else r
        for r in found
    ]
    return [
        r.model_copy(
            update={"front": places[r.number], "metrics": r.metrics.model_copy(update={"accuracy_test": 0.96})}
        )
        if r.number in places
        else r
        for r in found
    ]


def spec(**track: Any) -> Spec:
    return asked(track=track)


def asked(**changes: Any) -> Spec:
    """A spec with the target of the records."""
    return small_spec(target=TARGET, **changes)


def write(root: Path, *found: Record) -> SweepFolder:
    """The records on disk, each with an artifact."""
    folder = SweepFolder(root, "small")
    for one in found:
        folder.write(one)
        (folder.trial(one.number) / "artifact").mkdir(exist_ok=True)
        (folder.trial(one.number) / "artifact" / "weights.bin").write_bytes(bytes(range(64)))
    return folder


def drive(root: Path, first: Sequence[Record], last: Sequence[Record] = ()) -> Generator[Record, None, bool]:
    """A driver whose trials take no time: each record is durable before it is handed on."""
    for one in (*first, *last):
        write(root, one)
        yield one
    return True
