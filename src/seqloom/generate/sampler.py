"""From scores to the next token: greedy, or drawn after temperature, top-k, top-p, min-p and a repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqloom.core import BadInput


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn. The steps apply in the order of the fields; what a step removes gets probability 0.

    repetition_penalty: r > 1 divides a positive score of a token already seen by r, and multiplies a negative one
    temperature:        scores are divided by it; 0 takes the best token (greedy), and the steps below do nothing
    top_k:              the k best tokens stay; 0 is all
    top_p:              the smallest set of best tokens whose probabilities sum to p stays; 1 is all
    min_p:              tokens at least min_p times as probable as the best stay; 0 is all
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "repetition_penalty": (self.repetition_penalty > 0, "a number above 0 (1 is none)"),
            "temperature": (self.temperature >= 0, "a number of at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "a whole number of at least 0 (0 is all tokens)"),
            "top_p": (0 < self.top_p <= 1, "a number in (0, 1] (1 is all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "a number in [0, 1] (0 is all tokens)"),
        }
        for name, (fits, expected) in limits.items():
            if not fits:
                raise BadInput(f"{name} must be {expected}, found {getattr(self, name)}")

    def scores(self, logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"] | None = None) -> Float[Tensor, "b v"]:
        """Log probabilities up to a constant, -inf where a token was removed; in float32 or wider."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None and self.repetition_penalty != 1:
            pushed = torch.where(scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty)
            scores = torch.where(seen, pushed, scores)
        if self.temperature == 0:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            best, order = scores.sort(dim=-1, descending=True)
            mass = best.softmax(-1)
            # a token stays while the mass before it is short of p, so the best one always does
            late = mass.cumsum(-1) - mass >= self.top_p
            scores = scores.masked_fill(torch.zeros_like(late).scatter(-1, order, late), -torch.inf)
        if self.min_p > 0:
            probability = scores.softmax(-1)
            scores = scores.masked_fill(probability < self.min_p * probability.amax(-1, keepdim=True), -torch.inf)
        return scores

    def draw(self, logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"] | None = None,
             generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """The next token of each row. `seen` marks the tokens of the prompt and those drawn so far."""
        scores = self.scores(logits, seen)
        if self.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
