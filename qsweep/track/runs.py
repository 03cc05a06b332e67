"""The runs of one sweep in MLflow: a parent, and one child a record."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsweep.errors import BundleError
from qsweep.records import Record
from qsweep.spec import Spec
from qsweep.study.folder import SweepFolder
from qsweep.study.notes import notes
from qsweep.track import flat
from qsweep.track.bundle import bundle
from qsweep.track.client import connect, experiment, impatient, log_all, now
from qsweep.track.environment import environment
from qsweep.track.ledger import Ledger
from qsweep.track.pareto import front, hypervolume
from qsweep.track.report import pareto_html
from qsweep.track.table import engine_text, front_table, full_table, mixed_bits, several_sizes
from qsweep.track.view import REPORT, set_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("qsweep.track")
Status = Literal["FINISHED", "FAILED", "KILLED"]
_NOTE_LIMIT = 7000  # MLflow cuts tags at 8,000 characters without a word


class Runs:
    """One sweep's runs. Methods raise whatever MLflow raises; the caller turns it into TrackError."""

    def __init__(self, client: MlflowClient, spec: Spec, folder: Path, ledger: Ledger, experiment_id: str) -> None:
        self.client, self.spec, self.folder, self.ledger = client, spec, folder, ledger
        self.experiment_id = experiment_id
        self.several_engines = len({target.engine for target in spec.target.configs()}) > 1
        self.several_sizes = several_sizes(spec)
        self.environment = environment(folder.parent.parent)
        self.common = {
            "qsweep.sweep": spec.name,
            "qsweep.git_commit": self.environment["git_commit"],
            "mlflow.source.name": "qsweep",
            "mlflow.source.type": "LOCAL",
        }

    @classmethod
    def attach(cls, spec: Spec, uri: str, folder: Path) -> Runs:
        """The sweep's runs found again by `published.json` and by tag, or a new parent; it is RUNNING afterwards."""
        client = connect(uri)
        with impatient():
            experiment_id = experiment(client, uri, spec.track.experiment or spec.name)
            runs = cls(client, spec, folder, Ledger(folder / "published.json", uri), experiment_id)
            runs._find()
            set_view(client, experiment_id, spec)
        return runs

    def _find(self) -> None:
        found = self._search()
        parents = [run for run in found if run.data.tags["qsweep.kind"] == "sweep"]
        if self.ledger.content["parent"] and not parents:  # deleted there, or another database
            self.ledger.reset()
        self.orphans = {int(run.data.tags["qsweep.number"]): run.info.run_id for run in found if run not in parents}
        self.deleted = set(self.ledger.order) - set(self.orphans)
        if parents:
            self.parent = str(parents[0].info.run_id)
            self.client.update_run(self.parent, status="RUNNING")
            if parents[0].data.tags.get("qsweep.spec") != self.spec.uid():
                self._log_spec(self.parent)
        else:
            self.ledger.save(durable=True)  # before the first run is made: its tag must never be lost
            self.parent = self._new_parent()
            for run_id in self.orphans.values():
                self.client.set_tag(run_id, "mlflow.parentRunId", self.parent)
        self.ledger.content |= {"parent": self.parent, "experiment_id": self.experiment_id}
        self.ledger.save()

    def _search(self) -> list[Run]:
        wanted = f"tags.`qsweep.sweep_id` = '{self.ledger.sweep_id}'"
        return list(self.client.search_runs([self.experiment_id], wanted, max_results=50_000))

    def _new_parent(self) -> str:
        tags = self.common | {"qsweep.kind": "sweep", "qsweep.sweep_id": self.ledger.sweep_id}
        run_id = str(self.client.create_run(self.experiment_id, tags=tags, run_name=self.spec.name).info.run_id)
        # those that stay as they are, as a param does
        fixed = self.spec.model_dump(mode="json", include={"measure": True, "search": {"seed"}})
        log_all(self.client, run_id, params=dict(flat.leaves(fixed)))
        self.client.log_text(run_id, json.dumps(self.environment, indent=2), "environment.json")
        self._log_spec(run_id)
        return run_id

    def _log_spec(self, run_id: str) -> None:
        """The spec that the sweep is run with now."""
        self.client.log_text(run_id, yaml_text(self.spec.model_dump(mode="json", exclude_unset=True)), "spec.yaml")
        self.client.set_tag(run_id, "qsweep.spec", self.spec.uid())

    def check_alive(self) -> None:
        """Raises where the server does not answer."""
        with impatient():
            self.client.get_run(self.parent)

    def has(self, record: Record) -> bool:
        """Whether MLflow has the record as it is now, or had it and somebody deleted it there."""
        return self.ledger.has(record, self._name(record)) or record.number in self.deleted

    def put(self, record: Record) -> None:
        """Make the record's run, or bring it up to date, and end it."""
        with impatient():
            run_id = self.ledger.entry(record.number).get("run_id") or self.orphans.get(record.number)
            self._update(run_id, record) if run_id else self._create(record)

    def _create(self, record: Record) -> None:
        end = self._finished_at(record)
        begin = end - int(1000 * sum(record.seconds.values()))
        tags = self.common | flat.tags(record) | {
            "qsweep.sweep_id": self.ledger.sweep_id,
            "mlflow.parentRunId": self.parent,
        }  # fmt: skip
        run = self.client.create_run(self.experiment_id, begin, tags, self._name(record))
        self.orphans[record.number] = str(run.info.run_id)  # used again, should what follows fail
        self._fill(str(run.info.run_id), record, end)

    def _name(self, record: Record) -> str:
        """Its name, with engine and batch size where there are several: the same config on two of them is two runs."""
        engine = f" on {engine_text(record)}" if self.several_engines else ""
        return f"{record.name}{engine}{f', batch {record.call.batch_size}' if self.several_sizes else ''}"

    def _update(self, run_id: str, record: Record) -> None:
        """Log what differs; a metric logged twice would be drawn as a curve."""
        run, name = self.client.get_run(run_id), self._name(record)
        if run.info.run_name != name:  # the sweep has more engines, or batch sizes, than it had
            self.client.update_run(run_id, name=name)
        self._fill(run_id, record, run.info.end_time or self._finished_at(record), run.data.metrics)

    def _fill(self, run_id: str, record: Record, end: int, known: Mapping[str, float] | None = None) -> None:
        fresh = {name: value for name, value in flat.metrics(record).items() if (known or {}).get(name) != value}
        new = not self.ledger.entry(record.number)
        log_all(
            self.client,
            run_id,
            flat.params(record) if new else {},
            fresh,
            {} if known is None else flat.tags(record),
            end,
        )
        if record.repetitions:
            text = yaml_text([again.model_dump(mode="json", exclude_none=True) for again in record.repetitions])
            self.client.log_text(run_id, text, "repetitions.yaml")
        if new:
            self.client.log_text(run_id, yaml_text(record.config), "config.yaml")
            if mixed_bits(record):
                self.client.log_text(run_id, json.dumps(record.layer_bits, indent=1), "layer_bits.json")
            if record.state == "failed" and (self.folder / record.folder / "log.txt").is_file():
                self.client.log_artifact(run_id, str(self.folder / record.folder / "log.txt"))
        self.client.set_terminated(run_id, "FINISHED" if record.state == "complete" else "FAILED", end)
        self.ledger.note(record, run_id, self._name(record))

    def _finished_at(self, record: Record) -> int:
        """Milliseconds since 1970 when the record was written; now, where it was not."""
        path = self.folder / record.folder / "record.json"
        return int(1000 * path.stat().st_mtime) if path.is_file() else now()

    def summarize(self, records: Sequence[Record]) -> None:
        """Bring the parent's note and its series of the hypervolume up to date."""
        from mlflow.entities import Metric, RunTag

        known = {record.number: record for record in records}
        order = [known[number] for number in self.ledger.order if number in known]
        new = range(self.ledger.content["steps"] + 1, len(order) + 1)
        members = {r.number for step in new for r in front(order[:step], self.spec)}
        self.ledger.content["members"] = sorted(members | self.ledger.members)
        steps = [(step, hypervolume(order[:step], self.spec)) for step in new]
        series = [Metric("hypervolume", value, now(), step) for step, value in steps if value is not None]
        with impatient():
            for first in range(0, len(series) or 1, 1000):
                tags = [RunTag("mlflow.note.content", note(records, self.spec, self._notes(records)))]
                self.client.log_batch(self.parent, series[first : first + 1000], tags=tags)
        self.ledger.content["steps"] = len(order)
        self.ledger.save()

    def finish(self, records: Sequence[Record], status: Status) -> None:
        """The parent's summary and files, the bundles of all that is or was on the front, and an end to every run."""
        self.summarize(records)
        with impatient():
            self.client.log_text(self.parent, front_table(records, self.spec).csv(), "front.csv")
            self.client.log_text(self.parent, full_table(records, self.spec).csv(), "trials.csv")
            self.client.log_text(self.parent, pareto_html(records, self.spec, self._notes(records)), REPORT)
            members = {record.number for record in front(records, self.spec)} | self.ledger.members
            for record in [record for record in records if record.number in members]:
                self._put_bundle(record)
            for run in self._search():
                if run.info.status == "RUNNING" and run.info.run_id != self.parent:  # its record was lost with its disk
                    self.client.set_terminated(run.info.run_id, "FAILED")
            self.client.set_terminated(self.parent, status)

    def _notes(self, records: Sequence[Record]) -> list[str]:
        return list(notes(self.spec, SweepFolder.at(self.folder), records))

    def _put_bundle(self, record: Record) -> None:
        entry = self.ledger.entry(record.number)
        if not entry or entry.get("bundle") or record.number in self.deleted:
            return
        with tempfile.TemporaryDirectory() as place:
            try:
                made = bundle(record, self.folder, Path(place) / "bundle")
            except BundleError as error:
                log.warning("no bundle of `%s` was published: %s", record.name, error)
                return
            self.client.log_artifacts(entry["run_id"], str(made), "bundle")
        self.ledger.note_bundle(record.number)


def note(records: Sequence[Record], spec: Spec, doubts: Sequence[str] = ()) -> str:
    """The parent's description, in Markdown: how far the sweep is, its front, and what is to be known beside it."""
    states = {state: sum(r.state == state for r in records) for state in ("complete", "failed", "refused")}
    copies = sum(r.duplicate_of is not None for r in records)
    counts = [f"**{count}** {state}" for state, count in states.items() if count]
    counts += [f"{copies} of them equal to an earlier one"] if copies else []
    table = front_table(records, spec)
    head = f"### {spec.name}\n\n{', '.join(counts)}\n\n"
    foot = "".join(f"\n- {doubt}" for doubt in doubts)[: _NOTE_LIMIT // 2]
    limit = len(table.rows)
    while limit and len(head + table.markdown(limit) + foot) > _NOTE_LIMIT:
        limit -= 1
    rest = f"\n… and {len(table.rows) - limit} more in `front.csv`\n" if limit < len(table.rows) else ""
    return head + table.markdown(limit) + rest + foot


def yaml_text(content: object) -> str:
    """Plain data as YAML, keys in their order."""
    import yaml

    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
