"""The folder of one sweep: its paths, its lock, its spec, its records. The layout is in docs/architecture.md."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from qsweep import alone
from qsweep.config import content_hash
from qsweep.errors import DiskFull, SweepError
from qsweep.executors.local import holder
from qsweep.executors.orphans import DRIVER_LOCK
from qsweep.machine import cores
from qsweep.records import Record
from qsweep.spec import Spec, TrialConfig
from qsweep.study.baselines import numbered, with_new
from qsweep.study.specs import as_now, differences, refused, searched_anew
from qsweep.tasks._seen import Seen, alike


@dataclass(frozen=True)
class Live:
    """A worker at work now."""

    number: int | None
    """None: what is done before all trials."""
    job: str
    progress: str


class SweepFolder:
    """`root/sweeps/<name>/`, where `root` is the folder of the spec."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root.resolve()
        self.path = self.root / "sweeps" / name
        self.store = self.root / "sweeps" / "store"

    @classmethod
    def at(cls, path: Path) -> SweepFolder:
        """The sweep in the folder `path`. `root` is where it is named to be: `sweeps` may be a link, or be renamed."""
        named = Path(os.path.abspath(path))
        if named.parent.name != "sweeps":  # a link to it
            named = named.resolve()
        found = cls(named.parent.parent, named.name)
        found.path, found.store = named, named.parent / "store"
        return found

    def trial(self, number: int) -> Path:
        return self.path / "trials" / f"{number:04d}"

    def repetition(self, number: int, round: int) -> Path:
        return self.path / "repeats" / f"{number:04d}-{round}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one driver. Raises SweepError, with its process id, if there is another."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / DRIVER_LOCK).open("a+") as file:
            if not _locked(file):
                file.seek(0)
                holds = file.read().strip()
                raise SweepError(f"`{self.path}`: must have one driver at a time (process {holds} drives it)")
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def claim(self, spec: Spec, fingerprint: str, baselines: list[TrialConfig]) -> dict[int, TrialConfig]:
        """Make the folder that of `spec`, or check that it is; return its baselines by number: those it began with, and
        after all that was run by then those that another spec has added.

        Raises SweepError with the difference where the spec, or the content of model and data, is another, and
        something of the sweep is there already.
        """
        path = self.path / "spec.json"
        new = json.loads(spec.model_dump_json())
        own = {"threads": max(1, cores() // spec.run.workers)}
        known = dict(enumerate(baselines))
        if path.exists():
            kept = _read(path, json.loads)
            before = as_now(kept["spec"])
            complaint = self._changes(before, new) or self._changed(kept["fingerprint"] == fingerprint)
            if complaint and (self.records() or self.live()):
                raise SweepError(complaint)
            if complaint:  # nothing was finished: what was wrong has been mended
                self._clear()
            else:
                own |= {name: kept[name] for name in ("threads", "model", "samples") if name in kept}
                known = numbered(kept["baselines"])
                if searched_anew(before, new):
                    self._search_anew()
                    known = with_new(baselines, known, {record.number for record in self.records()})
        plain = {number: config.model_dump(mode="json") for number, config in known.items()}
        content = {"hash": content_hash(new), "spec": new, "fingerprint": fingerprint, "baselines": plain}
        write_atomically(path, json.dumps(content | own, indent=1), durable=True)
        return known

    def keep_model(self, key: str, samples: dict[str, Seen]) -> None:
        """Note the identity of the uncompressed model and what is seen of the user's samples. Raises SweepError where
        trials of others are finished or at work; what those of others have left that are neither goes."""
        path = self.path / "spec.json"
        content = _read(path, json.loads)
        before = content.get("samples", samples)
        same = all(alike(before[split], samples[split]) for split in before.keys() & samples.keys())
        if complaint := self._changed(same and content.get("model", key) == key):
            if self.records() or any(live.number is not None for live in self.live()):
                raise SweepError(complaint)
            shutil.rmtree(self.path / "trials", ignore_errors=True)
        write_atomically(path, json.dumps(content | {"model": key, "samples": samples}, indent=1), durable=True)

    def threads(self) -> int:
        """Threads of a job, the same for all of the sweep however many workers it is given later: the last bits of a
        training depend on them."""
        return int(json.loads((self.path / "spec.json").read_text())["threads"])

    def _changed(self, same: bool) -> str | None:
        if same:
            return None
        return (
            f"`{self.path}`: model and data of `task` must be those the sweep began with (a file, the code or "
            "the weights have changed since); give the spec another `name`, or move the folder away"
        )

    def _changes(self, old: dict[str, Any], new: dict[str, Any]) -> str | None:
        changed = refused(old, new)
        if not changed:
            return None
        return (
            f"`{self.path}`: holds a sweep of the same name and another spec: {'; '.join(changed)}. "
            "Give the spec another `name`, or move the folder away"
        )

    def _search_anew(self) -> None:
        """Leave the records and what the store has: something else is searched from here on. Raises SweepError where
        workers are still at trials of before."""
        if live := self.live():
            doing = ", ".join(f"#{each.number}" if each.number is not None else each.job for each in live)
            raise SweepError(
                f"`{self.path}`: workers of the spec before must be done for another to be searched ({doing}); "
                "wait for them, or run the spec as it was"
            )
        for folder in self.path.glob("trials/*"):
            if not (folder / "record.json").exists():  # another config may be given its number
                shutil.rmtree(folder)
        for path in self.path.glob("optuna.db*"):
            path.unlink()

    def _clear(self) -> None:
        """Begin anew: all but the lock goes."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != DRIVER_LOCK:
                path.unlink()

    def spec(self) -> Spec:
        """The spec that the sweep was last run with. Raises SweepError where there is none."""
        try:
            return _read(self.path / "spec.json", lambda text: Spec.model_validate(json.loads(text)["spec"]))
        except FileNotFoundError:
            raise SweepError(f"`{self.path}`: there is no sweep here; `qsweep run` makes it") from None

    def is_of(self, spec: Spec) -> bool:
        """Whether the sweep was last run with `spec`."""
        old, new = (json.loads(each.model_dump_json()) for each in (self.spec(), spec))
        return not any(differences(old, new))

    def records(self) -> list[Record]:
        """All records, by number."""
        paths = sorted(self.path.glob("trials/*/record.json"))
        return sorted((_read(path, Record.model_validate_json) for path in paths), key=lambda r: r.number)

    def write(self, record: Record) -> None:
        """Keep a record: on disk, complete, when this returns."""
        folder = self.trial(record.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "record.json", record.model_dump_json(indent=1), durable=True)

    def live(self) -> list[Live]:
        """What the sweep's workers are doing now; from any process."""
        found = []
        for folder in self._folders():
            if (who := holder(folder)) is not None:
                progress = folder / "progress.txt"
                text = progress.read_text(errors="replace").strip() if progress.exists() else ""
                number, _, round = folder.name.partition("-")
                job = f"{who[1]} again" if round else who[1]
                found.append(Live(int(number) if number.isdigit() else None, job, text))
        return found

    def waits(self) -> str | None:
        """The job of another sweep on this host that it is paused for; from any process."""
        job = alone.elsewhere()
        own = job is not None and any(alone.granted(folder) and holder(folder) for folder in self._folders())
        return None if own else job

    def _folders(self) -> list[Path]:
        """Those of its jobs."""
        return sorted([self.path / "prepare", *self.path.glob("trials/*"), *self.path.glob("repeats/*")])


Read = TypeVar("Read")


def _read(path: Path, read: Callable[[str], Read]) -> Read:
    try:
        return read(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SweepError(
            f"`{path}`: cannot be read ({reason}); remove it, or the folder it lies in, to have its trial done again"
        ) from None


def _locked(file: IO[str]) -> bool:
    """Take the lock, which the kernel frees however its driver dies. Who only asks whether there is a driver holds it
    for an instant: that is waited for."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Replace `path` by `text`: whoever reads it finds the old text or the new, never half. `durable`: after a power
    cut too, and it is the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        _sync(path.parent)


def sqlite_url(path: Path) -> str:
    """The URL of a database, whatever characters its path has."""
    escaped = re.sub(r"[%?{}]", lambda found: f"%{ord(found[0]):02X}", str(path))  # Optuna fills in what is in braces
    # MLflow makes the folder that stands in a URL, escapes as they are; where the driver is named, it does not.
    return f"sqlite:///{path}" if escaped == str(path) else f"sqlite+pysqlite:///{escaped}"


def read_result(path: Path) -> dict[str, Any]:
    """What a job has left, nothing where it has not. A file that is damaged goes: its job is to run again."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    path.unlink()
    return {}


def _sync(path: Path) -> None:
    """Make the names in a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _no_room(path: Path) -> bool:
    return shutil.disk_usage(path).free < 1 << 20


@contextmanager
def disk_full_is_said(path: Path) -> Iterator[None]:
    """Turn the many ways of meeting a full disk, sqlite's too, into DiskFull."""
    try:
        yield
    except Exception as error:
        chain: BaseException | None = error
        while chain is not None:
            full = isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or "database or disk is full" in str(chain) or ("disk I/O error" in str(chain) and _no_room(path)):
                raise DiskFull(
                    f"`{path}`: no space left on its disk. All finished trials are kept; make room and run the "
                    "same command again"
                ) from error
            chain = chain.__cause__
        raise
