from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from qsweep.config import Listed, content_hash
from qsweep.tasks._files import file_hash, locate, store_of
from qsweep.tasks.base import Task, TaskConfig


class Python(TaskConfig):
    """A class of the user's own: `model()`, `samples(split)`, `loss(outputs, labels)`, `score(outputs, labels)`, and
    `transform(inputs, generator=None)` where inputs need more than a cast to float32.

    What each takes and returns: `qsweep.tasks.base.Task`.
    """

    method: Literal["python"] = "python"
    file: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")]
    """`path/to/task.py:MyTask`, relative to the spec's folder. Modules beside the file can be imported."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the class."""
    trained: bool = False
    """Whether `model()` returns trained weights; if not, the baseline is trained, once."""
    depends_on: Listed[tuple[str, ...]] = ()
    """Other files that the results depend on (data, weights, modules): a change of one makes old results void."""

    def open(self, root: Path) -> Task:
        from qsweep.tasks._user import UserTask, load_class

        path, name = self._located(root)
        for other in self.depends_on:
            locate(other, root)
        return UserTask.of(load_class(path, name), self.arguments, path)

    @property
    def pretrained(self) -> bool:
        return self.trained

    def fingerprint(self, root: Path) -> str:
        store, (path, name) = store_of(root), self._located(root)
        files = [file_hash(file, store) for file in (path, *(locate(other, root) for other in self.depends_on))]
        return content_hash([self.method, self.version, files, name, self.arguments, self.trained])

    def _located(self, root: Path) -> tuple[Path, str]:
        file, name = self.file.rsplit(":", 1)
        return locate(file, root), name
