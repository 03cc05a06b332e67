"""What has been measured of one network at one batch size, and its row."""

from __future__ import annotations

from dataclasses import dataclass, field

import gpu_asked as asked
from gpu_rows import Rows


@dataclass
class Case:
    """One network at one batch size: milliseconds by what ran it."""

    name: str
    batch: int
    int8: float | None = None
    wrong: bool = False
    """Whether the output differs from the reference's."""
    times: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def best(self) -> str | None:
        return min(self.times, key=self.times.__getitem__, default=None)

    @property
    def ratio(self) -> float | None:
        return self.times[self.best] / self.int8 if self.int8 and self.best else None

    def text(self) -> str:
        assert self.int8 is not None
        parts = [f"int8 {self.int8:.3f} ms"]
        if self.best is not None:
            parts = [f"{self.ratio:.2f}x {self.best}: {parts[0]}"]
        parts += [", ".join(f"{label} {ms:.3f}" for label, ms in self.times.items())]
        parts += [f"{label} {why}" for label, why in self.failed.items()]
        parts += ["WRONG"] if self.wrong else []
        parts += [f"not tried (out of time): {', '.join(self.skipped)}"] if self.skipped else []
        return "; ".join(part for part in parts if part)

    def write(self, rows: Rows) -> None:
        met = self.ratio is not None and self.ratio >= 1.4 if (self.name, self.batch) == asked.MAIN else True
        rows.add(asked.network(self.name, self.batch), self.text(), met and not self.wrong)
