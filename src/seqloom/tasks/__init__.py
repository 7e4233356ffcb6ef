"""Tasks: data with a score."""

from seqloom.tasks.base import IGNORE, Batch, TokenTask, accuracy
from seqloom.tasks.mechanisms import MemoryRule, OverwriteRecall
from seqloom.tasks.synthetic import InductionHeads, LatestValueRecall, SelectiveCopy, SingleWriteRecall

TASKS = {"recall": LatestValueRecall, "copy": SelectiveCopy, "induction": InductionHeads}

__all__ = [
    "IGNORE",
    "TASKS",
    "Batch",
    "InductionHeads",
    "LatestValueRecall",
    "MemoryRule",
    "OverwriteRecall",
    "SelectiveCopy",
    "SingleWriteRecall",
    "TokenTask",
    "accuracy",
]
