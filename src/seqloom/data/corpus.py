"""Token ids on disk, and batches as a pure function of (seed, step).

Documents are tokenised once, each after a start token, into memory-mapped arrays: data larger than memory streams. What is
on disk is found again by a digest of its source, so that a resumed run reads the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from seqloom.core import BadInput
from seqloom.data import tokenizer as tok
from seqloom.data.documents import Document, documents, held_out

BLOCK = 256  # documents tokenised at a time


class TextBatch(NamedTuple):
    """ids and targets [B, T] (IGNORE where nothing is asked), segments [B, T] or None where no document begins inside."""

    ids: Tensor
    targets: Tensor
    segments: Tensor | None


IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """One side of the split. `learnt` is False at tokens that are only read; `size` is the number of UTF-8 bytes."""

    ids: np.ndarray
    learnt: np.ndarray | None
    size: int
    documents: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    train: Tokens
    held: Tokens
    folder: Path

    @property
    def vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    def batch(self, step: int, *, seed: int, batch: int, context: int, reset: bool = True) -> TextBatch:
        """Rows of optimiser step `step` (from 0): windows of the training tokens in the order that `seed` gives the epoch."""
        windows = self.windows(context)
        first = step * batch
        rows = [self._window(first + i, windows, seed, context) for i in range(batch)]
        ids = np.stack([self.train.ids[start : start + context + 1] for start in rows]).astype(np.int64)
        learnt = None
        if self.train.learnt is not None:
            learnt = np.stack([self.train.learnt[start : start + context + 1] for start in rows])
        return _batch(ids, learnt, reset, self._start)

    def windows(self, context: int) -> int:
        found = (len(self.train) - 1) // context
        if found < 1:
            raise BadInput(f"a context of {context} tokens is longer than the training data ({len(self.train)} tokens)")
        return found

    def _window(self, index: int, windows: int, seed: int, context: int) -> int:
        epoch, place = divmod(index, windows)
        order, phase = _epoch(seed, epoch, windows, len(self.train) - 1 - windows * context)
        return int(order[place]) * context + phase

    def held_strips(self, *, strips: int, context: int) -> Iterator[TextBatch]:
        """The held-out tokens as `strips` contiguous rows, window by window: each token is asked exactly once, and a
        state may be carried from one window to the next."""
        total = len(self.held) - 1
        strips = max(min(strips, total // context), 1)
        edges = np.linspace(0, total, strips + 1).astype(int)
        width = int(np.diff(edges).max())
        held = np.asarray(self.held.ids).astype(np.int64)  # IGNORE does not fit the stored type
        number = np.cumsum(held == self._start) + 1
        for begin in range(0, width, context):
            stop = min(begin + context, width)
            ids = np.zeros((strips, stop - begin), np.int64)
            targets = np.full_like(ids, IGNORE)
            segments = np.zeros_like(ids)
            for row in range(strips):
                left, right = edges[row] + begin, min(edges[row] + stop, edges[row + 1])
                if right <= left:
                    continue
                here, ahead = slice(left, right), slice(left + 1, right + 1)
                ids[row, : right - left] = held[here]
                segments[row, : right - left] = number[here]
                same = number[ahead] == number[here]
                learnt = True if self.held.learnt is None else self.held.learnt[ahead]
                targets[row, : right - left] = np.where(same & learnt, held[ahead], IGNORE)
            yield TextBatch(*map(torch.from_numpy, (ids, targets, segments)))

    def scored_whole(self) -> Corpus:
        """The same with everything held out: for scoring a model on data it was not trained on."""
        return replace(self, held=self.train)

    @property
    def _start(self) -> int:
        return self.tokenizer.token_to_id(tok.START)


_orders: dict[tuple, tuple[np.ndarray, int]] = {}


def _epoch(seed: int, epoch: int, windows: int, slack: int) -> tuple[np.ndarray, int]:
    """Order of the windows and their common offset in an epoch; remembered for the last two."""
    key = (seed, epoch, windows, slack)
    if key not in _orders:
        make = np.random.Generator(np.random.PCG64([seed, epoch]))
        while len(_orders) > 1:
            _orders.pop(next(iter(_orders)))
        _orders[key] = make.permutation(windows), int(make.integers(slack + 1))
    return _orders[key]


def _batch(ids: np.ndarray, learnt: np.ndarray | None, reset: bool, start: int) -> TextBatch:
    begins = ids == start
    targets = np.where(begins[:, 1:], IGNORE, ids[:, 1:])  # a document is not predicted from the one before
    if learnt is not None:
        targets = np.where(learnt[:, 1:], targets, IGNORE)
    segments = None
    if reset and begins[:, 1:-1].any():
        segments = torch.from_numpy(np.cumsum(begins[:, :-1], 1) - begins[:, :1] + 1)
    return TextBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), segments)


def prepare(source: str, folder: Path, *, column: str | None = None, vocab: int = 4096, share: float = 0.05,
            tokenizer: Tokenizer | None = None) -> Corpus:
    """Tokenise `source` into `folder` (or find it there), holding out about `share` of its documents.

    The tokenizer is learnt from the training documents unless one is given. Nothing half-written is ever found: the
    folder appears whole, by a rename.
    """
    key = {"source": source, "column": column, "vocab": None if tokenizer else vocab, "share": share, "version": 1,
           "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest() if tokenizer else None,
           "state": _fingerprint(source)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / digest
    if not place.is_dir():
        _build(place, source, column, vocab, share, tokenizer)
    return _open(place)


def _fingerprint(source: str) -> list:
    """Names, sizes and times of what would be read, so that changed files are read anew."""
    path = Path(source)
    if source == "stdlib" or source.startswith("hf:") or not path.exists():
        return [source]
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()]


def _build(place: Path, source: str, column: str | None, vocab: int, share: float, tokenizer: Tokenizer | None) -> None:
    sizes: dict[str, int] = {}
    for document in documents(source, column=column):  # reads all once: errors come first
        if document.name in sizes:
            raise BadInput(f"{source} has two documents called {document.name}")
        sizes[document.name] = len(document.text.encode())
    if not sizes:
        raise BadInput(f"{source} holds no documents with text")
    held = held_out(sizes, share)
    if tokenizer is None:
        tokenizer = tok.learn((d.text for d in documents(source, column=column) if d.name not in held), vocab=vocab)
    draft = place.with_name(f"{place.name}.draft-{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        facts = {}
        for side, chosen in (("train", lambda name: name not in held), ("held", lambda name: name in held)):
            found = (d for d in documents(source, column=column) if chosen(d.name))
            facts[side] = _write(draft, side, found, tokenizer)
        tok.save(tokenizer, draft)
        (draft / "facts.json").write_text(json.dumps(facts))
        draft.rename(place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write(folder: Path, side: str, found: Iterator[Document], tokenizer: Tokenizer) -> dict:
    """Raw arrays <side>.ids (and <side>.learnt where some parts are only read), appended block by block."""
    kind = np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.uint32
    start = tokenizer.token_to_id(tok.START)
    size = count = 0
    masked = False
    with (folder / f"{side}.ids").open("wb") as ids_file, (folder / f"{side}.learnt").open("wb") as learnt_file:
        block: list[Document] = []

        def flush() -> None:
            nonlocal masked
            parts = [(text, learnt) for document in block for text, learnt in document.parts]
            codes = iter(tokenizer.encode_batch([text for text, _ in parts], add_special_tokens=False))
            for document in block:
                ids, learnt = [start], [True]
                for _, wanted in document.parts:
                    code = next(codes).ids
                    ids += code
                    learnt += [wanted] * len(code)
                    masked |= not wanted
                np.asarray(ids, kind).tofile(ids_file)
                np.asarray(learnt, bool).tofile(learnt_file)
            block.clear()

        for document in found:
            block.append(document)
            count += 1
            size += sum(len(text.encode()) for text, wanted in document.parts if wanted)
            if len(block) == BLOCK:
                flush()
        if block:
            flush()
    if not masked:
        (folder / f"{side}.learnt").unlink()
    return {"dtype": np.dtype(kind).name, "bytes": size, "documents": count}


def _open(place: Path) -> Corpus:
    facts = json.loads((place / "facts.json").read_text())

    def side(name: str) -> Tokens:
        path, mask = place / f"{name}.ids", place / f"{name}.learnt"
        dtype = facts[name]["dtype"]
        ids = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        learnt = np.memmap(mask, bool, "r") if mask.exists() else None
        return Tokens(ids, learnt, facts[name]["bytes"], facts[name]["documents"])

    return Corpus(tok.load(place), side("train"), side("held"), place)
