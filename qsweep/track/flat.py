"""A record as MLflow takes it: flat params, metrics, tags. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from qsweep.records import Record
from qsweep.spec import Compression

FLOAT_BITS = {"bf16": 16, "fp16": 16}


def params(record: Record) -> dict[str, str]:
    """The config's values by their path, such as `compress.quantize.weight_bits`.

    Beside them every trial has `quantize`, `prune` and `distill` (the method, or `none`), `weight_bits` (the average
    where layers differ) and `activation_bits` (32 for floating point): charts drop a run that lacks an axis.
    """
    compress = dict(record.config.get("compress", {}))
    stages = {name: compress.get(name) or {} for name in Compression.model_fields}
    width = FLOAT_BITS.get(str(stages["quantize"].get("dtype")), 32)
    axes = {name: stage.get("method", "none") for name, stage in stages.items()}
    axes["weight_bits"] = stages["quantize"].get("weight_bits", stages["quantize"].get("average_bits", width))
    axes["activation_bits"] = stages["quantize"].get("activation_bits") or width
    return {key: str(value) for key, value in [*leaves(record.config), *axes.items()]}


def metrics(record: Record) -> dict[str, float]:
    """Every metric that was measured, under its own name, and `seconds_<stage>`."""
    found = {name: value for name, value in record.metrics.model_dump().items() if value is not None}
    found |= {f"seconds_{stage}": seconds for stage, seconds in record.seconds.items()}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def tags(record: Record) -> dict[str, str]:
    """What a run is found by. `qsweep.front` is `no`, `probable` or `certain`."""
    failure = f"{record.failure.kind}: {record.failure.message}"[:5000] if record.failure else ""
    found = {
        "qsweep.kind": record.kind,
        "qsweep.number": str(record.number),
        "qsweep.uid": record.uid,
        "qsweep.state": record.state,
        "qsweep.engine": record.engine,
        "qsweep.simulated": "yes" if record.simulated else "",
        "qsweep.front": record.front or "no",
        "qsweep.machine": record.machine,
        "qsweep.attempts": str(record.attempts),
        "qsweep.repetitions": str(len(record.repetitions) or ""),
        "qsweep.failure": failure,
    }
    return {name: value for name, value in found.items() if value}


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of plain data by their path; a mapping whose keys MLflow takes for no name, such as `layer1.*`, is
    one value."""
    if isinstance(node, dict) and not all(re.fullmatch(r"[\w. -]+", str(key)) for key in node):
        yield path, ", ".join(f"{key}: {value}" for key, value in node.items())
    elif isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list | tuple):
        yield path, ",".join(str(item) for item in node)
    else:
        yield path, node
