"""What comes after the last trial: near ties run again, the front, its accuracy on the test split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qsweep.records import Record
from qsweep.spec import Spec
from qsweep.study import outcome, repeats
from qsweep.study.certainty import Places
from qsweep.study.folder import SweepFolder
from qsweep.study.pipeline import Evaluation, Pipeline

if TYPE_CHECKING:
    from numpy import ndarray


class JobOf(Protocol):
    """What `job.json` says of a config."""

    def __call__(self, plain: dict[str, Any], baseline: Path | None, draw: int | None = None) -> dict[str, Any]: ...


class Final:
    """One end of a sweep. Records that it changes are on disk before it yields them."""

    def __init__(
        self,
        spec: Spec,
        folder: SweepFolder,
        pipeline: Callable[[], Pipeline],
        job: JobOf,
        stopping: Callable[[], bool],
    ) -> None:
        self.spec, self.folder, self.pipeline, self.job, self.stopping = spec, folder, pipeline, job, stopping

    def run(self, records: Iterable[Record], may_repeat: Callable[[], bool]) -> Iterator[Record]:
        """The records that change; `may_repeat` says whether there is time to begin another evaluation."""
        known = {record.number: record for record in records}
        for round in range(1, repeats.ROUNDS + 1):
            due = repeats.due(self.spec, list(known.values()), round, self._scores) if may_repeat() else []
            changed = list(self._repeated(due, round, known, may_repeat))
            known |= {record.number: record for record in changed}
            yield from changed  # now that nothing is measured
            if not any(again.round == round for record in known.values() for again in record.repetitions):
                break
        if not self.stopping():
            yield from self._front(list(known.values()))

    def _repeated(
        self, due: Sequence[Record], round: int, known: dict[int, Record], may_repeat: Callable[[], bool]
    ) -> Iterator[Record]:
        seed = repeats.seed_of(self.spec, round)

        def evaluations() -> Iterator[Evaluation]:
            for record in due:
                if may_repeat():
                    folder = self.folder.repetition(record.number, round)
                    content = self.job(repeats.redrawn(record.config, round), self.folder.trial(0), draw=seed)
                    yield Evaluation(folder, content)

        for evaluation in self._evaluated(evaluations()):
            place = str(evaluation.folder.relative_to(self.folder.path))
            made = outcome.repetition(self.spec, place, round, seed, evaluation, known[0])
            record = repeats.with_repetition(known[int(evaluation.folder.name.partition("-")[0])], made)
            self.folder.write(record)
            yield record

    def _front(self, records: list[Record]) -> Iterator[Record]:
        members = Places.of(self.spec, records, self._scores(records)).members()
        numbers = {record.number: record for record in records}
        known = {number for number, record in numbers.items() if record.metrics.accuracy_test is not None}
        tested = self._tested([numbers[n] for n in sorted({0, *members} - known)])
        for record in records:
            metrics = record.metrics.model_copy(update=tested.get(record.number, {}))
            after = record.model_copy(update={"front": members.get(record.number), "metrics": metrics})
            if after != record:
                self.folder.write(after)
                yield after

    def _tested(self, records: Sequence[Record]) -> dict[int, dict[str, float]]:
        """`accuracy_test` of these records. One that fails stays without, and is tried again by the next run."""

        def evaluations() -> Iterator[Evaluation]:
            for record in records:
                folder = self.folder.trial(record.number)
                outcome.forget_failure(folder, "test")
                baseline = self.folder.trial(0) if record.number else None
                yield Evaluation(folder, self.job(record.config, baseline), jobs=("test",))

        return {int(e.folder.name): e.merged("metrics") for e in self._evaluated(evaluations())}

    def _evaluated(self, todo: Iterator[Evaluation]) -> Iterator[Evaluation]:
        """Those of `todo` that come to their end before the sweep is stopped."""
        pipeline, more = self.pipeline(), True
        while (more or pipeline.active) and not self.stopping():
            while more and pipeline.free > 0:
                new = next(todo, None)
                more = new is not None
                if new is not None:
                    pipeline.add(new)
            yield from pipeline.step()

    def _scores(self, records: Sequence[Record]) -> dict[int, ndarray]:
        """By number the scores of each record's evaluations, (draws, N), as far as they are on disk."""
        import numpy

        found = {}
        for record in records:
            done = [again.folder for again in record.repetitions if again.failure is None]
            rows = [outcome.scores(self.folder.path / folder) for folder in (record.folder, *done)]
            have = [row for row in rows if row is not None]
            if len(have) == len(rows) and len({len(row) for row in have}) == 1:
                found[record.number] = numpy.stack(have)
        return found
