"""What PyTorch offers for softmax attention on CUDA, and when each part of it is the right one.

    backends   scaled_dot_product_attention by the fastest of its kernels that a call may use
    varlen     rows of any length, one after the other (torch.nn.attention.varlen, flash attention)
    flex       any pattern that is an interval of numbered keys, by compiled FlexAttention over blocks with visible pairs

Nothing here is T x T. Which form takes which call is decided in kernels/softmax.py (`preference`). Source: [flashattention-2].
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("seqloom.forms")

NOWHERE = torch.iinfo(torch.int32).max  # the first key of a query that sees none
SHORT = 128      # queries below which cuDNN's kernel is not worth its plan
PLANS = 16       # shapes that get a cuDNN plan at their first call, in one process
PLAN_AFTER = 64  # calls after which any further shape gets one
MASK = 1 << 24   # entries of a mask from which on it is said that one is made
BLOCK = 128      # tokens a side of a block of FlexAttention
BLOCKS = 1024    # blocks a side at most: lists of blocks are quadratic in this, so blocks grow with T
NARROW = 16      # numbers a head that FlexAttention wants at least
MASKS = 32       # block masks kept, one for each (pattern, lengths, device)

# Properties of this build, as constants: compiled code reads them too. The kernel for rows of any length takes windows from
# 2.11 on, and from 2.12 on wants to be told of grouped heads.
VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
VARLEN = VERSION >= (2, 11) and torch.version.cuda is not None
SAYS_GROUPS = VERSION >= (2, 12)


# Whole rows ----------------------------------------------------------------------------------------------------------

def backends(q: Tensor, k: Tensor, v: Tensor, masked: bool) -> contextlib.AbstractContextManager:
    """Within it, scaled_dot_product_attention(q, k, v) [B, H, T, K] tries its kernels from the fastest on.

    In 16 bits and without a mask: cuDNN, where `planned` says so; flash; memory-efficient; plain. With a mask, cuDNN is
    left out: in PyTorch 2.11 to 2.13 its gradient of q is NaN for masked rows of some lengths. A kernel that the user has
    turned off (torch.backends.cuda.enable_cudnn_sdp(False), and so on) stays off. Elsewhere PyTorch's own order stands.
    """
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not masked and planned(q, k, v):
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    if not torch.compiler.is_compiling():
        switch = torch.backends.cuda
        on = {SDPBackend.CUDNN_ATTENTION: switch.cudnn_sdp_enabled(), SDPBackend.FLASH_ATTENTION: switch.flash_sdp_enabled(),
              SDPBackend.EFFICIENT_ATTENTION: switch.mem_efficient_sdp_enabled(), SDPBackend.MATH: switch.math_sdp_enabled()}
        order = [backend for backend in order if on[backend]]
        if not order:  # the user wants what we would not take: nothing of ours to say
            return contextlib.nullcontext()
    return sdpa_kernel(order, set_priority=True)


_plans: set[Hashable] = set()
_calls: Counter[Hashable] = Counter()


def planned(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN computes attention of this shape: on Hopper it takes about 0.6 of flash attention's time.

    It plans for every shape anew, which takes as long as hundreds of calls. Training meets few shapes; prompts of any
    length would each wait for a plan. So the first PLANS shapes of a process are planned at once, and others once they
    have been called PLAN_AFTER times. On later cards, only with as many heads of keys as of queries: with fewer, what it
    computes there has been reported wrong.
    """
    tokens, head = q.shape[2], q.shape[3]
    if tokens < SHORT or k.shape[2] < SHORT or head != v.shape[3] or head > 128 or head % 8:
        return False
    major = capability(q.device)[0]
    if torch.version.cuda is None or major < 9 or (major > 9 and q.shape[1] != k.shape[1]):
        return False
    if torch.compiler.is_compiling():
        return True
    return _worth_a_plan((q.shape, q.stride(), k.shape, k.stride(), q.dtype, q.device, torch.is_grad_enabled()))


def _worth_a_plan(shape: Hashable) -> bool:
    if shape in _plans:
        return True
    _calls[shape] += 1
    if len(_plans) < PLANS or _calls[shape] > PLAN_AFTER:
        _plans.add(shape)
        _calls.pop(shape)
        return True
    if len(_calls) > 4096:  # shapes that never come again
        _calls.clear()
    return False


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor


