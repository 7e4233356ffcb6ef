"""Mixtures of memories: that each memory is a sequence of its own, and what the router does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BuildContext, Info, scan, use_form
from seqloom.kernels import decay_scan, delta_scan, short_conv
from seqloom.laws.exact import layer_of, worst_of
from seqloom.mixers import DeltaNet, GatedDeltaNet, MixtureOfMemories
from seqloom.mixers.mom import MixtureOfMemoriesLayer
from seqloom.parts import l2_normalise
from seqloom.parts.router import Routing, TopKRouter, balance

DIM = 24


def loop(layer: MixtureOfMemoriesLayer, x: Tensor) -> Tensor:
    """What `layer` says of one sequence [T, D], memory by memory: the tokens that chose it are taken out and run alone."""
    spec, heads, rows, wide = layer.spec, layer.spec.heads, layer.rows, x.dtype
    routing = layer.router(x[None])
    read = x.new_zeros(len(x), heads, layer.value)
    part = lambda weight, m: weight if spec.single_kv else weight.chunk(rows)[m]  # noqa: E731
    for m in range(rows):
        mine = routing.chosen[0, :, m].nonzero()[:, 0] if m < spec.memories else torch.arange(len(x))
        share = routing.weight[0, mine, m] if m < spec.memories else x.new_ones(len(x))
        own = x[mine]
        if not len(own):
            continue
        maps = layer.q_proj.weight, part(layer.k_proj.weight, m), part(layer.v_proj.weight, m)
        qkv = torch.cat([own @ weight.T for weight in maps], 1)
        if layer.conv is None:
            qkv = F.silu(qkv)
        else:
            tail = qkv.new_zeros(1, spec.conv - 1, qkv.shape[1])
            step = lambda tail, now: short_conv.step(tail, now, weight=layer.conv.weight, activation="silu")  # noqa: E731
            qkv = scan(step, qkv[None], state=tail).y[0]
        width = heads * layer.key
        q, k = (l2_normalise(x.unflatten(1, (heads, -1)))[None] for x in (qkv[:, :width], qkv[:, width : 2 * width]))
        streams = [q * layer.key**-0.5, k, qkv[:, 2 * width :].unflatten(1, (heads, -1))[None]]
        if layer.b_proj is not None:
            streams.append((own @ part(layer.b_proj.weight, m).T).sigmoid()[None])
        if layer.a_proj is not None:
            gate = F.softplus(own @ part(layer.a_proj.weight, m).T + layer.dt_bias)
            streams.append((-layer.A_log.exp() * gate)[None])
        kernel = delta_scan.step if layer.b_proj is not None else decay_scan.step
        y = scan(kernel, *streams, state=x.new_zeros(1, heads, layer.key, layer.value, dtype=wide)).y[0]
        read = read.index_add(0, mine, share[:, None, None] * y)
    read = layer.o_norm(read) if layer.g_proj is None else layer.o_norm(read, layer.g_proj(x).unflatten(1, (heads, -1)))
    return layer.o_proj(read.flatten(1))


def is_loop(spec: MixtureOfMemories, *, tokens: int = 70) -> float:
    """Largest difference between the layer, in every exact form, and `loop`, with pads at either side or none, and memories
    that get fewer tokens than the convolution is wide ([mom] Works when 1)."""
    layer, worst = layer_of(spec, DIM), 0.0
    assert isinstance(layer, MixtureOfMemoriesLayer)
    for count in (1, 3, tokens):
        x = torch.randn(3, count + 5, DIM, dtype=torch.float64)
        ids = torch.ones(3, count + 5, dtype=torch.int64)
        ids[0, :5], ids[1, -5:] = 0, 0
        with torch.no_grad():
            want = [loop(layer, row[real != 0]) for row, real in zip(x, ids, strict=True)]
            for form in ("recurrent", "chunked", "parallel"):
                with use_form(form):
                    y = layer(x, info=Info(segments=ids)).y
                worst = max(worst, worst_of((row[real != 0], right) for row, real, right in zip(y, ids, want, strict=True)))
    return worst


def one_memory_is_backend(rule: str) -> float:
    """Difference between one memory that every token chooses and the plain layer of its rule ([mom] Works when 2)."""
    one = layer_of(MixtureOfMemories(heads=2, memories=1, active=1, shared=False, rule=rule), DIM)  # type: ignore[arg-type]
    plain = layer_of((GatedDeltaNet if rule == "gated_delta" else DeltaNet)(heads=2, gate="silu"), DIM)
    weights = dict(one.state_dict())
    del weights["router.weight"]
    weights["qkv.weight"] = torch.cat([weights.pop(f"{name}_proj.weight") for name in "qkv"])
    plain.load_state_dict(weights)
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    with torch.no_grad():
        return float((one(x).y - plain(x).y).abs().max())


def equal_memories_are_one() -> float:
    """Difference between three memories of equal weights, all chosen alike, and one of them ([mom] Works when 2)."""
    one = layer_of(MixtureOfMemories(heads=2, memories=1, active=1, shared=False), DIM)
    three = MixtureOfMemories(heads=2, memories=3, active=3, shared=False).build(BuildContext(dim=DIM)).double()
    sets = {"k_proj.weight", "v_proj.weight", "b_proj.weight", "a_proj.weight"}
    weights = {name: value.repeat(3, 1) if name in sets else value for name, value in one.state_dict().items()}
    three.load_state_dict(weights | {"router.weight": torch.zeros(3, DIM, dtype=torch.float64)})
    x = torch.randn(2, 70, DIM, dtype=torch.float64)
    with torch.no_grad():
        return float((three(x).y - one(x).y).abs().max())


def untouched(*, tokens: int = 20) -> float:
    """Largest change of a memory's cells by a token that did not choose it, over all forms: exactly 0 ([mom] Works when 3)."""
    layer, worst = layer_of(MixtureOfMemories(heads=2, memories=4, active=2), DIM), 0.0
    x = torch.randn(1, tokens, DIM, dtype=torch.float64)
    with torch.no_grad():
        for form in ("recurrent", "chunked", "parallel"):
            state = layer(x).state
            for t in range(tokens):
                with use_form(form):
                    after = layer(x[:, t : t + 1], state=state).state
                others = ~layer.router(x[:, t : t + 1]).chosen[0, 0]
                for old, new in zip(state.cells, after.cells, strict=True):
                    worst = max(worst, float((new - old)[:, :4][:, others].abs().max()))
                state = after
    return worst


