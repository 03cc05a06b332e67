"""What a person who reads a front has to know beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qsweep.records import Record
from qsweep.spec import Spec
from qsweep.study.baselines import refusal
from qsweep.study.folder import SweepFolder, read_result
from qsweep.study.front import AVERAGED

_FAR = 1.2
"""Ratios of milliseconds that are so many times the measured ones or more mislead who divides them."""


def notes(spec: Spec, folder: SweepFolder, records: Sequence[Record]) -> Iterator[str]:
    """Of a sweep and its records, one sentence each: what is doubtful about the data, bounds that the model itself does
    not keep, engines that take no version of it, accuracies of the test split that could not be had, milliseconds that
    are not to be compared."""
    fp32 = next((record for record in records if record.number == 0), None)
    yield from early(spec, folder, fp32)
    baselines = [record for record in records if record.kind == "baseline"]
    for engine in dict.fromkeys(record.engine for record in baselines):
        if (reason := refusal(engine, baselines)) is not None:
            yield reason
    for record in records:
        failed = read_result(folder.path / record.folder / "test.json").get("failure")
        if failed and record.duplicate_of is None:
            yield f"the test split of #{record.number} `{record.name}` failed: {failed['message']}"
    if fp32 is not None:
        yield from _idle(records, fp32)
        yield from _on_test(spec, records, fp32)
        yield from _compared(spec, records, fp32)


def early(spec: Spec, folder: SweepFolder, fp32: Record | None) -> Iterator[str]:
    """What is known while there is time to stop: what is doubtful about the data, and the bounds of accuracy that the
    model breaks before it is compressed, one sentence each."""
    yield from read_result(folder.path / "prepare" / "prepare.json").get("doubts", [])
    if fp32 is None:
        return
    for name in AVERAGED:
        bound, value = spec.constraints.get(name), getattr(fp32.metrics, name)
        if bound is not None and value is not None and not bound.keeps(value):
            yield (
                f"fp32 itself does not keep `constraints.{name}` (its {name} is {value:,.6g}): few compressed versions "
                "will, if any"
            )


def _on_test(spec: Spec, records: Sequence[Record], fp32: Record) -> Iterator[str]:
    """Members of the front whose figures of the test split are not within the bounds of those of the validation one."""
    bounds = {name: spec.constraints[name] for name in ("accuracy_drop_pp", "accuracy") if name in spec.constraints}
    for record in records:
        value, whole = record.metrics.accuracy_test, fp32.metrics.accuracy_test
        if not record.front or value is None or whole is None:
            continue
        found = {"accuracy_drop_pp": spec.task.judged_by.scale * (whole - value), "accuracy": value}
        for name, bound in bounds.items():
            if not bound.keeps(found[name]):
                got = f"{found[name]:,.6g}"
                yield f"#{record.number} does not keep `constraints.{name}` on the test split (it is {got} there)"


def _idle(records: Sequence[Record], fp32: Record) -> Iterator[str]:
    """What was asked of configs, and did nothing to this model."""
    done = [record for record in records if record.state == "complete" and record.duplicate_of is None]
    whole = [r for r in done if _method(r, "prune") == "channels" and r.metrics.params == fp32.metrics.params]
    if whole and fp32.metrics.params is not None:
        yield f"no channel could be taken out for {_named(whole)}: every layer is as wide as before, fine-tuned"
    real = [r for r in done if _of_integers(r) and r.metrics.int8_mac_fraction == 0 and not r.simulated]
    if real:
        yield f"`int8_mac_fraction` is 0 for {_named(real)}, though activations were to be quantized"


def _method(record: Record, stage: str) -> str | None:
    return (record.config.get("compress", {}).get(stage) or {}).get("method")


def _of_integers(record: Record) -> bool:
    bits = (record.config.get("compress", {}).get("quantize") or {}).get("activation_bits")
    return bits is not None and bits <= 8


def _named(records: Sequence[Record]) -> str:
    first = ", ".join(f"#{record.number}" for record in records[:8])
    return first + (f" and {len(records) - 8} more" if len(records) > 8 else "")


def _compared(spec: Spec, records: Sequence[Record], fp32: Record) -> Iterator[str]:
    """What latencies may and may not be held against."""
    sizes = {record.call.batch_size for record in records if record.state == "complete"}
    if len(sizes) > 1 and "throughput" not in spec.objectives:
        yield (
            f"latencies are of calls of {', '.join(map(str, sorted(sizes)))} samples, and `× fp32` is held against "
            "fp32 at the same batch size; what compares them is `throughput`, as an objective, too"
        )
    if any(r.engine != fp32.engine for r in records if r.kind == "trial" and r.state == "complete"):
        yield f"`× fp32` is held against fp32 on `{fp32.engine}`, the engine that the sweep began with, on every engine"
    if (apart := max(_apart(record, fp32) for record in records)) > _FAR:
        yield (
            f"milliseconds of two rows are of two processes, and up to {apart - 1:.0%} apart by what else the machine "
            "did; `× fp32` was taken in turns with fp32, and is what is compared"
        )


def _apart(record: Record, fp32: Record) -> float:
    """How many times further from those of fp32 its milliseconds are than its ratio says, or nearer; 1 where they are
    of another batch size or other threads, or were not taken."""
    own, other, ratio = record.metrics.latency_ms, fp32.metrics.latency_ms, record.metrics.latency_ratio
    if not own or not other or not ratio or record.call != fp32.call:
        return 1.0
    return max(own / other / ratio, other * ratio / own)
