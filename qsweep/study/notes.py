"""What a person who reads a front has to know beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qsweep.records import Record
from qsweep.study.baselines import refusal
from qsweep.study.folder import SweepFolder, read_result


def notes(folder: SweepFolder, records: Sequence[Record]) -> Iterator[str]:
    """Of a sweep and its records, one sentence each: what is doubtful about the data, engines that take no version of
    the model, and accuracies of the test split that could not be had."""
    yield from read_result(folder.path / "prepare" / "prepare.json").get("doubts", [])
    baselines = [record for record in records if record.kind == "baseline"]
    for engine in dict.fromkeys(record.engine for record in baselines):
        if (reason := refusal(engine, baselines)) is not None:
            yield reason
    for record in records:
        failed = read_result(folder.path / record.folder / "test.json").get("failure")
        if failed and record.duplicate_of is None:
            yield f"the test split of #{record.number} `{record.name}` failed: {failed['message']}"
