"""Token ids on disk, and batches as a pure function of (seed, step).

Documents are tokenised once, each after a start token, into memory-mapped arrays: data larger than memory streams. A start
token also closes the document before it, so that where a document ends is learnt, from that document alone. What is on disk
is found again by what it was made from, and is checked by a digest of its text, so that a resumed run reads the same tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from seqloom.core import BadInput, FailedRun
from seqloom.data import chat
from seqloom.data import tokenizer as tok
from seqloom.data.documents import Document, documents, files_of, split

BLOCK = 2**22  # characters tokenised at a time
LEARN = 2**26  # bytes of training documents that a tokenizer is learnt from, at most
IGNORE = -100
FACTS = "facts.json"
TEMPLATE = "chat_template.jinja"
VERSION = 2  # of the files below


class TextBatch(NamedTuple):
    """ids and targets [B, T] (IGNORE where nothing is asked), segments [B, T] or None where all tokens are of one document."""

    ids: Tensor
    targets: Tensor
    segments: Tensor | None


@dataclass(frozen=True)
class Tokens:
    """One side of the split: the documents' tokens one after the other, each document after a start token.

    learnt: False at tokens that are only read; None where all are learnt. starts: where each document begins. closes: whether
    the start token after a document is learnt, as its end. size: UTF-8 bytes of what is learnt.
    """

    ids: np.ndarray
    learnt: np.ndarray | None
    starts: np.ndarray
    closes: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def documents(self) -> int:
        return len(self.starts)


class Stream:
    """Documents `order` of `tokens` (all of them, as stored, when None) as one sequence, closed by a last start token."""

    def __init__(self, tokens: Tokens, start: int, order: np.ndarray | None = None):
        self.tokens, self.start = tokens, start
        self.order = np.arange(len(tokens.starts)) if order is None else order
        lengths = np.diff(tokens.starts, append=len(tokens.ids))[self.order]
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self.ends[-1]) + 1 if len(self.ends) else 1

    def window(self, begin: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens begin .. begin + size: ids, whether each is learnt, and the place of its document in the order. All [size]."""
        ids = np.full(size, self.start, np.int64)
        learnt = np.ones(size, bool)
        number = np.full(size, len(self.order), np.int64)
        place, done = int(np.searchsorted(self.ends, begin, side="right")), 0
        while done < size and place < len(self.order):
            document, end = self.order[place], int(self.ends[place])
            here = begin + done
            take = min(size - done, end - here)
            # where the document is stored: counted from its end in the stream
            last = int(self.tokens.starts[document + 1]) if document + 1 < len(self.tokens.starts) else len(self.tokens.ids)
            source = slice(last - (end - here), last - (end - here) + take)
            into = slice(done, done + take)
            ids[into] = self.tokens.ids[source]
            if self.tokens.learnt is not None:
                learnt[into] = self.tokens.learnt[source]
            number[into] = place
            done, place = done + take, place + 1
        # a start token is learnt as the end of the document before it in this order
        first = np.flatnonzero(np.diff(number)) + 1
        learnt[first] = self.tokens.closes[self.order[number[first] - 1]]
        return ids, learnt, number


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, and the tokens of the training and the held-out documents. Made by `prepare`."""

    tokenizer: Tokenizer
    train: Tokens
    held: Tokens
    folder: Path
    digest: str = ""
    template: str | None = None
    _epochs: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def vocab(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def start(self) -> int:
        return tok.start(self.tokenizer)

    def windows(self, context: int) -> int:
        """Windows of `context` tokens in an epoch. Raises: BadInput if there is none."""
        found = len(self.train) // context
        if found < 1:
            raise BadInput(f"a context of {context} tokens is longer than the training data ({len(self.train)} tokens)")
        return found

    def batch(self, step: int, *, seed: int, batch: int, context: int, reset: bool = True) -> TextBatch:
        """Rows of optimiser step `step` (from 0), each a window of the training documents in an order of their own per epoch.

        Windows are of `context` tokens and do not overlap; documents that share one are told apart by `segments`. With
        reset=False they are not, and a document sees what stands before it in the window.
        """
        windows = self.windows(context)
        rows = []
        for index in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(index, windows)
            stream, order, phase = self._epoch(seed, epoch, windows, context)
            rows.append(stream.window(int(order[place]) * context + phase, context + 1))
        ids, learnt, number = map(np.stack, zip(*rows, strict=True))
        return _batch(ids, learnt, number if reset else None)

    def _epoch(self, seed: int, epoch: int, windows: int, context: int) -> tuple[Stream, np.ndarray, int]:
        """Order of the documents, order of the windows, and their common offset, in an epoch; the last two are remembered."""
        key = (seed, epoch, context)
        if key not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            draw = np.random.Generator(np.random.PCG64([seed, epoch]))
            stream = Stream(self.train, self.start, draw.permutation(len(self.train.starts)))
            phase = int(draw.integers(len(self.train) - windows * context + 1))
            self._epochs[key] = stream, draw.permutation(windows), phase
        return self._epochs[key]

    def held_windows(self, *, rows: int, context: int, overlap: int = 0) -> Iterator[TextBatch]:
        """The held-out documents in windows of `context` tokens that each begin anew; every token is asked exactly once.

        With `overlap`, windows share that many tokens, which the later one only reads: every token but the first few of a
        document then sees at least `overlap` tokens of its document before it. Costs context / (context - overlap) times more.
        """
        if not 0 <= overlap < context:
            raise BadInput(f"an overlap of {overlap} tokens does not fit into a context of {context}")
        stream, hop = Stream(self.held, self.start), context - overlap
        found = []
        for begin in range(0, len(stream) - 1, hop):
            left = max(begin - overlap, 0)
            ids, learnt, number = stream.window(left, min(begin + hop + 1, len(stream)) - left)
            learnt[1 : begin - left + 1] = False
            found.append((ids, learnt, number))
            if len(found) == rows:
                yield _padded(found)
                found = []
        if found:
            yield _padded(found)

    def held_strips(self, *, rows: int, context: int) -> Iterator[TextBatch]:
        """The held-out documents dealt to `rows` rows of near-equal length, window by window: the state of a row is carried
        from one window to the next, so that every token is asked exactly once and may see all of its document before it."""
        lengths = np.diff(self.held.starts, append=len(self.held))
        rows = max(min(rows, len(lengths)), 1)
        load = [(0, row) for row in range(rows)]
        dealt: list[list[int]] = [[] for _ in range(rows)]
        for document in np.argsort(-lengths, kind="stable"):
            length, row = heapq.heappop(load)
            dealt[row].append(int(document))
            heapq.heappush(load, (length + int(lengths[document]), row))
        streams = [Stream(self.held, self.start, np.array(mine, np.int64)) for mine in dealt]
        for begin in range(0, max(map(len, streams)) - 1, context):
            yield _padded([s.window(begin, max(min(context + 1, len(s) - begin), 0)) for s in streams], always=True)

    def text(self, side: str) -> bytes:
        """The documents of "train" or "held", one after the other, as UTF-8: for baselines on the same bytes."""
        tokens: Tokens = getattr(self, side)
        ends = np.append(tokens.starts[1:], len(tokens))
        texts = (tokens.ids[begin + 1 : end].tolist() for begin, end in zip(tokens.starts, ends, strict=True))
        return "".join(self.tokenizer.decode(ids, skip_special_tokens=False) for ids in texts).encode()

    def scored_whole(self) -> Corpus:
        """The same with everything held out: for scoring a model on data it was not trained on."""
        return replace(self, held=self.train)


def _batch(ids: np.ndarray, learnt: np.ndarray, number: np.ndarray | None) -> TextBatch:
    """Rows of T + 1 tokens as inputs and the targets one ahead of them."""
    targets = np.where(learnt[:, 1:], ids[:, 1:], IGNORE)
    segments = None
    if number is not None and (number[:, :-1] != number[:, :1]).any():
        segments = torch.from_numpy(number[:, :-1] - number[:, :1] + 1)
    return TextBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), segments)


def _padded(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], *, always: bool = False) -> TextBatch:
    """Rows of different lengths, padded on the right with segment 0. With `always`, segments are given, numbered by
    document."""
    width = max(len(row[0]) for row in rows) - 1
    ids, targets, segments = np.zeros((3, len(rows), width), np.int64)
    targets[:] = IGNORE
    for row, (found, learnt, number) in enumerate(rows):
        size = max(len(found) - 1, 0)
        ids[row, :size] = found[:-1]
        targets[row, :size] = np.where(learnt[1:], found[1:], IGNORE)
        segments[row, :size] = number[:-1] + 1
    plain = not always and (segments == segments[:, :1]).all()
    return TextBatch(torch.from_numpy(ids), torch.from_numpy(targets), None if plain else torch.from_numpy(segments))


# Made once, found again -------------------------------------------------------------------------------------------


def prepare(source: str, folder: Path, *, column: str | None = None, vocab: int = 4096, share: float = 0.05,
            tokenizer: Tokenizer | None = None, template: str | None = None,
            say: Callable[[str], None] = lambda text: None) -> Corpus:
    """The corpus of `source` (see `documents`), tokenised into a sub-folder of `folder` unless it is there already.

    The tokenizer is learnt from the training documents unless one is given. Nothing half-written is ever found: the
    sub-folder appears whole, by a rename.
    Raises: BadInput for a source that cannot be read, FailedRun if the tokens cannot be written.
    """
    key = {"source": source, "column": column, "vocab": None if tokenizer else vocab, "share": share, "version": VERSION,
           "tokenizer": _sha(tokenizer.to_str()) if tokenizer else None, "template": template, "files": _fingerprint(source)}
    place = folder / _sha(json.dumps(key, sort_keys=True))[:16]
    if not complete(place):
        _build(place, source, column, vocab, share, tokenizer, template, say)
    return open_corpus(place)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(source: str) -> list:
    """Names, sizes and times of what would be read, so that changed files are read anew."""
    if source == "stdlib":
        import sys

        return [sys.version]
    path = Path(source)
    if source.startswith("hf:") or not path.exists():
        return []
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files_of(path)]


def _build(place: Path, source: str, column: str | None, vocab: int, share: float, tokenizer: Tokenizer | None,
           template: str | None, say: Callable[[str], None]) -> None:
    read = lambda: documents(source, column=column, template=template)  # noqa: E731
    digests, sizes, chats = [], [], False
    for document in read():  # reads all once: errors come first
        digests.append(document.digest())
        sizes.append(len(document.text.encode()))
        chats |= document.chat
    if not sizes:
        raise BadInput(f"{source} holds no documents with text")
    digest, size = np.array(digests, np.uint64), np.array(sizes, np.int64)
    del digests, sizes
    held = split(digest, size, share)
    content = hashlib.sha256(digest.tobytes()).hexdigest()
    if tokenizer is None:
        say(f"{len(size):,} documents, {size.sum():,} bytes; learning a vocabulary of {vocab:,}")
        pick = _sample(digest, np.where(held, 0, size))
        tokenizer = tok.learn((document.text for document, mine in zip(read(), pick, strict=False) if mine), vocab=vocab)
    start = tok.start(tokenizer)
    draft = place.with_name(f".{place.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        draft.mkdir(parents=True)
        kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        with contextlib.ExitStack() as stack:
            sides = [stack.enter_context(_Side(draft, name, kind)) for name in ("train", "held")]
            seen = hashlib.sha256()
            for block in _blocks(read()):
                for document in block:
                    seen.update(np.uint64(document.digest()).tobytes())
                count = sum(side.documents for side in sides)
                where = held[count : count + len(block)]
                codes = _encode(tokenizer, [text for document in block for text, _ in document.parts if text is not None])
                if len(where) == len(block):
                    for document, mine in zip(block, where, strict=True):
                        sides[int(mine)].add(document, codes, start)
        if seen.hexdigest() != content:
            raise FailedRun(f"{source} changed while it was read")
        tok.save(tokenizer, draft)
        if template or chats:
            (draft / TEMPLATE).write_text(template or chat.PLAIN, encoding="utf-8")
        facts = {"digest": content, "held": share, "sides": {side.name: side.facts() for side in sides}}
        facts["files"] = {path.name: path.stat().st_size for path in draft.iterdir()}
        (draft / FACTS).write_text(json.dumps(facts))
        shutil.rmtree(place, ignore_errors=True)  # incomplete
        draft.rename(place)
    except OSError as error:
        raise FailedRun(f"the tokens of {source} cannot be written to {place.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sample(digest: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Which documents a tokenizer is learnt from: those with text, in the order of their digests from above, up to LEARN
    bytes."""
    order = np.argsort(digest, kind="stable")[::-1]
    pick = np.zeros(len(size), bool)
    before = np.cumsum(size[order]) - size[order]
    pick[order[(before < LEARN) & (size[order] > 0)]] = True
    return pick


