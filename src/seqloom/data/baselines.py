"""Honest baselines in bits per byte on the same held-out bytes: entropy of bytes, a trigram, gzip and xz."""

from __future__ import annotations

import gzip
import lzma

import numpy as np


def unigram(train: bytes, held: bytes) -> float:
    """Cross-entropy of the held-out bytes under the training bytes' frequencies (add one)."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(held, np.uint8)].mean())


def trigram(train: bytes, held: bytes, *, tuning: float = 0.05) -> float:
    """An interpolated byte trigram: p = sum_n w_n p_n over orders 0 to 3, with p_n(x | c) the share of x after c.

    Counts come from the training bytes but for a last share `tuning`, on which the weights are fitted (by expectation
    maximisation, one set per bucket of how often the context was seen).
    """
    cut = int(len(train) * (1 - tuning))
    body, slice_ = np.frombuffer(train[:cut], np.uint8), np.frombuffer(train[cut:], np.uint8)
    tables = _tables(body)
    probabilities, buckets = _orders(tables, slice_)
    weights = np.full((buckets.max() + 8, 4), 0.25)
    for _ in range(20):
        share = weights[buckets] * probabilities
        share /= share.sum(1, keepdims=True)
        for bucket in np.unique(buckets):
            weights[bucket] = share[buckets == bucket].mean(0) + 1e-6
        weights /= weights.sum(1, keepdims=True)
    probabilities, buckets = _orders(tables, np.frombuffer(held, np.uint8))
    return float(-np.log2((weights[buckets] * probabilities).sum(1)).mean())


def _tables(body: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = body.astype(np.int64)
    one = np.bincount(ids, minlength=256)
    two = np.bincount(ids[:-1] * 256 + ids[1:], minlength=256**2).reshape(256, 256)
    three = np.bincount((ids[:-2] * 256 + ids[1:-1]) * 256 + ids[2:], minlength=256**3).reshape(256**2, 256)
    return one, two, three


def _orders(tables: tuple[np.ndarray, np.ndarray, np.ndarray], text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each byte by order (uniform, one, two, three), and the bucket of its two-byte context's count."""
    one, two, three = tables
    ids = np.concatenate([[10, 10], text.astype(np.int64)])
    a, b, x = ids[:-2], ids[1:-1], ids[2:]
    context = a * 256 + b
    seen2, seen3 = two.sum(1)[b], three.sum(1)[context]
    with np.errstate(divide="ignore", invalid="ignore"):
        p2 = np.where(seen2 > 0, two[b, x] / seen2, one[x] / one.sum())
        p3 = np.where(seen3 > 0, three[context, x] / seen3, p2)
    probabilities = np.stack([np.full(len(x), 1 / 256), one[x] / one.sum(), p2, p3], 1)
    return probabilities, np.minimum(np.log2(seen3 + 1).astype(int), 20)


def compressors(held: bytes) -> dict[str, float]:
    """Bits per byte of the concatenated held-out files under gzip -9 and xz."""
    return {"gzip -9": 8 * len(gzip.compress(held, 9)) / len(held), "xz": 8 * len(lzma.compress(held)) / len(held)}
