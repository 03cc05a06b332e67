"""Everything qsweep raises on purpose.

QsweepError                  exit code 1, printed without a traceback
├── SpecError                the spec is wrong: names the path in it, what must hold, what came
├── DataError                a file of data or weights is missing, damaged or does not fit
├── SweepError               the sweep's folder: locked by another driver, or of a different spec
├── TrackError               the tracking server refused or did not answer
├── BundleError              a bundle is incomplete or was changed
└── TrialFailure             one config failed; the sweep goes on and the record says why
    ├── TaskFailure          the user's task raised, or returned something unusable
    ├── TaskChanged          the user's code, files or weights are not those that the sweep began with
    ├── ExportFailure        `torch.export` cannot trace the model
    ├── Refused              the engine cannot run this config, and says why
    ├── NotFinite            NaN or infinity in a loss, weight or output
    ├── ParityFailure        the deployed artifact disagrees with its simulation
    ├── OutOfMemory          host or device memory ran out
    ├── DiskFull             no space left where the artifact should go
    ├── TimedOut             the trial ran past its limit
    └── Crashed              the worker died (killed, segmentation fault)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class QsweepError(Exception):
    """Base of all errors that qsweep raises on purpose."""

    retry: bool = False
    """Whether running the same config again may help."""
    stops: str | None = None
    """Where it is no config's fault, and stops the sweep: what to do."""


class SpecError(QsweepError):
    """The spec is wrong: the message holds the path in the spec, what must hold and what came."""


class DataError(QsweepError):
    """A data or checkpoint file is missing, damaged, or does not fit the model."""


class SweepError(QsweepError):
    """The sweep's folder cannot be used: locked, or made by a different spec."""


class TrackError(QsweepError):
    """The tracking server refused or did not answer."""


class BundleError(QsweepError):
    """A bundle is incomplete, or a file in it was changed."""


class TrialFailure(QsweepError):
    """One config failed. Subclasses say how; `kind` is what the record and MLflow show."""

    @property
    def kind(self) -> str:
        return type(self).__name__


class TaskFailure(TrialFailure):
    """The user's task raised, or returned something unusable."""


class TaskChanged(TrialFailure):
    """Code, files or weights of the task are not those that the sweep began with."""

    stops = "Put them back and run the same command again, or give the spec another `name`"


class ExportFailure(TrialFailure):
    """`torch.export` cannot trace the model."""


class Refused(TrialFailure):
    """The engine cannot run this config."""


class NotFinite(TrialFailure):
    """NaN or infinity in a loss, a weight or an output."""


class ParityFailure(TrialFailure):
    """The deployed artifact disagrees with its simulation by more than the bounds."""


class OutOfMemory(TrialFailure):
    """Host or device memory ran out."""

    retry = True


class DiskFull(TrialFailure):
    """No space left on the device that holds the sweep."""

    stops = "Make room and run the same command again"


class TimedOut(TrialFailure):
    """The trial ran past its limit."""


class Crashed(TrialFailure):
    """The worker died: killed, or a fault in native code."""

    retry = True


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, if it is not qsweep's own, and what has led to it, the compiler's way of telling included."""
    found: BaseException | None = error
    while found is not None:
        if not isinstance(found, QsweepError):
            yield found
        found = found.__cause__ or getattr(found, "inner_exception", None)


def why(error: BaseException) -> str:
    """Why, in one line: the type and the first words of what began it, which compilers wrap many times."""
    *_, first = causes(error)
    text = str(first).strip()
    return f"{type(first).__name__}: {text.splitlines()[0][:300]}" if text else type(first).__name__


def did_you_mean(message: str, name: object, known: Iterable[str]) -> str:
    """`message`, which refuses `name`; before it stands the one of the `known` names that is nearest, if one is near:
    begins with it or it with that, has its letters, or differs by few (`edge_bits` is not near to `weight_bits`, which
    some methods have)."""
    word, names = str(name).lower(), list(known)
    begun = [each for each in names if each.startswith(word) or word.startswith(each)]
    swapped = [each for each in names if sorted(each) == sorted(word)]
    near = get_close_matches(word, begun, 1, 0.3) or swapped or get_close_matches(word, names, 1, 0.75)
    return f"did you mean `{near[0]}`? {message[0].upper()}{message[1:]}" if near else message


def failure(kind: str, message: str) -> QsweepError:
    """The failure named `kind` again, from a record."""
    return {each.__name__: each for each in _all(QsweepError)}.get(kind, TrialFailure)(message)


def _all(kind: type[QsweepError]) -> Iterator[type[QsweepError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _all(narrower)
