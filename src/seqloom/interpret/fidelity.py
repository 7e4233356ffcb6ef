"""How much of what was read a later state still tells, by a ridge probe on held-out rows.

Source: [memmamba] Method 2, whose two measures, expected token memory fidelity (ETMF) along time and its like across layers
(ECLMF), name no decoder; here it is the linear map with the least squared error and a ridge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def fidelity(source: Float[Tensor, "n f"], target: Float[Tensor, "n d"], *, ridge: float = 1e-3, held: float = 0.5) -> float:
    """Mean cosine, in [-1, 1], between targets and what a ridge regression reads of them from `source`, on the last share
    `held` of the rows; the first rows fit it. Both sides are centred by the mean of the rows that fit.

    Raises: ValueError if either part has fewer than 2 rows.
    """
    rows = source.shape[0]
    fitted = rows - int(rows * held)
    if fitted < 2 or rows - fitted < 2:
        raise ValueError(f"fidelity: {rows} rows with {held:g} held out leave {fitted} to fit and {rows - fitted} to test; "
                         "at least 2 of each are needed")
    x, y = source.double(), target.double()
    x, y = x - x[:fitted].mean(0), y - y[:fitted].mean(0)
    known = x[:fitted]
    gram = known.T @ known
    penalty = ridge * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    read = x[fitted:] @ torch.linalg.solve(gram + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device),
                                           known.T @ y[:fitted])
    return float(F.cosine_similarity(read, y[fitted:], dim=-1).mean())


def etmf(state: Float[Tensor, "n f"], tokens: Float[Tensor, "n t d"], *, ridge: float = 1e-3) -> float:
    """Expected token memory fidelity: `fidelity` of each token given the state after the last, mean over the tokens.

    Row by row one sequence: `state` is what is left after it, flattened, `tokens` what it read.
    """
    return sum(fidelity(state, tokens[:, t], ridge=ridge) for t in range(tokens.shape[1])) / tokens.shape[1]


def eclmf(layers: Sequence[Float[Tensor, "b t d"]], *, gap: int = 1, ridge: float = 1e-3) -> float:
    """Across layers: `fidelity` of what enters a layer given what enters the one `gap` later, mean over the layers.

    `layers` are the inputs of each block, as a stack's `collect` gives them; every token of every row is one sample.
    Raises: ValueError if there are no two layers `gap` apart.
    """
    pairs = list(zip(layers, layers[gap:], strict=False))
    if gap < 1 or not pairs:
        raise ValueError(f"eclmf: of {len(layers)} layers none are {gap} apart; use a gap in 1..{max(len(layers) - 1, 1)}")
    flat = [(early.flatten(0, 1), late.flatten(0, 1)) for early, late in pairs]
    return sum(fidelity(late, early, ridge=ridge) for early, late in flat) / len(flat)
