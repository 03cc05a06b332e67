"""Accuracy of the quantization methods on a ResNet-20 and CIFAR-10, by qsweep's own sweeps.

    QSWEEP_DATA=<folder of data> python benchmarks/quantization.py [calibration weights w4a8 mixed training distilled
        speed]

Each part runs a spec of `experiments/quantization` and reads its records; what has run is not run again. Writes
`quantization.json` and `quantization.md` beside it. F is the accuracy of the fp32 checkpoint on the same 5,000 images.
Parts without training take minutes, `training` and `distilled` an hour.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import HERE, record, table

from qsweep.records import Record

EXPERIMENTS = HERE.parent / "experiments" / "quantization"
PYTHON = Path(sys.executable)
Rows = list[tuple[str, str, str, bool]]


class Sweep:
    """The records of one spec, run if it has not been."""

    def __init__(self, name: str) -> None:
        done = subprocess.run([PYTHON.parent / "qsweep", "run", EXPERIMENTS / f"{name}.yaml"])
        if done.returncode:
            raise SystemExit(done.returncode)
        files = sorted((EXPERIMENTS / "sweeps" / f"quantization-{name}" / "trials").glob("*/record.json"))
        self.records = [Record.model_validate_json(file.read_text()) for file in files]
        self.fp32 = self.records[0]

    def find(self, **fields: Any) -> list[Record]:
        """Trials whose `quantize` has these values; a field that it does not have counts as its default None."""
        quantize = [(r, r.config["compress"]["quantize"] or {}) for r in self.records if r.kind == "trial"]
        found = [r for r, config in quantize if all(_plain(config.get(key)) == value for key, value in fields.items())]
        failed = [f"{r.name}: {r.failure.message if r.failure else r.state}" for r in found if r.state != "complete"]
        if failed or not found:
            raise SystemExit(f"{fields}: {failed or 'no such trial'}")
        return found

    def pp(self, **fields: Any) -> list[float]:
        """Accuracy less F, in percentage points, of each trial found."""
        assert self.fp32.metrics.accuracy is not None
        return [100 * ((r.metrics.accuracy or 0.0) - self.fp32.metrics.accuracy) for r in self.find(**fields)]


def _plain(value: Any) -> Any:
    """A value of a config; of a method with fields its name."""
    return value["method"] if isinstance(value, dict) and "method" in value else value


def spread(values: list[float]) -> str:
    """`-0.12 pp`, or mean and range of several."""
    if len(values) == 1:
        return f"{values[0]:+.2f} pp"
    return f"{statistics.mean(values):+.2f} pp ({min(values):+.2f} to {max(values):+.2f})"


def calibration() -> Rows:
    sweep, rows = Sweep("calibration"), []
    for method in ("minmax", "moving_average", "percentile", "entropy", "mse"):
        for scheme in ("symmetric", "asymmetric"):
            found = sweep.pp(calibration=method, activation_scheme=scheme)
            name = f"W8A8, {method}, {scheme} activations, 3 draws"
            rows.append((name, "within 0.5 pp of F", spread(found), min(found) >= -0.5))
    return rows


WEIGHTS = {"method": "ptq", "activation_bits": None, "rounding": "nearest", "weight_range": "minmax"}


def weights() -> Rows:
    sweep = Sweep("weights")

    def nearest(granularity: str, equalize: bool = False, bias_correction: bool = False) -> float:
        options = {"weight_granularity": granularity, "equalize": equalize, "bias_correction": bias_correction}
        return sweep.pp(**WEIGHTS | options)[0]

    channel, tensor = nearest("channel"), nearest("tensor")
    rows = [
        ("F, fp32", "shown", f"{100 * (sweep.fp32.metrics.accuracy or 0):.2f} %", True),
        ("W4 weights, nearest, per channel", "2 to 6 pp under F", spread([channel]), -6 <= channel <= -2),
        ("W4 weights, nearest, per tensor", "3 pp under per channel", spread([tensor]), tensor <= channel - 3),
    ]
    for rounding in ("adaround", "gptq"):
        found = sweep.pp(method="ptq", rounding=rounding)
        asked = "within 1.0 pp of F" if rounding == "adaround" else "shown"
        rows.append((f"W4 weights, {rounding}, per channel, 3 draws", asked, spread(found), min(found) >= -1.0))
    seconds = max(r.seconds["quantize"] for r in sweep.find(rounding="adaround"))
    rows.append(("AdaRound of the ResNet-20", "under 3 minutes", f"{seconds:.0f} s", seconds < 180))
    repaired = nearest("tensor", True, True) - tensor
    share = repaired / -tensor
    name = "W4 weights per tensor: equalization and bias correction repair of the loss"
    rows.append((name, "at least half", f"{share:.0%} ({tensor:+.2f} to {tensor + repaired:+.2f} pp)", share >= 0.5))
    for granularity, plain in (("channel", channel), ("tensor", tensor)):
        for options in ((True, False), (False, True), (True, True)):
            if (granularity, options) == ("tensor", (True, True)):
                continue
            change = nearest(granularity, *options) - plain
            what = " and ".join(n for n, on in zip(("equalization", "bias correction"), options, strict=True) if on)
            name = f"W4 weights per {granularity}: change by {what}"
            rows.append((name, "no worse than -0.2 pp", f"{change:+.2f} pp", change >= -0.2))
    (uniform,), (codebook,) = sweep.find(**WEIGHTS | PLAIN), sweep.find(method="codebook", granularity="scaled")
    gain = 100 * ((codebook.metrics.accuracy or 0) - (uniform.metrics.accuracy or 0))
    rows.append(("codebook of 4 bits against uniform 4 bits", "1 pp better", f"{gain:+.2f} pp", gain >= 1))
    size = (codebook.metrics.size_bytes or 0) / (uniform.metrics.size_bytes or 1)
    rows.append(("size of its files", "within 3 %", f"{100 * (size - 1):+.1f} %", abs(size - 1) <= 0.03))
    for granularity in ("tensor", "channel"):
        found = sweep.pp(method="codebook", granularity=granularity)
        rows.append((f"codebook of 4 bits, a table a {granularity}", "shown", spread(found), True))
    rows.append(("additive powers of two, 4 bits", "shown", spread(sweep.pp(method="apot")), True))
    return rows


PLAIN = {"weight_granularity": "channel", "equalize": False, "bias_correction": False}


def w4a8() -> Rows:
    sweep, rows = Sweep("w4a8"), []
    best = {name: sweep.pp(method="ptq", weight_bits=4, rounding=name) for name in ("nearest", "adaround", "gptq")}
    for name, found in best.items():
        asked = "within 1.5 pp of F" if name == "adaround" else "shown"
        rows.append((f"W4A8 static, {name}", asked, spread(found), asked == "shown" or min(found) >= -1.5))
    for options in ((True, False), (False, True), (True, True)):
        change = sweep.pp(weight_bits=8, equalize=options[0], bias_correction=options[1])[0]
        what = " and ".join(n for n, on in zip(("equalization", "bias correction"), options, strict=True) if on)
        rows.append((f"W8A8 with {what}", "no worse than -0.2 pp", f"{change:+.2f} pp", change >= -0.2))
    return rows


def mixed() -> Rows:
    sweep, rows = Sweep("mixed"), []
    for bits in (3, 4, 5):
        (uniform,), (by_layer,) = sweep.find(method="ptq", weight_bits=bits), sweep.find(average_bits=bits)
        accuracies = [100 * (r.metrics.accuracy or 0.0) for r in (by_layer, uniform)]
        sizes = [r.metrics.size_bytes or 0 for r in (by_layer, uniform)]
        measured = f"{accuracies[0]:.2f} against {accuracies[1]:.2f} %, {sizes[0] / sizes[1]:.3f} of its bytes"
        met = accuracies[0] >= accuracies[1] and sizes[0] <= 1.005 * sizes[1]
        rows.append((f"bits by layer at the average of {bits}", "no worse at the same bytes", measured, met))
    seconds = max(r.seconds["quantize"] for r in sweep.find(method="mixed"))
    rows.append(("sensitivity of all layers and allocation", "under 2 minutes", f"{seconds:.0f} s", seconds < 120))
    return rows


def training() -> Rows:
    sweep = Sweep("training")
    how = "that begin with GPTQ's integers"
    rows = [_trained(sweep, 3, 8, 0.3, how), _trained(sweep, 2, 8, 1.5, how)]
    name, _, measured, _ = _trained(sweep, 4, 4, None, how)
    rows.append((f"{name}, from labels alone", "shown", measured, True))
    learned, straight = (sweep.pp(method=name, weight_bits=3, activation_bits=3)[0] for name in ("lsq", "qat"))
    measured = f"{learned - straight:+.2f} pp ({learned:+.2f} and {straight:+.2f}, one epoch each)"
    return [*rows, ("W3A3, LSQ against straight-through", "0.5 pp better", measured, learned >= straight + 0.5)]


def distilled() -> Rows:
    sweep = Sweep("distilled")
    how = "that begin with GPTQ's integers and follow the float model"
    return [_trained(sweep, 4, 4, 0.6, how), _trained(sweep, 2, 2, None, how)]


def _trained(
    sweep: Sweep, weight: int, activation: int, bound: float | None, how: str = ""
) -> tuple[str, str, str, bool]:
    fields = {"method": "lsq", "weight_bits": weight, "activation_bits": activation}
    (found,), (change,) = sweep.find(**fields), sweep.pp(**fields)
    epochs = f"{found.config['compress']['quantize']['epochs']} epochs {how}".strip()
    asked, met = f"within {bound} pp of F" if bound else "shown", bound is None or change >= -bound
    return f"W{weight}A{activation}, LSQ, edges 8 bits", asked, f"{spread([change])} after {epochs}", met


def speed() -> Rows:
    done = subprocess.run([PYTHON, HERE / "qat_step.py", "--threads", "2"], capture_output=True, text=True, check=True)
    rows = []
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            continue
        found: dict[str, Any] = json.loads(line)
        for method in ("ste", "lsq", "pact"):
            ratio = found[method]["wall"]
            name = f"{method} step of the float step, {found['mode']}, {found['precision']}, batch {found['batch']}"
            rows.append((name, "at most 1.3", f"{ratio:.2f}", ratio <= 1.3))
    return rows


PARTS = {
    "calibration": calibration,
    "weights": weights,
    "w4a8": w4a8,
    "mixed": mixed,
    "training": training,
    "distilled": distilled,
    "speed": speed,
}
HEADING = """# Quantization methods: a ResNet-20 on CIFAR-10

    QSWEEP_DATA=<folder of data> python benchmarks/quantization.py"""


def main() -> None:
    if "QSWEEP_DATA" not in os.environ:
        raise SystemExit("QSWEEP_DATA must name the folder of data")
    os.environ["QSWEEP_DATA"] = str(Path(os.environ["QSWEEP_DATA"]).resolve())
    for part in sys.argv[1:] or PARTS:
        record("quantization", PARTS[part]())
        table("quantization", HEADING)


if __name__ == "__main__":
    main()