def mixing_commutes() -> float:
    """Difference between mixing states and then reading, and reading and then mixing ([mom] Works when 5)."""
    layer = layer_of(MixtureOfMemories(heads=2, memories=3, active=2, shared=False), DIM)
    states = torch.randn(5, 3, 2, layer.key, layer.value, dtype=torch.float64)
    q, routing = torch.randn(5, 2, layer.key, dtype=torch.float64), layer.router(torch.randn(5, 1, DIM, dtype=torch.float64))
    reads = torch.einsum("bmhkv,bhk->bmhv", states, q)[:, None]
    mixed = torch.einsum("bmhkv,bm->bhkv", states, routing.weight[:, 0])
    return float((layer._read(reads, routing)[:, 0] - torch.einsum("bhkv,bhk->bhv", mixed, q)).abs().max().detach())


def balanced_loss(*, memories: int = 4, active: int = 2) -> float:
    """Difference of the balance loss from k when every memory is chosen alike ([mom] Works when 6)."""
    turns = torch.arange(memories * 3)[:, None] + torch.arange(active)
    chosen = F.one_hot(turns % memories, memories).sum(1).bool()[None]
    p = torch.full(chosen.shape, 1 / memories, dtype=torch.float64)
    return float((balance(Routing(p, chosen, p))[0].mean() - active).abs())


def collapsed_loss(*, memories: int = 4, active: int = 2) -> float:
    """The balance loss less k when all tokens choose the same memories with certainty: M - k ([mom] Works when 6)."""
    chosen = (torch.arange(memories) < active).expand(1, 6, -1)
    p = chosen.double() / active
    return float(balance(Routing(p, chosen, p))[0].mean() - active)


def router_gradient(active: int) -> float:
    """Largest gradient of the outputs by the router's weights: 0 with one memory a token, whose share is always 1
    ([mom] Works when 7)."""
    layer = layer_of(MixtureOfMemories(heads=2, memories=4, active=active), DIM)
    assert isinstance(layer.router, TopKRouter)
    y = layer(torch.randn(2, 20, DIM, dtype=torch.float64)).y
    (gradient,) = torch.autograd.grad(y.square().sum(), layer.router.weight, allow_unused=True)
    return 0.0 if gradient is None else float(gradient.abs().max())
