"""`kill -9` at any moment loses no finished trial, repeats none, and leaves nothing RUNNING."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_sweep import calls, small_spec, start, states, stop, told, until

from qsweep import alone
from qsweep.errors import SweepError
from qsweep.executors.local import LOCK, holder
from qsweep.executors.orphans import DRIVER_LOCK, SECONDS, resume
from qsweep.study import SweepFolder, run


@pytest.fixture(autouse=True)
def _none_goes_on(tmp_path: Path) -> Iterator[None]:
    """A job that a failed test holds would keep the machine from all tests after it."""
    yield
    stop(tmp_path)


def check_all_done_once(root: Path) -> None:
    records = SweepFolder(root, "small").records()
    assert [record.number for record in records] == list(range(9))
    assert {record.state for record in records} == {"complete"}
    assert len({record.uid for record in records}) == 9
    assert states(root) == {"COMPLETE": 6}
    assert processes_of(root) == []


def processes_of(root: Path) -> list[int]:
    """Live workers of sweeps under `root`, found by the locks they hold."""
    folders = [root / "sweeps/small/prepare", *root.glob("sweeps/small/trials/*")]
    return [found[0] for folder in folders if (found := holder(folder))]


def state(pid: int) -> str:
    """The kernel's letter for what a process does; `T`: it is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return ""


def paused(root: Path) -> list[int]:
    return [pid for pid in processes_of(root) if state(pid) == "T"]


def pause(root: Path, **measure: str) -> subprocess.Popen[bytes]:
    """A driver that has just paused a worker in its build, because another one measures; `measure`: what that is told.

    Both have locked their folders before one of them goes on: else it might be paused before it could.
    """
    told(root, build="held", build_0000="")
    driver = start(root)
    folders = [root / "sweeps/small/trials" / number for number in ("0001", "0002")]
    until(lambda: all(folder.exists() and holder(folder) for folder in folders))
    told(root, build="tick", build_0001="tick 300", **measure)
    until(lambda: paused(root))
    return driver


def test_a_worker_that_is_killed_costs_its_trial_one_attempt(tmp_path: Path) -> None:
    told(tmp_path, build_0004="hang")
    driver = start(tmp_path)
    folder = tmp_path / "sweeps/small/trials/0004"
    until(lambda: folder.exists() and holder(folder))
    until((folder / "progress.txt").exists)
    told(tmp_path)
    os.kill(holder(folder)[0], signal.SIGKILL)  # type: ignore[index]
    assert driver.wait(timeout=60) == 0
    check_all_done_once(tmp_path)
    assert SweepFolder(tmp_path, "small").records()[4].attempts == 2
    assert calls(tmp_path)["build 0004"] == 2


@pytest.mark.parametrize("moment", ["build", "measure"])
def test_a_driver_that_is_killed_is_replaced_by_the_same_command(tmp_path: Path, moment: str) -> None:
    told(tmp_path, **{f"{moment}_0004": "held"})
    driver = start(tmp_path)
    folder = tmp_path / "sweeps/small/trials/0004"
    until(lambda: folder.exists() and (holder(folder) or ("", ""))[1] == moment)
    driver.kill()
    driver.wait()
    told(tmp_path)
    finished = {record.number: record for record in SweepFolder(tmp_path, "small").records()}
    assert 0 < len(finished) < 9
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)
    after = SweepFolder(tmp_path, "small").records()
    assert {number: after[number].metrics.accuracy for number in finished} == {
        number: record.metrics.accuracy for number, record in finished.items()
    }
    assert set(calls(tmp_path).values()) == {1}  # finished ones were salvaged, live workers adopted


def test_another_space_is_searched_once_the_workers_of_the_one_before_are_done(tmp_path: Path) -> None:
    told(tmp_path, build_0004="held")
    driver = start(tmp_path)
    folder = tmp_path / "sweeps/small/trials/0004"
    until(lambda: folder.exists() and holder(folder))
    driver.kill()
    driver.wait()
    finished = {record.number for record in SweepFolder(tmp_path, "small").records()}
    wider = small_spec({"method": "ptq", "weight_bits": {"choice": [2, 3, 4, 6]}}, search={"trials": 9})
    with pytest.raises(SweepError, match=r"workers of the spec before must be done .* \(.*#4.*\)"):
        list(run(wider, tmp_path, jobs="arithmetic_jobs", preload=("numpy",)))
    told(tmp_path)
    until(lambda: not processes_of(tmp_path))
    records = {r.number: r for r in run(wider, tmp_path, jobs="arithmetic_jobs", preload=("numpy",))}
    assert 4 not in finished
    assert calls(tmp_path)["build 0004"] == 2  # what was built of another config is not taken for it
    assert finished < records.keys()
    trials = [record for record in records.values() if record.kind == "trial" and record.duplicate_of is None]
    assert {3} < {record.config["compress"]["quantize"]["weight_bits"] for record in trials}
    assert len({record.uid for record in trials}) == len(trials)


