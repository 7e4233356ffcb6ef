"""Tasks: data with a score."""

from seqloom.tasks.base import IGNORE, Batch, LabelTask, SeriesTask, Task, TokenTask
from seqloom.tasks.mechanisms import MemoryRule, OverwriteRecall
from seqloom.tasks.synthetic import InductionHeads, LatestValueRecall, SelectiveCopy, SingleWriteRecall

TASKS = {"recall": LatestValueRecall, "copy": SelectiveCopy, "induction": InductionHeads}

__all__ = [
    "IGNORE",
    "TASKS",
    "Batch",
    "InductionHeads",
    "LabelTask",
    "LatestValueRecall",
    "MemoryRule",
    "OverwriteRecall",
    "SelectiveCopy",
    "SeriesTask",
    "SingleWriteRecall",
    "Task",
    "TokenTask",
]
