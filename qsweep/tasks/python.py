from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from qsweep.config import Listed, content_hash
from qsweep.tasks._files import file_hash, locate, store_of
from qsweep.tasks._imports import imported
from qsweep.tasks.base import ACCURACY, Task, TaskConfig, TaskMetric


class Python(TaskConfig):
    """A class of the user's own: `model()`, `samples(split)`, `loss(outputs, labels)`, `score(outputs, labels)`, and
    `transform(inputs, generator=None)` where inputs need more than a cast to float32, `metric(scores)` where the
    accuracy is no mean of scores, `teacher()` where distillation is to follow another model than the uncompressed one.

    What each takes and returns: `qsweep.tasks.base.Task`.
    """

    method: Literal["python"] = "python"
    file: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")]
    """`path/to/task.py:MyTask`, relative to the spec's folder. Modules beside the file can be imported, and count like
    it."""
    metric: TaskMetric = ACCURACY
    """What `score` or `metric(scores)` gives, where that is no accuracy in per cent: `{name: PSNR, unit: dB}`,
    `{name: negative perplexity, unit: null}`."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments of the class: what JSON has, which dates and infinities are not."""
    trained: bool = False
    """Whether `model()` returns trained weights; if not, the baseline is trained, once."""
    depends_on: Listed[tuple[str, ...]] = ()
    """Other files that the results depend on (data, weights): a change of one makes old results void."""

    def open(self, root: Path) -> Task:
        from qsweep.tasks._user import UserTask, load_class

        path, *_ = (locate(file, root) for file in self.files)
        return UserTask.of(load_class(path, self._name), self.arguments, path, self.metric)

    @property
    def judged_by(self) -> TaskMetric:
        return self.metric

    def check(self, root: Path) -> None:
        from qsweep.tasks._user import check_arguments, load_class

        super().check(root)
        path = locate(self.files[0], root)
        check_arguments(load_class(path, self._name), self.arguments, path)

    @property
    def files(self) -> list[str]:
        return [self.file.rsplit(":", 1)[0], *self.depends_on]

    @property
    def own_weights(self) -> bool:
        return self.trained

    @property
    def pretrained(self) -> bool:
        return self.trained

    @property
    def doubt(self) -> str | None:
        if self.trained:
            return None
        return (
            f"the model is trained first, {self.training.epochs:,} epochs; `task: {{trained: true}}` says that "
            "`model()` gives trained weights"
        )

    def fingerprint(self, root: Path) -> str:
        store = store_of(root)
        files = [locate(file, root) for file in self.files]
        hashes = [file_hash(file, store) for file in [*files, *imported(files[0])]]
        return content_hash([self.method, self.version, hashes, self._name, self.arguments, self.trained])

    @property
    def _name(self) -> str:
        return self.file.rsplit(":", 1)[1]