def test_workers_left_paused_by_a_killed_driver_go_on(tmp_path: Path) -> None:
    driver = pause(tmp_path, measure="slow")
    driver.kill()
    driver.wait()
    told(tmp_path)
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)


@pytest.mark.parametrize("killed", ["driver", "driver and who measures", "driver, and who measures hangs"])
def test_nothing_stays_paused_after_a_driver_that_was_killed_in_a_measurement(tmp_path: Path, killed: str) -> None:
    """Without a next driver: who measures is alone to its end or its time limit, then who was paused ends its job."""
    driver = pause(tmp_path, measure="held")
    before = processes_of(tmp_path)
    (stopped,) = paused(tmp_path)
    driver.kill()
    driver.wait()
    time.sleep(2 * SECONDS)  # the fork server looks meanwhile
    assert processes_of(tmp_path) == before
    for pid in set(before) - {stopped} if killed == "driver and who measures" else ():
        os.kill(pid, signal.SIGKILL)
    if killed == "driver, and who measures hangs":
        (granted,) = tmp_path.glob("sweeps/small/trials/0002/alone.granted")
        os.utime(granted, (0, 0))
    else:
        told(tmp_path, build="tick")
    until(lambda: not processes_of(tmp_path))
    if killed == "driver, and who measures hangs":
        log = (tmp_path / "sweeps/small/server.log").read_text()
        assert re.search(r"^`trials/0002` measured for more than 21600 s without a driver: it was ended$", log, re.M)
    folders = {folder.name: folder for folder in tmp_path.glob("sweeps/small/trials/*")}
    assert all((folder / "build.json").exists() for folder in folders.values())
    if killed == "driver":
        (seconds,) = [
            json.loads(path.read_text())["seconds"]
            for f in folders.values()
            if not (f / "record.json").exists()
            for path in f.glob("measure.json")
        ]
        files = list(tmp_path.glob("sweeps/small/trials/*/ticks.txt"))
        ticks = [float(tick) for file in files for tick in file.read_text().split()]
        assert len(files) == 2
        assert not [tick for tick in ticks if seconds["began"] + 0.2 < tick < seconds["ended"]]
    told(tmp_path)
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)
    assert {count for call, count in calls(tmp_path).items() if call.startswith("build")} == {1}


def test_who_is_paused_by_a_new_driver_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(worker.pid, "build", file=lock, flush=True)
        os.kill(worker.pid, signal.SIGSTOP)
        until(lambda: state(worker.pid) == "T")
        with (tmp_path / DRIVER_LOCK).open("w") as driver:
            fcntl.flock(driver, fcntl.LOCK_EX)
            resume(tmp_path, limit=60)
            assert state(worker.pid) == "T"
        alone.grant(tmp_path)
        resume(tmp_path, limit=60)
        assert state(worker.pid) == "T"
        alone.forget(tmp_path)
        resume(tmp_path, limit=60)
        until(lambda: state(worker.pid) != "T")
    worker.kill()
    worker.wait()


@pytest.mark.parametrize("moment", ["asked", "recorded"])
def test_a_trial_between_two_steps_of_the_driver_is_taken_up(tmp_path: Path, moment: str) -> None:
    """The driver dies right after Optuna gave a number, or after the record is on disk and before it is told."""
    from qsweep.study.search import Search

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    records = run(small_spec(), tmp_path, jobs="arithmetic_jobs", preload=("numpy",))
    while next(records).number < 3:
        pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "candidate" if moment == "asked" else "tell", die)
        with pytest.raises(KeyboardInterrupt):
            next(records)
    assert states(tmp_path)["RUNNING"] == 1
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)
    assert set(calls(tmp_path).values()) == {1}


def test_who_was_paused_before_it_could_lock_its_folder_goes_on(tmp_path: Path) -> None:
    worker = subprocess.Popen(["sleep", "600"], start_new_session=True)
    os.kill(worker.pid, signal.SIGSTOP)
    until(lambda: state(worker.pid) == "T")
    resume(tmp_path, limit=60)
    until(lambda: state(worker.pid) != "T")
    worker.kill()
    worker.wait()