_said: set[str] = set()


def announce_mask(entries: int) -> None:
    """Say, once a run, that a call takes a mask over all pairs: it is slow, and quadratic in memory."""
    if not torch.compiler.is_compiling() and entries >= MASK and "mask" not in _said:
        _said.add("mask")
        log.warning("softmax attention as 'fused' makes a mask of %d million pairs; forms 'flex' (16 bits) and 'chunked' "
                    "need none", entries // 10**6)


# Rows of any length --------------------------------------------------------------------------------------------------

def varlen(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, most_q: int, most_k: int,
           window: tuple[int, int], scale: float) -> Tensor:
    """Attention within rows that stand one after the other: q [N, H, K], k and v [M, G, K] -> [N, H, K].

    starts [n + 1] int32: where each row begins; `most` its greatest length; window: tokens seen to the left and to the
    right, -1 for all, the last query standing beside the last key. No log-sum-exp: no gradient would come back through it.
    """
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {"enable_gqa": True} if SAYS_GROUPS and q.shape[1] != k.shape[1] else {}
    y: Any = varlen_attn(q, k, v, q_starts, k_starts, most_q, most_k, scale=scale, window_size=window, **more)
    return y


# Intervals of keys ---------------------------------------------------------------------------------------------------

def filled(tokens: int, stored: int) -> tuple[int, int]:
    """The sizes to which T queries and S keys are filled up for FlexAttention: a kernel is compiled for each.

    Multiples of 128 of which four lie in an octave, so that at most a fifth is filling (whose blocks are skipped); where
    keys outnumber queries they grow from call to call, and powers of two will do for them.
    """
    queries = bucket(tokens)
    return queries, queries if stored == tokens else bucket(stored, 1)


def bucket(length: int, octave: int = 4) -> int:
    """The least size >= length that is 128 times a number of `octave` steps an octave."""
    units = max(-(-length // BLOCK), 1)
    step = 1 << max((units - 1).bit_length() - octave.bit_length(), 0)
    return -(-units // step) * step * BLOCK


def blocks(first: Tensor, last: Tensor, rank: Tensor, queries: int, keys: int) -> Any:
    """The BlockMask under which query t sees key s where first[t] <= rank[s] <= last[t] ([B or 1, T or S], int32).

    Filled up to `queries` and `keys`. From the extremes of each block alone: a pair of blocks may show something if the
    hull of its intervals meets the hull of its ranks, and is seen whole if every interval holds every rank.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, last = (F.pad(x, (0, queries - x.shape[1]), value=none) for x, none in ((first, NOWHERE), (last, -1)))
    rank = F.pad(rank, (0, keys - rank.shape[1]), value=-1)
    low, high = (x.unflatten(1, (-1, block_size(queries))) for x in (first, last))
    at = rank.unflatten(1, (-1, block_size(keys)))
    least = torch.where(at < 0, NOWHERE, at).amin(-1)
    some = (low.amin(-1)[:, :, None] <= at.amax(-1)[:, None]) & (high.amax(-1)[:, :, None] >= least[:, None])
    whole = (low.amax(-1)[:, :, None] <= at.amin(-1)[:, None]) & (high.amin(-1)[:, :, None] >= at.amax(-1)[:, None])
    whole = whole & (at.amin(-1) >= 0)[:, None]
    return BlockMask.from_kv_blocks(*_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=(low.shape[-1], at.shape[-1]),
                                    mask_mod=_sees(first, last, rank), seq_lengths=(queries, keys))


def block_size(length: int) -> int:
    """Tokens a side of a block: BLOCK, and twice that as often as it takes for no more than BLOCKS of them."""
    return BLOCK << max((-(-length // BLOCK) - 1).bit_length() - (BLOCKS - 1).bit_length(), 0)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For [B, n, m] bool: how many are chosen in each row [B, 1, n], and which, these first [B, 1, n, m]."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _sees(first: Tensor, last: Tensor, rank: Tensor) -> Callable[..., Tensor]:
    """The mask_mod, for rows of their own or for one that stands for all."""
    if rank.shape[0] == 1:
        low, high, at = first[0], last[0], rank[0]
        return lambda b, h, i, j: (at[j] >= low[i]) & (at[j] <= high[i])
    return lambda b, h, i, j: (rank[b, j] >= first[b, i]) & (rank[b, j] <= last[b, i])


_masks: OrderedDict[Hashable, Any] = OrderedDict()


def remember(key: Hashable, build: Callable[[], Any]) -> Any:
    """build(), kept for calls of the same pattern and lengths; not while a graph is traced or captured."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return build()
    if key not in _masks:
        with torch.inference_mode(False):  # a later call may train
            _masks[key] = build()
        if len(_masks) > MASKS:
            _masks.popitem(last=False)
    return _masks[key]


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, shape: tuple[int, int], *, slopes: tuple[float, ...] | None,
         places: tuple[Tensor, Tensor] | None, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and log-sum-exp [B, T, H] (float32) of FlexAttention under a BlockMask for `shape` (`filled`, `blocks`).

    slopes and places [B or 1, T], [B or 1, S]: the distance bias; weight [B or 1, S]: what is added to the scores of a key.
    Heads narrower than NARROW are filled up with zeros, which changes no score.
    """
    batch, tokens = q.shape[:2]

    def fill(x: Tensor, size: int) -> Tensor:
        by = (0, max(NARROW - x.shape[3], 0), 0, 0, 0, size - x.shape[1])
        return (F.pad(x, by) if any(by) else x).transpose(1, 2)

    row = lambda x, size: F.pad(x, (0, size - x.shape[1])).expand(batch, -1).contiguous()  # noqa: E731
    streams = fill(q, shape[0]), fill(k, shape[1]), fill(v, shape[1])
    distance = None
    if slopes is not None and places is not None:
        # filled on the device: a copy from the host would wait, and cannot be part of a CUDA graph
        slope = torch.cat([q.new_full((1,), s, dtype=torch.float32) for s in slopes])
        distance = slope, row(places[0].int(), shape[0]), row(places[1].int(), shape[1])
    bias = _bias(distance, None if weight is None else row(weight, shape[1]))
    grouped = q.shape[2] != k.shape[2]
    attend = _attend
    if q.is_cuda and not torch.compiler.is_compiling():
        kind = (slopes is not None, weight is not None, mask.kv_num_blocks.shape[0] > 1)
        attend = _compiled((*(x.shape for x in streams), q.dtype, q.device, scale, kind))
    y, lse = attend(*streams, bias, mask, scale, grouped)
    return y.transpose(1, 2)[:, :tokens, :, : v.shape[3]], lse.transpose(1, 2)[:, :tokens]


def _bias(distance: tuple[Tensor, Tensor, Tensor] | None, weight: Tensor | None) -> Callable[..., Tensor] | None:
    """The score_mod: -slope |i - j| and the weight of key j, whichever there is."""
    if distance is None:
        return None if weight is None else lambda score, b, h, i, j: score + weight[b, j]
    slope, query, key = distance
    if weight is None:
        return lambda score, b, h, i, j: score - slope[h] * (query[b, i] - key[b, j]).abs()
    return lambda score, b, h, i, j: score - slope[h] * (query[b, i] - key[b, j]).abs() + weight[b, j]


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Callable | None, mask: Any, scale: float,
            grouped: bool) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    y, aux = flex_attention(q, k, v, score_mod=bias, block_mask=mask, scale=scale, enable_gqa=grouped,
                            return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return y, aux.lse


@functools.lru_cache(maxsize=256)
def _compiled(key: Hashable) -> Callable[..., tuple[Tensor, Tensor]]:
    """`_attend`, compiled for one key of shapes. Code objects carry the compiler's cache and its limit of recompilations,
    past which it would run uncompiled, T x T: so every key gets one of its own, and passing the limit is an error."""
    log.info("softmax compiles FlexAttention for %s", key)
    own = types.FunctionType(_attend.__code__.replace(co_name="_attend_compiled"), _attend.__globals__, "_attend_compiled")
    return torch.compile(own, dynamic=False, fullgraph=True)
