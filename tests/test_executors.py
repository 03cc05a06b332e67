from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import small_sweep
import worker_jobs

from qsweep.executors.local import Local, Worker, holder

JOBS = "worker_jobs"
until = partial(small_sweep.until, seconds=30)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    executor = Local((), tmp_path / "server.log")
    yield executor
    executor.shutdown()


def ended(local: Local, worker: Worker) -> str:
    until(lambda: local.wait(0.1) or worker.poll())
    return str(worker.poll())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_leaves_its_result_is_done(local: Local, tmp_path: Path) -> None:
    assert ended(local, local.start(tmp_path, f"{JOBS}:good", "good")) == "done"
    assert holder(tmp_path) is None
    assert "said to stdout" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_workers_may_ask_cuda_though_their_server_must_not(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    executor = Local((), tmp_path / "server.log")
    try:
        assert ended(executor, executor.start(tmp_path, f"{JOBS}:environment", "environment")) == "done"
    finally:
        executor.shutdown()
    assert json.loads((tmp_path / "environment.json").read_text()).get(name) == given


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("raises", "ended with exit code 1; its log ends with: RuntimeError: as told"),
        ("dies", "was killed by SIGKILL"),
        ("forgets", "ended with exit code 0"),
    ],
)
def test_a_job_without_a_result_has_crashed_and_says_how(local: Local, tmp_path: Path, job: str, words: str) -> None:
    worker = local.start(tmp_path, f"{JOBS}:{job}", job)
    assert ended(local, worker) == "crashed"
    assert worker.last_words().startswith(words)


def test_a_worker_is_a_session_of_its_own_and_its_children_die_with_it(local: Local, tmp_path: Path) -> None:
    worker = local.start(tmp_path, f"{JOBS}:parent", "parent")
    until((tmp_path / "child.pid").exists)
    child = int((tmp_path / "child.pid").read_text())
    assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
    worker.kill()
    assert worker.poll() == "crashed"
    until(lambda: not alive(child))


def test_children_of_a_worker_that_was_killed_by_others_die_too(local: Local, tmp_path: Path) -> None:
    worker = local.start(tmp_path, f"{JOBS}:parent", "parent")
    until((tmp_path / "child.pid").exists)
    os.kill(worker.pid, 9)
    assert ended(local, worker) == "crashed"
    until(lambda: not alive(int((tmp_path / "child.pid").read_text())))


def test_a_paused_worker_stands_still_until_it_is_resumed(local: Local, tmp_path: Path) -> None:
    worker = local.start(tmp_path, f"{JOBS}:counts", "counts")
    until((tmp_path / "count").exists)
    worker.pause()
    until(lambda: "T" in Path(f"/proc/{worker.pid}/stat").read_text().split(")")[1].split()[0])
    before = (tmp_path / "count").stat().st_size
    time.sleep(0.1)
    assert (tmp_path / "count").stat().st_size == before
    assert worker.poll() is None
    worker.resume()
    until(lambda: (tmp_path / "count").stat().st_size > before)


def test_a_paused_worker_can_be_killed(local: Local, tmp_path: Path) -> None:
    worker = local.start(tmp_path, f"{JOBS}:counts", "counts")
    worker.pause()
    worker.kill()
    assert worker.poll() == "crashed"


def test_a_worker_outlives_its_driver_and_is_adopted(local: Local, tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from qsweep.executors.local import Local, holder;"
        f"folder = Path({str(tmp_path)!r}); Local((), folder / 'log').start(folder, '{JOBS}:waits', 'waits')\n"
        "while not holder(folder): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)"
    )
    tests = str(Path(worker_jobs.__file__).parent)
    path = os.pathsep.join((tests, *sys.path))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=False)
    worker = local.adopt(tmp_path)
    assert worker is not None
    assert worker.name == "waits"
    assert worker.poll() is None
    (tmp_path / "go").touch()
    assert ended(local, worker) == "done"
    assert local.adopt(tmp_path) is None


def test_two_workers_are_never_in_one_folder(local: Local, tmp_path: Path) -> None:
    first = local.start(tmp_path, f"{JOBS}:waits", "waits")
    until(lambda: holder(tmp_path))
    second = local.start(tmp_path, f"{JOBS}:waits", "waits")
    assert holder(tmp_path) == (first.pid, "waits")
    (tmp_path / "go").touch()
    assert [ended(local, first), ended(local, second)] == ["done", "done"]
    assert (tmp_path / "runs").read_text() == "1"


def test_shutdown_leaves_no_process(tmp_path: Path) -> None:
    local = Local((), tmp_path / "server.log")
    worker = local.start(tmp_path, f"{JOBS}:parent", "parent")
    until((tmp_path / "child.pid").exists)
    child = int((tmp_path / "child.pid").read_text())
    server = int(Path(f"/proc/{worker.pid}/stat").read_text().split(")")[1].split()[1])
    local.shutdown()
    until(lambda: not any(alive(pid) for pid in (worker.pid, child, server)))


def ran(text: str, folder: Path, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[bytes], str]:
    """`text` run as a script that drives jobs of these tests, and the path of modules that it was given; ends with all
    that it has started."""
    path = os.pathsep.join((str(Path(worker_jobs.__file__).parent), str(folder), *sys.path))
    script = folder / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, cwd=cwd, check=False), path


def test_workers_import_neither_the_main_script_nor_its_noise(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from qsweep.executors.local import Local\n"
        f"folder = Path({str(tmp_path)!r}); open(folder / 'imports', 'a').write('x')\n"
        f"local = Local(('noisy_module',), folder / 'server.log'); w = local.start(folder, '{JOBS}:good', 'good')\n"
        "while w.poll() is None: time.sleep(0.01)\n"
        "print(w.poll()); local.shutdown()"
    )
    noisy = "import os; os.write(1, b'noise\\n'); os.write(2, b'noise\\n'); os.write(2, repr(os.environ).encode())"
    (tmp_path / "noisy_module.py").write_text(noisy)
    (tmp_path / "astray").mkdir()
    (tmp_path / "astray/worker_jobs.py").write_text("raise ImportError('of the working directory')")
    done, path = ran(script, tmp_path, cwd=tmp_path / "astray")
    assert (done.stdout, done.stderr) == (b"done\n", b"")
    assert (tmp_path / "imports").read_text() == "x"
    log = (tmp_path / "server.log").read_text()
    assert log.count("noise\n") == 2
    assert f"'PYTHONPATH': {path!r}" in log
    assert "PYTHONSAFEPATH" not in log


def test_a_worker_that_is_killed_with_a_semaphore_is_no_news_for_the_terminal(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path; from qsweep.executors.local import Local\n"
        f"folder = Path({str(tmp_path)!r}); local = Local((), folder / 'server.log')\n"
        f"worker = local.start(folder, '{JOBS}:holds', 'holds')\n"
        "while not (folder / 'held').exists(): time.sleep(0.01)\n"
        "local.shutdown()"
    )
    done, _ = ran(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")  # stderr is closed once the tracker, which holds it, has ended