def _blocks(found: Iterator[Document]) -> Iterator[list[Document]]:
    block, size = [], 0
    for document in found:
        block.append(document)
        size += len(document.text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text. What looks like a special token in a text is text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return iter([code.ids for code in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
    finally:
        tokenizer.encode_special_tokens = before


class _Side:
    """<name>.ids.npy, .starts.npy, .closes.npy, and .learnt.npy where some parts are only read, appended to as documents
    come."""

    def __init__(self, folder: Path, name: str, kind: type):
        self.folder, self.name = folder, name
        self.kinds = {"ids": np.dtype(kind), "learnt": np.dtype(bool), "starts": np.dtype(np.int64), "closes": np.dtype(bool)}
        self.files: dict[str, BinaryIO] = {}
        self.counts = dict.fromkeys(self.kinds, 0)
        self.size, self.masked = 0, False

    @property
    def documents(self) -> int:
        return self.counts["starts"]

    def __enter__(self) -> _Side:
        for part in self.kinds:
            self.files[part] = (self.folder / f"{self.name}.{part}.npy").open("wb")
            self._header(part)
        return self

    def __exit__(self, *failure: Any) -> None:
        for part, file in self.files.items():
            file.seek(0)
            self._header(part)
            file.close()
        if not self.masked:
            (self.folder / f"{self.name}.learnt.npy").unlink()

    def _header(self, part: str) -> None:
        # numpy leaves room for the first axis to grow, so that the header written last is as long as the first one
        shape = {"descr": np.lib.format.dtype_to_descr(self.kinds[part]), "fortran_order": False, "shape": (self.counts[part],)}
        np.lib.format.write_array_header_1_0(self.files[part], shape)

    def add(self, document: Document, codes: Iterator[list[int]], start: int) -> None:
        self._append("starts", [self.counts["ids"]])
        self._append("ids", [start])
        self._append("learnt", [True])
        for text, wanted in document.parts:
            code = [start] if text is None else next(codes)
            self._append("ids", code)
            self._append("learnt", np.full(len(code), wanted))
            self.masked |= not wanted
            self.size += len(text.encode()) if wanted and text is not None else 0
        last, wanted = document.parts[-1]
        self._append("closes", [document.ends and wanted and last is not None])

    def _append(self, part: str, values: Any) -> None:
        self.files[part].write(np.asarray(values, self.kinds[part]).tobytes())
        self.counts[part] += len(values)

    def facts(self) -> dict:
        return {"bytes": self.size, "documents": self.documents, "tokens": self.counts["ids"]}


def complete(place: Path) -> bool:
    """Whether a folder holds a whole corpus: every file that its facts list, at its size."""
    try:
        facts = json.loads((place / FACTS).read_text())
        return all((place / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def open_corpus(place: Path) -> Corpus:
    """The corpus in a folder made by `prepare`. Raises: BadInput if it is not whole."""
    if not complete(place):
        raise BadInput(f"{place} holds no whole corpus")
    facts = json.loads((place / FACTS).read_text())

    def array(name: str) -> np.ndarray:
        path = place / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an empty array cannot be mapped
            return np.load(path, allow_pickle=False)

    def side(name: str) -> Tokens:
        learnt = array(f"{name}.learnt") if f"{name}.learnt.npy" in facts["files"] else None
        ids, starts, closes = (array(f"{name}.{part}") for part in ("ids", "starts", "closes"))
        return Tokens(ids, learnt, starts, closes, facts["sides"][name]["bytes"])

    template = (place / TEMPLATE).read_text(encoding="utf-8") if (place / TEMPLATE).is_file() else None
    return Corpus(tok.load(place), side("train"), side("held"), place, facts["digest"], template)
