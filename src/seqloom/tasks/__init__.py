"""Tasks: data with a score."""

from seqloom.tasks.base import IGNORE, Batch, LabelTask, SeriesTask, Task, TokenTask
from seqloom.tasks.copying import Copy, CopyRule, DistantCopy
from seqloom.tasks.digits import DigitPatches
from seqloom.tasks.growth import GrowthOfSums
from seqloom.tasks.implicit import ImplicitOverwriteRecall, ImplicitRule
from seqloom.tasks.lego import Lego
from seqloom.tasks.longer import LongerCopy
from seqloom.tasks.majority import InitialLoss, Majority
from seqloom.tasks.matrix_classes import MatrixClass, MatrixFit
from seqloom.tasks.mechanisms import MemoryRule, OverwriteRecall
from seqloom.tasks.memory import ForgetHorizon, LongMemory
from seqloom.tasks.needle import PassKey
from seqloom.tasks.neighbours import TwoSidedNeighbours
from seqloom.tasks.notes import CommonMode, DifferenceRead, FlaggedNotes
from seqloom.tasks.pairs import LatestPairRecall, LongLocalRecall
from seqloom.tasks.programs import EditDistance, LongestIncreasingSubsequence
from seqloom.tasks.reads import MemoryJoin, SlotRead, SlotRecall, TwoMemoryRecall
from seqloom.tasks.recall import JointRecall, MultiQueryRecall
from seqloom.tasks.routed import Memories, RoutedRecall
from seqloom.tasks.sensors import TextureSensor
from seqloom.tasks.signals import Delay, DelayReadout, DigitPixels
from seqloom.tasks.state_tracking import DyckPrefix, ModularCounting, Parity, WordProblem
from seqloom.tasks.synthetic import InductionHeads, LatestValueRecall, SelectiveCopy, SingleWriteRecall
from seqloom.tasks.text import TopicBytes
from seqloom.tasks.tools import Addition, PointerMemory, SearchTool, ToolEnv, generate_trajectory, rollout

TASKS = {
    "recall": LatestValueRecall,
    "copy": SelectiveCopy,
    "induction": InductionHeads,
    "state-tracking": WordProblem,
    "multi-query": MultiQueryRecall,
    "lego": Lego,
    "needle": PassKey,
    "addition": Addition,
}

__all__ = [
    "IGNORE",
    "TASKS",
    "Addition",
    "Batch",
    "CommonMode",
    "Copy",
    "CopyRule",
    "Delay",
    "DelayReadout",
    "DifferenceRead",
    "DigitPatches",
    "DigitPixels",
    "DistantCopy",
    "DyckPrefix",
    "EditDistance",
    "FlaggedNotes",
    "ForgetHorizon",
    "GrowthOfSums",
    "ImplicitOverwriteRecall",
    "ImplicitRule",
    "InductionHeads",
    "InitialLoss",
    "JointRecall",
    "LabelTask",
    "LatestPairRecall",
    "LatestValueRecall",
    "Lego",
    "LongLocalRecall",
    "LongMemory",
    "LongerCopy",
    "LongestIncreasingSubsequence",
    "Majority",
    "MatrixClass",
    "MatrixFit",
    "Memories",
    "MemoryJoin",
    "MemoryRule",
    "ModularCounting",
    "MultiQueryRecall",
    "OverwriteRecall",
    "Parity",
    "PassKey",
    "PointerMemory",
    "RoutedRecall",
    "SearchTool",
    "SelectiveCopy",
    "SeriesTask",
    "SingleWriteRecall",
    "SlotRead",
    "SlotRecall",
    "Task",
    "TextureSensor",
    "TokenTask",
    "ToolEnv",
    "TopicBytes",
    "TwoMemoryRecall",
    "TwoSidedNeighbours",
    "WordProblem",
    "generate_trajectory",
    "rollout",
]
