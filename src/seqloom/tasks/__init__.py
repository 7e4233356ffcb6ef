"""Tasks: data with a score. Trained on are synthetic/ (generated), real/ and tools/; mechanism/ needs no training."""

from seqloom.tasks.base import IGNORE, Batch, LabelTask, SeriesTask, Task, TokenTask
from seqloom.tasks.mechanism.additive import CommonMode, DifferenceRead, Memories, RoutedRecall
from seqloom.tasks.mechanism.delay import DelayReadout
from seqloom.tasks.mechanism.growth import GrowthOfSums
from seqloom.tasks.mechanism.implicit import ImplicitOverwriteRecall, ImplicitRule
from seqloom.tasks.mechanism.matrices import MatrixClass, MatrixFit
from seqloom.tasks.mechanism.overwriting import MemoryRule, OverwriteRecall
from seqloom.tasks.mechanism.slots import MemoryJoin, SlotRead, SlotRecall, TwoMemoryRecall
from seqloom.tasks.mechanism.untrained import ForgetHorizon, InitialLoss
from seqloom.tasks.mechanism.weighing import CopyRule, DistantCopy
from seqloom.tasks.real.digits import DigitPatches, DigitPixels
from seqloom.tasks.real.text import TopicBytes
from seqloom.tasks.synthetic.copying import Copy, LongerCopy, SelectiveCopy
from seqloom.tasks.synthetic.facts import FlaggedNotes, LatestPairRecall, LongLocalRecall
from seqloom.tasks.synthetic.lego import Lego
from seqloom.tasks.synthetic.majority import Majority
from seqloom.tasks.synthetic.needle import PassKey
from seqloom.tasks.synthetic.neighbours import TwoSidedNeighbours
from seqloom.tasks.synthetic.noise import InductionHeads, LongMemory
from seqloom.tasks.synthetic.programs import EditDistance, LongestIncreasingSubsequence
from seqloom.tasks.synthetic.recall import JointRecall, LatestValueRecall, MultiQueryRecall, SingleWriteRecall
from seqloom.tasks.synthetic.sensors import TextureSensor
from seqloom.tasks.synthetic.signals import Delay
from seqloom.tasks.synthetic.state_tracking import DyckPrefix, ModularCounting, Parity, WordProblem
from seqloom.tasks.tools.addition import Addition, rollout
from seqloom.tasks.tools.agents import generate_trajectory
from seqloom.tasks.tools.environments import PointerMemory, SearchTool, ToolEnv

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
