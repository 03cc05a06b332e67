"""What a trial costs beside its training, lowering, evaluation and latency.

    python benchmarks/overhead.py [--trials 510] [--track] [--sampler tpe]

Runs a sweep whose `build` and `measure` only write a result, and prints as JSON the median seconds from one record to
the next around trial 10 and around trial 500: asking, folders, two workers, two results, the record, telling; with
`--track` publishing to MLflow (sqlite) too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

from qsweep.records import Record
from qsweep.spec import Spec

SPEC = {
    "name": "overhead",
    "task": {"method": "image_classification", "model": {"arch": "digits_cnn"}, "data": {"method": "digits"}},
    "compress": {
        "prune": {"choice": [None, {"method": "magnitude", "sparsity": {"range": [0.3, 0.9]}}]},
        "quantize": {
            "choice": [
                {"method": "ptq", "weight_bits": {"choice": [4, 6, 8]}, "calibration_samples": {"range": [64, 1024]}},
                {"method": "qat", "weight_bits": {"choice": [2, 3, 4]}, "epochs": {"range": [1, 40]}},
            ]
        },
    },
    "target": {"engine": "onnxruntime"},
    "constraints": {"accuracy_drop_pp": {"max": 5.0}},
}


def prepare(folder: Path) -> None:
    _write(folder, "prepare", {})


def build(folder: Path) -> None:
    compress = json.loads((folder / "job.json").read_text())["config"]["compress"]
    bits, sparsity = (compress["quantize"] or {}).get("weight_bits", 32), (compress["prune"] or {}).get("sparsity", 0)
    _write(folder, "build", {"size_bytes": 1000 * bits * (1 - sparsity), "accuracy": 0.95 - 0.3 * sparsity / bits})


def measure(folder: Path) -> None:
    _write(folder, "measure", {"latency_ms": 1.0 + int(folder.name) % 7 / 10})


def test(folder: Path) -> None:
    _write(folder, "test", {"accuracy_test": 0.9})


def _write(folder: Path, job: str, metrics: dict[str, float]) -> None:
    (folder / f"{job}.json").write_text(json.dumps({"metrics": metrics, "seconds": {}}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=510)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--track", action="store_true")
    arguments = parser.parse_args()
    search = {"trials": arguments.trials, "sampler": arguments.sampler, "repeats": 0}
    spec = Spec.model_validate(SPEC | {"search": search})
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(figures(spec, Path(root), arguments.track)))


def figures(spec: Spec, root: Path, track: bool) -> dict[str, object]:
    """Median seconds a trial over ten trials each, by the number of the last of them."""
    times: list[float] = []
    final = 0.0
    for record in records(spec, root, track):
        final = time.perf_counter()
        if record.kind == "trial" and record.duplicate_of is None and record.front is None:
            times.append(final)
    steps = [after - before for before, after in pairwise(times)]
    places = {
        str(place): statistics.median(steps[place - 10 : place]) for place in (10, 100, 500) if place <= len(steps)
    }
    seconds = {f"seconds_at_{place}": round(value, 4) for place, value in places.items()}
    return {"track": track, "sampler": spec.search.sampler, **seconds, "slowest": round(max(steps), 3)}


def records(spec: Spec, root: Path, track: bool) -> Generator[Record, None, bool]:
    from qsweep.study import run

    path = Path(__file__)
    sys.path.insert(0, str(path.parent))
    source = run(spec, root, jobs=path.stem, preload=("qsweep.spec", path.stem))
    if not track:
        return source
    from qsweep.track import publish

    return publish(source, spec, root)


if __name__ == "__main__":
    main()
