"""The `task` family: one file a kind of task."""

from typing import TYPE_CHECKING

from qsweep.config import family
from qsweep.tasks.base import ACCURACY, Samples, SplitName, Task, TaskConfig, TaskMetric, Training

if TYPE_CHECKING:
    AnyTask = TaskConfig
else:
    AnyTask = family(TaskConfig, __name__)

__all__ = ["ACCURACY", "AnyTask", "Samples", "SplitName", "Task", "TaskConfig", "TaskMetric", "Training"]
