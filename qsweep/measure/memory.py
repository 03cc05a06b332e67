"""Peak memory of this process, from the kernel's own count."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Counts from its creation: `bytes()` is the peak of resident memory above the level at the start.

    None where the system does not tell (it is Linux's).
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self._start = _read("VmRSS")

    def bytes(self) -> float | None:
        peak = _read("VmHWM")
        return None if peak is None or self._start is None else max(0.0, peak - self._start)


def _read(field: str) -> float | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return float(line.split()[1]) * 1024
    return None
