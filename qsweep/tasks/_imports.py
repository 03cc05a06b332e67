"""Modules beside a file that it imports: what they hold decides its results as the file itself does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported(file: Path) -> list[Path]:
    """The files in the folder of `file` that it imports, and that these import, sorted; not what is imported by a name
    that is computed. One that does not parse imports nothing: whoever runs it says so."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        new = {path for path in _named(waiting.pop(), file.parent) if path != file} - found
        found |= new
        waiting += new
    return sorted(found)


def _named(file: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = file.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _files(root, name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = [*above, *(node.module.split(".") if node.module else ())]
            for name in node.names:
                yield from _files(root, [*module, name.name])


def _files(root: Path, parts: list[str]) -> Iterator[Path]:
    """What Python reads to import `parts`, as far as it is there."""
    for length in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:length])
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                yield path
