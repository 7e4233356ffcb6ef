"""Two rates: streaming, causality by chunks, independence of chunks, padding, and what it saves."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from seqloom.core import Info
from seqloom.mixers import HGRN, S4D, Mamba
from seqloom.models import Block, Hierarchy, Stack
from seqloom.models.hierarchy import HierarchyLayer
from seqloom.objectives.regression import squared_error

CHUNK, CHUNKS = 5, 7


def small(*, pool: str = "last", memory: str = "chunk", high: int = 2) -> Hierarchy:
    """S4D inside chunks, Mamba and HGRN over them."""
    block = lambda mixer: Block(mixer=mixer, mlp=None, norm="layer")  # noqa: E731
    upper = (block(Mamba(state=4, expand=1)), block(HGRN()))[:high]
    return Hierarchy(low=Stack(dim=12, blocks=(block(S4D(state=8)),) * 2, norm="layer"), chunk=CHUNK, pool=pool, memory=memory,
                     high=Stack(dim=16, blocks=upper, norm="layer"))


def _layer(spec: Hierarchy) -> HierarchyLayer:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer = spec.build().double()
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streams(*, pool: str = "last", memory: str = "chunk") -> float:
    """Largest difference between one pass and the same samples one by one, or in uneven pieces, and of what follows both.
    [hiss] Works when 1."""
    layer, tokens = _layer(small(pool=pool, memory=memory)), CHUNK * CHUNKS
    x, more = _draw(2, tokens, 12), _draw(2, 3 * CHUNK, 12, seed=1)
    worst = 0.0
    with torch.no_grad():
        whole = layer(x)
        after = layer(more, state=whole.state).y
        for size in (1, 2, 7, 11, tokens):
            state, parts = layer.init_state(2), []
            for piece in x.split(size, 1):
                answered = layer.answered(piece.shape[1], state=state)
                y, state, _ = layer(piece, state=state)
                parts.append(y[:, answered[0]])
            worst = max(worst, float((torch.cat(parts, 1) - whole.y).abs().max()))
            worst = max(worst, float((layer(more, state=state).y - after).abs().max()))
    return worst


def looks_ahead() -> tuple[float, float]:
    """When the samples of one chunk change: the largest change of earlier outputs, and of its own. [hiss] Works when 2."""
    layer, place = _layer(small()), 4
    x = _draw(2, CHUNK * CHUNKS, 12)
    other = x.clone()
    other[:, place * CHUNK : (place + 1) * CHUNK] += _draw(2, CHUNK, 12, seed=1)
    with torch.no_grad():
        moved = (layer(x).y - layer(other).y).abs()
    return float(moved[:, :place].max()), float(moved[:, place].max())


def chunks_are_independent(*, memory: str = "chunk") -> float:
    """With no block above, how far permuted chunks are from giving permuted outputs: 0, and not where low runs on through
    the sequence. [hiss] Works when 3."""
    layer = _layer(small(memory=memory, high=0))
    x, order = _draw(2, CHUNK * CHUNKS, 12), torch.randperm(CHUNKS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = layer(x).y[:, order]
        got = layer(x.unflatten(1, (CHUNKS, CHUNK))[:, order].flatten(1, 2)).y
    return float((got - want).abs().max())


def one_sample_chunks() -> float:
    """Deviation of chunks of one sample, without a block below, from the stack above on the mapped input.
    [hiss] Works when 4."""
    below = Stack(dim=12, blocks=(), norm="none")
    layer = _layer(Hierarchy(low=below, high=small().high, chunk=1))
    x = _draw(2, 20, 12)
    with torch.no_grad():
        return float((layer(x).y - layer.high(layer.join(x)).y).abs().max())


def padding() -> float:
    """What padding before, inside and behind sequences, NaN at the pads, changes: of outputs, the loss and its gradients,
    beside the sequences alone. [hiss] Works when 5."""
    layer = _layer(small())
    lengths, total = (20, 10, 35), 40
    ids = torch.zeros(3, total, dtype=torch.int64)
    ids[0, 4:24] = ids[1, :7] = ids[1, 9:12] = ids[2, :35] = 1
    x = torch.full((3, total, 12), torch.nan, dtype=torch.float64)
    alone = [_draw(1, length, 12, seed=length).requires_grad_() for length in lengths]
    for row, values in enumerate(alone):
        x[row, ids[row] != 0] = values[0].detach()
    x.requires_grad_()
    target = _draw(3, total // CHUNK, 16)
    info = Info(segments=ids)
    real = layer.answered(total, info)
    y = layer(x, info=info).y
    loss = squared_error(y, torch.where(real[..., None], target, torch.nan), real)
    each = [layer(values).y for values in alone]
    flat = torch.cat([part[0] for part in each]), torch.cat([target[row, : n // CHUNK] for row, n in enumerate(lengths)])
    want = squared_error(flat[0][None], flat[1][None])
    (gradient,) = torch.autograd.grad(loss, x)
    wanted = torch.autograd.grad(want, alone)
    pairs = [(loss, want), (torch.nan_to_num(gradient, torch.inf).sum(), sum(part.sum() for part in wanted))]
    pairs += [(y[row, : part.shape[1]], part[0]) for row, part in enumerate(each)]
    pairs += [(gradient[row, ids[row] != 0], part[0]) for row, part in enumerate(wanted)]
    return max(float((got - other).detach().abs().max()) for got, other in pairs)


def step_time(method: Hierarchy, flat: Hierarchy, *, batch: int = 16, tokens: int = 400, repeats: int = 9) -> float:
    """Processor time of a training step of `method` over that of `flat`, the least of interleaved repeats of each.
    [hiss] Works when 6."""
    layers = [spec.build() for spec in (method, flat)]
    x = torch.randn(batch, tokens, method.dim, generator=torch.Generator().manual_seed(0))
    least = [float("inf")] * 2
    for _ in range(repeats):
        for i, layer in enumerate(layers):
            began = time.process_time()
            layer(x).y.square().sum().backward()
            least[i] = min(least[i], time.process_time() - began)
    return least[0] / least[1]
