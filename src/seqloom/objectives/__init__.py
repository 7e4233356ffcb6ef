"""What is minimised."""

from seqloom.objectives.classes import Classification
from seqloom.objectives.masked import MaskedToken
from seqloom.objectives.next_token import Loss, NextToken, linear_cross_entropy

__all__ = ["Classification", "Loss", "MaskedToken", "NextToken", "linear_cross_entropy"]
