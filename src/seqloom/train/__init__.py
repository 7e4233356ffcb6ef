"""Training on text, exact on resume."""

from seqloom.train.config import TrainConfig
from seqloom.train.evaluate import Score, evaluate, without
from seqloom.train.loop import TrainResult, train

__all__ = ["Score", "TrainConfig", "TrainResult", "evaluate", "train", "without"]
