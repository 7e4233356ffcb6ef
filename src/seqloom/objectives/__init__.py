"""What is minimised."""

from seqloom.objectives.next_token import Loss, NextToken, linear_cross_entropy

__all__ = ["Loss", "NextToken", "linear_cross_entropy"]
