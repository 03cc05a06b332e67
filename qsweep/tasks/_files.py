"""Files that a task names: where they are, what is in them, and the store of what was made of them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from qsweep.errors import DataError
from qsweep.store import Store


def locate(path: str, root: Path) -> Path:
    """The absolute path that a spec's `path` means. Raises DataError when it names an unset variable or no file.

    It may hold `~` and `$VARIABLES`. A relative path starts at `root`, the folder of the spec; one that begins with
    a variable, which a person set in a shell, starts at the working directory.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$(\w+|\{[^}]*\})", expanded)
    if unset:
        raise DataError(f"`{path}`: the environment variable `{unset[1].strip('{}')}` must be set (it is not)")
    found = ((Path.cwd() if path.startswith("$") else root) / expanded).resolve()
    if not found.is_file():
        raise DataError(f"`{path}`: there is no file `{found}`")
    return found


def store_of(root: Path) -> Store:
    """The store beside the spec, which all its sweeps share."""
    return Store(root / "sweeps" / "store")


def file_hash(path: Path, store: Store) -> str:
    """SHA-256 of a file's content, read once for each state of the file. Archives and `touch` set the time at which the
    content was changed, but neither which file it is nor when that was changed."""
    status = path.stat()

    def fill(folder: Path) -> None:
        with path.open("rb") as file:
            (folder / "sha256").write_text(hashlib.file_digest(file, "sha256").hexdigest())

    key = Store.key("file", str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return (store.folder(key, fill) / "sha256").read_text()
