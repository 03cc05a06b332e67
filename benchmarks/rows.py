"""Rows of a benchmark: what was asked, what was measured, whether it was met; as JSON and as a table beside it."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

from qsweep.machine import fingerprint

HERE = Path(__file__).parent


def record(name: str, rows: list[tuple[str, str, str, bool]]) -> None:
    """Print rows (what, asked, measured, met) and put them into `<name>.json`, in the place of those of their names."""
    path = HERE / f"{name}.json"
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    by_name = {row["row"]: row for row in known}
    for row, asked, measured, met in rows:
        by_name[row] = {"row": row, "asked": asked, "measured": measured, "met": met}
        print(f"{'ok  ' if met else 'MISS'} {row}: {measured} (asked: {asked})", flush=True)
    path.write_text(json.dumps(list(by_name.values()), indent=1) + "\n")


def table(name: str, heading: str) -> None:
    """Write `<name>.md` from `<name>.json`; what follows its line `## Notes` is kept."""
    path = HERE / f"{name}.md"
    notes = path.read_text().partition("\n## Notes\n")[2] if path.exists() else "\n"
    lines = [heading.strip(), "", f"{date.today()}, {fingerprint()}, Python {platform.python_version()}.", ""]
    lines += ["| row | asked | measured | met |", "|---|---|---|---|"]
    for row in json.loads((HERE / f"{name}.json").read_text()):
        lines.append(f"| {row['row']} | {row['asked']} | {row['measured']} | {'yes' if row['met'] else '**no**'} |")
    path.write_text("\n".join(lines) + "\n\n## Notes\n" + notes)
