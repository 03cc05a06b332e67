"""Rows of the GPU benchmark: all of them from the start as not measured, written again after each that is."""

from __future__ import annotations

import json
import os
import re
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from gpu_clock import OutOfTime, reason

NOT_MEASURED = "not measured"
OUT_OF_TIME = "not measured (out of time)"
_FAILED, _WRONG = "failed:", "WRONG"


@dataclass(frozen=True)
class Row:
    row: str
    asked: str
    measured: str = NOT_MEASURED
    met: bool | None = None
    """None: not measured."""


class Rows:
    """Kept in the order of the tables, whatever the order of measuring; on disk as `gpu.json` and `gpu.md`."""

    def __init__(
        self,
        rows: Iterable[Row],
        folder: Path,
        heading: str,
        about: str,
        known: Earlier | None = None,
        *,
        settle: bool = False,
    ) -> None:
        """`known`: what has been measured before and stays until it is measured again, or, with `settle`, for good."""
        self.rows = {row.row: row for row in rows}
        self.folder, self.heading, self.about = folder, heading, about
        self.marks: dict[str, str] = {}
        """What stands behind figures of other machines, and what they are."""
        self._settled: set[str] = set()
        self.lock = threading.RLock()
        """The watch ends the process between two writes, not within one."""
        if known is not None:
            self._keep(known, settle=settle)
        self.write()

    def _keep(self, known: Earlier, *, settle: bool) -> None:
        """Take over what has been measured before, where it was asked for in the same words; marked where it was on
        another machine. `settle`: it is not to be measured again."""
        self.marks = dict(known.marks)
        mark = ""
        if _machine(known.about) != _machine(self.about):
            mark = next((sign for sign in _SIGNS if sign not in self.marks), _SIGNS[-1])
            self.marks[mark] = known.about
        for row in known.rows:
            if row.row in self.rows and self.rows[row.row].asked == row.asked:
                marked = row.measured.endswith(tuple(known.marks))
                self.rows[row.row] = row if marked else replace(row, measured=row.measured + mark)
                if settle and not row.measured.startswith(_FAILED):
                    self._settled.add(row.row)

    def settled(self, *names: str) -> bool:
        """Whether none of `names` is to be measured."""
        return self._settled.issuperset(names)

    def add(self, name: str, measured: str, met: bool | None) -> None:
        with self.lock:
            self.rows[name] = Row(name, self.rows[name].asked, measured, met)
            print(f"{MARKS[met]} {name}: {measured} (asked: {self.rows[name].asked})", flush=True)
            self.write()

    def ratio(self, name: str) -> float | None:
        """The best baseline's time over int8's, as the row tells it."""
        row = self.rows[name]
        sound = row.met is not None and _WRONG not in row.measured
        found = re.search(r"(\d+\.\d+)x ", row.measured) if sound else None
        return max(float(found[1]), 0.005) if found else None  # 0.00 may be all that a row has room for

    def ratios(self, names: Iterable[str]) -> dict[str, float]:
        """Of those that were measured."""
        return {name: ratio for name in names if (ratio := self.ratio(name)) is not None}

    def signs(self, names: Iterable[str]) -> str:
        """Those of the machines, other than this one, that any of `names` was measured on."""
        return "".join(sign for sign in self.marks if any(sign in self.rows[name].measured for name in names))

    def pending(self) -> list[str]:
        return [name for name, row in self.rows.items() if row.measured == NOT_MEASURED]

    @contextmanager
    def guard(self, names: str | list[str]) -> Iterator[None]:
        """Rows `names` come of this block: what it raises becomes the text of those that it has left unmeasured."""
        names = [names] if isinstance(names, str) else names
        try:
            yield
        except OutOfTime:
            self.fill(names, OUT_OF_TIME, None)
        except Exception as error:  # one part that fails must not take the others along
            traceback.print_exc()
            self.fill(names, f"{_FAILED} {reason(error)}", False)

    def fill(self, names: Iterable[str], measured: str, met: bool | None) -> None:
        """Those of `names` that have not been measured."""
        pending = set(self.pending())
        for name in names:
            if name in pending:
                self.add(name, measured, met)

    def write(self) -> None:
        content = [asdict(row) for row in self.rows.values()]
        path = self.folder / "gpu.md"
        notes = path.read_text().partition("\n## Notes\n")[2] if path.exists() else "\n"
        used = {
            sign: about for sign, about in self.marks.items() if any(sign in row.measured for row in self.rows.values())
        }
        marks = [f"{sign} {about}\n" for sign, about in used.items()]
        lines = [
            self.heading.strip(),
            "",
            f"{self.about}\n",
            *marks,
            "| row | asked | measured | met |",
            "|---|---|---|---|",
        ]
        for row in self.rows.values():
            lines.append(f"| {row.row} | {row.asked} | {row.measured} | {WORDS[row.met]} |")
        _replace(self.folder / "gpu.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _replace(path, "\n".join(lines) + "\n\n## Notes\n" + notes)


@dataclass(frozen=True)
class Earlier:
    """What a folder holds of earlier runs."""

    rows: list[Row]
    """Those that were measured."""
    about: str
    marks: dict[str, str]


def read(folder: Path) -> Earlier:
    path, text = folder / "gpu.json", folder / "gpu.md"
    rows = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    lines = text.read_text().splitlines() if text.exists() else []
    about = next((line for line in lines if _ABOUT.match(line)), "")
    marks = {line[0]: line[2:] for line in lines if line[:1] and line[0] in _SIGNS}
    return Earlier([row for row in rows if row.met is not None], about, marks)


def _machine(about: str) -> str:
    """Without the date."""
    return about.partition(", ")[2]


_ABOUT = re.compile(r"\d{4}-\d\d-\d\d[,:] ")
_SIGNS = "¹²³⁴⁵⁶⁷⁸⁹"


def absent(*modules: str) -> str:
    """Those of `modules` that are not installed, in words."""
    return ", ".join(module for module in modules if find_spec(module) is None)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(f"{path.suffix}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


MARKS = {True: "ok  ", False: "MISS", None: "--  "}
WORDS = {True: "yes", False: "**no**", None: "not measured"}
