"""`kill -9` at any moment loses no finished trial, repeats none, and leaves nothing RUNNING."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_sweep
from small_sweep import calls, small_spec, states, told

from qsweep.executors.local import holder
from qsweep.study import SweepFolder, run

DRIVER = """
import sys
from pathlib import Path
from small_sweep import small_spec
from qsweep.study import run
for record in run(small_spec(run={"workers": 2}), Path(sys.argv[1]), jobs="arithmetic_jobs", preload=("numpy",)):
    print(record.number, flush=True)
"""


def start(root: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join((str(Path(small_sweep.__file__).parent), *sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", DRIVER, str(root)], env=environment, start_new_session=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


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
    told(tmp_path, **{f"{moment}_0004": "slow"})
    driver = start(tmp_path)
    folder = tmp_path / "sweeps/small/trials/0004"
    until(lambda: folder.exists() and (holder(folder) or ("", ""))[1] == moment)
    driver.kill()
    driver.wait()
    finished = {record.number: record for record in SweepFolder(tmp_path, "small").records()}
    assert 0 < len(finished) < 9
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)
    after = SweepFolder(tmp_path, "small").records()
    assert {number: after[number].metrics.accuracy for number in finished} == {
        number: record.metrics.accuracy for number, record in finished.items()
    }
    assert set(calls(tmp_path).values()) == {1}  # finished ones were salvaged, live workers adopted


def test_workers_left_paused_by_a_killed_driver_go_on(tmp_path: Path) -> None:
    told(tmp_path, build="tick", measure="slow")
    driver = start(tmp_path)

    def one_paused() -> bool:
        stats = [Path(f"/proc/{pid}/stat") for pid in processes_of(tmp_path)]
        return any(path.exists() and path.read_text().split(")")[1].split()[0] == "T" for path in stats)

    until(one_paused)
    driver.kill()
    driver.wait()
    told(tmp_path)
    assert start(tmp_path).wait(timeout=60) == 0
    check_all_done_once(tmp_path)


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
