"""Honest baselines in bits per byte on the same held-out bytes: entropy of bytes, a trigram, gzip and xz."""

from __future__ import annotations

import gzip
import lzma

import numpy as np

ORDERS = 4  # uniform, one byte, two, three


def unigram(train: bytes, held: bytes) -> float:
    """Cross-entropy of the held-out bytes under the training bytes' frequencies (add one)."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    return float(-np.log2(counts / counts.sum())[np.frombuffer(held, np.uint8)].mean())


def trigram(train: bytes, held: bytes, *, tuning: float = 0.05) -> float:
    """An interpolated byte trigram: p(x | a b) = sum_n w_n p_n, with p_n the share of x after the last n bytes, n = 0 to 2, and
    a uniform term.

    The weights, one set per bucket of how often the context a b was seen, are fitted by expectation maximisation on a last
    share `tuning` of the training bytes with counts from the rest; then the counts are taken from all training bytes.
    """
    text, asked = np.frombuffer(train, np.uint8), np.frombuffer(held, np.uint8)
    cut = int(len(text) * (1 - tuning))
    probabilities, buckets = _orders(_tables(text[:cut]), text[cut:])
    weights = np.full((32, ORDERS), 1 / ORDERS)
    for _ in range(20):
        share = weights[buckets] * probabilities
        share /= share.sum(1, keepdims=True)
        sums = np.stack([np.bincount(buckets, share[:, n], minlength=len(weights)) for n in range(ORDERS)], 1)
        weights = (sums + 1e-3) / (sums + 1e-3).sum(1, keepdims=True)
    probabilities, buckets = _orders(_tables(text), asked)
    return float(-np.log2((weights[buckets] * probabilities).sum(1)).mean())


def _tables(text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = text.astype(np.int64)
    one = np.bincount(ids, minlength=256)
    two = np.bincount(ids[:-1] * 256 + ids[1:], minlength=256**2).reshape(256, 256)
    three = np.bincount((ids[:-2] * 256 + ids[1:-1]) * 256 + ids[2:], minlength=256**3).reshape(256**2, 256)
    return one, two, three


def _orders(tables: tuple[np.ndarray, np.ndarray, np.ndarray], text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of each byte by order (an unseen context falls back to the order below), and its bucket: log2 of the count of
    its two-byte context. The text is read as if two line ends stood before it."""
    one, two, three = tables
    ids = np.concatenate([[10, 10], text.astype(np.int64)])
    a, b, x = ids[:-2], ids[1:-1], ids[2:]
    context = a * 256 + b
    seen2, seen3 = two.sum(1)[b], three.sum(1)[context]
    p1 = one[x] / one.sum()
    p2 = np.where(seen2 > 0, two[b, x] / np.maximum(seen2, 1), p1)
    p3 = np.where(seen3 > 0, three[context, x] / np.maximum(seen3, 1), p2)
    return np.stack([np.full(len(x), 1 / 256), p1, p2, p3], 1), np.log2(seen3 + 1).astype(np.int64)


def compressors(held: bytes) -> dict[str, float]:
    """Bits per byte of the concatenated held-out documents under gzip -9 and xz."""
    return {"gzip -9": 8 * len(gzip.compress(held, 9)) / len(held), "xz": 8 * len(lzma.compress(held)) / len(held)}
