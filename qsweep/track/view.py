"""The Pareto page and the report of a sweep by their URLs in MLflow, and a small server that shows them.

MLflow keeps a shared view of an experiment as plain JSON in the tag `mlflow.sharedViewState.<key>`. That is internal to
its UI (3.17): where it changes, the page opens without charts and everything else works.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from qsweep.errors import TrackError
from qsweep.spec import Spec
from qsweep.track.client import sqlite_path
from qsweep.track.ledger import Ledger

if TYPE_CHECKING:
    from mlflow import MlflowClient

DASHBOARDS = Path(__file__).parent.parent / "dashboards"
REPORT = "pareto.html"
"""The artifact of the parent run that is the report."""
_KINDS = {"metric": "metrics", "param": "params", "tag": "tags"}


def set_view(client: MlflowClient, experiment_id: str, spec: Spec) -> None:
    """Give the experiment the sweep's Pareto page."""
    definition = json.loads((DASHBOARDS / "pareto_view.json").read_text(encoding="utf-8"))
    state = json.dumps(view_state(definition, spec.name), separators=(",", ":"))
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{view_key(spec.name)}", state)


def view_key(sweep: str) -> str:
    """What the URL calls the view of a sweep."""
    return f"qsweep-{sweep}"


def view_state(definition: dict[str, Any], sweep: str) -> dict[str, Any]:
    """The state that MLflow's UI reads, of a definition in the words of `dashboards/pareto_view.json`."""
    section = _id(definition["section"])
    common = {"metricSectionId": section, "deleted": False, "isGenerated": False, "runsCountToCompare": 1000}
    order = definition["order_by"]
    columns = [f"{_KINDS[kind]}.`{name}`" for column in definition["columns"] for kind, name in column.items()]
    return {
        "searchFilter": f"tags.`qsweep.kind` != 'sweep' and tags.`qsweep.sweep` = '{sweep}'",
        "orderByKey": f"metrics.`{order['metric']}`",
        "orderByAsc": order["ascending"],
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "autoRefreshEnabled": True,
        "selectedColumns": columns,
        "compareRunSections": [
            {"uuid": section, "name": definition["section"], "display": True, "isReordered": True, "deleted": False,
             "isGenerated": False, "columns": 2, "cardHeight": 360}
        ],
        "compareRunCharts": [common | _chart(chart) for chart in definition["charts"]],
    }  # fmt: skip


def _chart(chart: dict[str, Any]) -> dict[str, Any]:
    about = {"uuid": _id(chart["title"]), "displayName": chart["title"]}
    if chart["type"] == "scatter":
        axes = {f"{axis}axis": {"key": chart[axis], "type": "METRIC"} for axis in ("x", "y")}
        return about | {"type": "SCATTER"} | axes
    return about | {
        "type": "PARALLEL",
        "selectedParams": chart["params"],
        "selectedMetrics": chart["metrics"],
        "showAllRuns": True,
    }


def _id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"qsweep/{name}"))


def pareto_url(sweep: Path, server: str | None = None) -> str | None:
    """The Pareto page of the sweep in folder `sweep`; None while MLflow has nothing of it.

    `server` is what `ui` gave, and is not needed where the sweep tracks to a server.
    """
    runs, _ = _published(sweep, server)
    view = f"compareRunsMode=CHART&viewStateShareKey={quote(view_key(sweep.name))}"
    return runs and f"{runs}?{_WORKFLOW}&{view}"


def report_url(sweep: Path, server: str | None = None) -> str | None:
    """The report of the sweep in folder `sweep`, on the page of its parent run, which has it from the end of the first
    `qsweep run` on; `server` and None as for `pareto_url`."""
    runs, parent = _published(sweep, server)
    return runs and f"{runs}/{parent}/artifacts/{REPORT}?{_WORKFLOW}"


_WORKFLOW = "workflowType=machine_learning"
"""Else the UI shows what it has for language models."""


def _published(sweep: Path, server: str | None) -> tuple[str | None, str | None]:
    """The address of the runs of the sweep's experiment, and its parent run; None while MLflow has nothing of it."""
    content = Ledger.read(sweep / "published.json")
    uri = content.get("uri", "")
    base, known = server or uri, content.get("stores", {}).get(uri, {})
    if "experiment_id" not in known or not base.startswith("http"):
        return None, None
    return f"{base.rstrip('/')}/#/experiments/{known['experiment_id']}/runs", known["parent"]


@contextmanager
def ui(uri: str, port: int = 5000) -> Iterator[str]:
    """Serve MLflow's UI of `uri` (absolute) on loopback while the context lasts; gives its address.

    Nothing is started where `uri` is a server already. Port 0 takes a free one. Raises TrackError where the port is
    taken or the server does not start.
    """
    if uri.startswith("http"):
        yield uri
        return
    port = _free(port)
    with tempfile.TemporaryFile() as log:
        server = _start(uri, port, log.fileno())
        try:
            address = f"http://127.0.0.1:{port}"
            _await(server, address, log.fileno())
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _start(uri: str, port: int, log: int) -> subprocess.Popen[bytes]:
    """By default MLflow starts 15 processes of 2.3 GB together; this is two."""
    database = sqlite_path(uri)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    where = database.parent if database else None
    return subprocess.Popen(command, env=os.environ | quiet, cwd=where, stdout=log, stderr=log, start_new_session=True)


def _await(server: subprocess.Popen[bytes], address: str, log: int) -> None:
    for _ in range(600):
        if server.poll() is not None:
            size = os.fstat(log).st_size
            tail = os.pread(log, 2000, max(0, size - 2000)).decode(errors="replace").strip()
            raise TrackError(f"`mlflow server` at {address} must start (it said: {tail})")
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise TrackError(f"`mlflow server` at {address} must answer within two minutes")


def _free(port: int) -> int:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise TrackError(f"port {port} must be free for MLflow's UI ({error.strerror}); choose another") from None
        return int(probe.getsockname()[1])
