"""int8 on a GPU: equality with the reference first, then time beside floating point. One command of at most 9 minutes.

    python benchmarks/gpu.py [--out FOLDER] [--budget SECONDS] [--parts NAME ...] [--missing] [--device cpu --tiny]

Needs PyTorch 2.11, Triton 3.6 and numpy; what else it finds (torchao, NVML, qsweep's own requirements) adds columns and
rows. Writes `gpu.md` and `gpu.json`, complete at any moment: rows that are not measured say so. Without a GPU that is
all of them. `--device cpu --tiny` runs all that a CPU can, kernels in Triton's interpreter, to find mistakes: its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from gpu_clock import Bench
    from gpu_rows import Rows

BEGUN = time.monotonic()
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # qsweep need not be installed

HEADING = """# int8 on a GPU

    python benchmarks/gpu.py

Networks: milliseconds of a call, inputs copied to the captured graph; batch norms folded and channels last everywhere;
the ratio is that of the fastest baseline to int8, and all baselines stand beside it. `graph`: eager, captured in a CUDA
graph; `cudnn fused`: the same with bias, sum and ReLU in the convolutions' kernels; `compiled`: `torch.compile`;
`max-autotune`: its mode of that name, as far as time goes; both captured. Convolutions: with bias and ReLU, launches
alone, inputs that may lie in the cache; the floor is the larger of moving int8 bytes at the measured bandwidth and
computing at twice the measured bf16 rate. Small networks at small batch are bound by launching kernels."""
_GRACE = 12.0
"""Seconds past the budget after which the process ends, whatever it is in the middle of."""


PARTS = (
    "equality",
    "roofs",
    "main",
    "convolutions",
    "qat",
    "trainings",
    "networks",
    "linears",
    "energy",
    "sweeps",
    "tuned",
    "compiled",
    "autotune",
)
"""In the order of what they tell."""


def main() -> None:
    options = arguments()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # PyTorch's compiler would move it, in each process at another moment: what one compiles another would not find
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started ends, too
    import gpu_asked as asked
    import torch
    from gpu_clock import Bench
    from gpu_rows import Rows, read

    from qsweep.cuda.device import refusal

    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known, why = read(options.out), refusal(device)
    if why is not None:
        print(f"nothing is measured here: {why}", flush=True)
        if not known.rows:  # figures of a machine that has a GPU are not replaced by none
            Rows(asked.rows(), options.out, HEADING, f"{date.today()}: no machine with a GPU was at hand.").write()
        return
    kept = known if options.parts or options.missing else None
    rows = Rows(asked.rows(), options.out, HEADING, about(device), kept, settle=options.missing)
    bench = Bench(device, options.tiny, options.budget, BEGUN)
    run(bench, rows, options)
    rows.fill(rows.pending(), "not measured", None)
    print(f"{time.monotonic() - BEGUN:.0f} s", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of gpu.md and gpu.json")
    parser.add_argument("--budget", type=float, default=510.0, help="seconds, 510 unless told")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these; other rows stay as they are")
    parser.add_argument("--missing", action="store_true", help="only rows that have not been measured, on any machine")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes: for a test")
    options = parser.parse_args()
    if (options.device == "cpu") != options.tiny:
        parser.error("--device cpu and --tiny go together: the kernels do not run on a CPU but in an interpreter")
    return options


def about(device: torch.device) -> str:
    import torch
    import triton

    from qsweep import machine

    where = machine.fingerprint(device.type)
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    return f"{date.today()}, {where}, {versions}." + " Tiny sizes, interpreted: no figures." * (device.type == "cpu")


def watch(seconds: float, rows: Rows, stop: Callable[[], None]) -> None:
    """End the process after `seconds`, with every row written and after `stop`: a compiler cannot be interrupted
    otherwise."""

    from gpu_rows import OUT_OF_TIME

    def end() -> None:
        with rows.lock:
            rows.fill(rows.pending(), OUT_OF_TIME, None)
            print("out of time", flush=True)
            stop()
            os._exit(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def run(bench: Bench, rows: Rows, options: argparse.Namespace) -> None:
    """Each part by itself: what one raises is told, and the others run."""
    import torch
    from gpu_parts import Session

    torch.backends.cudnn.benchmark = True  # baselines are to be as fast as cuDNN can be
    session = Session(bench, rows)
    grace = _GRACE if bench.device.type == "cuda" else 10 * _GRACE  # no figure comes of an interpreter, however slow
    watch(max(0.0, bench.left) + grace, rows, session.stop)
    parts = [part for part in PARTS if part in (options.parts or PARTS)]
    session.prepare(parts)
    try:
        for number, part in enumerate(parts, start=1):
            if part != "equality":
                session.settle()
            begun = time.monotonic()
            session.run(part)
            print(f"     part {part}: {time.monotonic() - begun:.0f} s, {bench.left:.0f} s left", flush=True)
            if not session.sound() and parts[number:]:
                session.stop()
                again(parts[number:], bench.left, options)
    finally:
        session.stop()


def again(parts: Sequence[str], seconds: float, options: argparse.Namespace) -> None:
    """Go on in a new process: after an illegal access, a process can do nothing on the GPU any more."""
    print(f"     the GPU gives errors only: {' '.join(parts)} in a new process", flush=True)
    command = [sys.executable, __file__, "--out", str(options.out), "--budget", f"{seconds:.0f}", "--parts", *parts]
    os.execv(sys.executable, [*command, *["--missing"] * options.missing])


if __name__ == "__main__":
    main()
