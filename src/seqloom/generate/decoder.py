"""Decoding with a state: the prompt in pieces of fixed length, then one token a step, in memory that does not grow.

    decoder = Decoder(model, batch=1, capacity=4096)
    scores = decoder.read(prompt)            # [B, V]: what may follow the last token
    scores = decoder.read(next_token[:, None])
    decoder.crop(3)                          # as if the last 3 tokens had not been read
    decoder.reset()                          # as if nothing had been

On a CUDA device single tokens are read by replaying a captured graph (`generate/graph.py`), with the same numbers.

For models whose state has a constant size (every block `constant_state`) memory is independent of what was read; for
others it is that of `capacity` tokens, taken once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqloom.core import BadInput, Info
from seqloom.core import state as st
from seqloom.generate.graph import NotCaptured, StepGraph, say
from seqloom.generate.ring import Piece, Ring
from seqloom.generate.sampler import Sampler

CHUNK = 512
Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]
Stop = Sequence[int | Sequence[int]]


def constant_state(model: Any) -> bool:
    """Whether the state's size does not depend on the length."""
    return all(block.mixer.constant_state for block in model.spec.stack.blocks)


class Decoder:
    """A causal model, its state, and a ring of earlier states. `model` is a built `SequenceModel`, on any device.

    batch:    rows read side by side
    capacity: the most tokens a row will have; None lets a state that grows do so (it is then copied every step)
    chunk:    a longer call is read in pieces of this many tokens
    ring:     snapshots for `crop`; the default keeps none
    graph:    True captures the reading of single tokens in a CUDA graph, False does not, None does where it can and says in
              the log what it did

    Raises: BadInput for a model that is not causal, and for graph=True where nothing can be captured.
    """

    def __init__(self, model: Any, batch: int = 1, *, capacity: int | None = None, chunk: int = CHUNK,
                 ring: Ring | None = None, graph: bool | None = None):
        if not model.spec.stack.causal:
            raise BadInput("this model is not causal, so it cannot be decoded token by token")
        if chunk < 1:
            raise BadInput(f"chunk must be at least 1 token, found {chunk}")
        self.model, self.batch, self.capacity, self.chunk = model, batch, capacity, chunk
        self.ring = Ring(keep=0) if ring is None else ring
        self.length = 0
        self.state = model.init_state(batch, capacity)
        self.constant = constant_state(model)
        # a state that grows by being rebuilt cannot keep its addresses
        self.donate = capacity is not None or self.constant
        self.graph = self._graph(graph)

    def _graph(self, wanted: bool | None) -> StepGraph | None:
        """What captures single steps; None where that was not asked for or cannot be."""
        self.must_capture = wanted is True
        if wanted is False:
            return None
        device = next(self.model.parameters()).device.type
        why = None
        if device != "cuda":
            why = f"a CUDA graph needs a CUDA device, and the model is on {device}"
        elif not self.donate:
            why = "this model's state grows with what is read, and a graph needs it in one place: give a capacity"
        if why is None:
            return StepGraph(lambda ids: self._read(Piece(ids)), lambda: self.state, self.model)
        if wanted:
            raise BadInput(f"graph=True: {why}; graph=None decodes step by step where it must")
        say(f"decoding runs step by step: {why}")
        return None

    def reset(self) -> None:
        """Forget all that was read. The state keeps its place, and with it the captured graph."""
        self.length = 0
        self.ring.clear()
        with torch.inference_mode():
            if not self.donate:
                self.state = self.model.init_state(self.batch)
                return
            # room for tokens is not made twice: what depends on the capacity is empty slots, and those are zeros
            fresh = self.model.init_state(self.batch, min(self.capacity or 1, 1))
            for old, new in zip(st.leaves(self.state), st.leaves(fresh), strict=True):
                old.copy_(new) if old.shape == new.shape else old.zero_()

    def read(self, ids: Int[Tensor, "b t"], segments: Int[Tensor, "b t"] | None = None) -> Float[Tensor, "b v"]:
        """Scores [B, V] of the token after the last one. `segments` marks padding by 0, on the left.

        Raises: BadInput if there is nothing to read, or a row ends in padding.
        """
        if ids.shape[1] == 0:
            raise BadInput("there is nothing to read: the prompt has no tokens; give at least one")
        if segments is not None and bool((segments[:, -1] == 0).any()):
            raise BadInput("a row ends in padding, so nothing follows its last token; pad prompts on the left")
        logits = None
        with torch.inference_mode(), _evaluating(self.model):
            for piece in self._pieces(Piece(ids, segments)):
                logits = self._step(piece)
        return logits

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens. Raises: ValueError if they reach further back than the ring does."""
        if tokens == 0:
            return
        self.length, state, pieces = self.ring.back(tokens, self.length)
        self.state = st.write_back(self.state, state) if self.donate else state
        with torch.inference_mode(), _evaluating(self.model):
            for piece in pieces:
                self._step(piece)

    def _pieces(self, piece: Piece) -> Iterator[Piece]:
        at = 0
        for part in self.ring.cut(piece.length):
            for start in range(at, at + part, self.chunk):
                yield piece.slice(start, min(start + self.chunk, at + part))
            at += part

    def _step(self, piece: Piece) -> Tensor:
        if self.ring.push(self.length, self.state, piece) and self.donate:
            self.ring.renew(st.clone(self.state))  # the state's own tensors are about to be written over
        if self.graph is not None and piece.length == 1 and piece.segments is None:
            logits = self._replay(self.graph, piece)
        else:
            logits = self._read(piece)
        self.length += piece.length
        return logits

    def _replay(self, graph: StepGraph, piece: Piece) -> Tensor:
        """A single token by the captured graph."""
        if not self.constant and self.length >= (self.capacity or 0):
            # a graph cannot raise: a device-side assertion would end the process's use of the device
            raise BadInput(f"the state has room for {self.capacity} tokens a row and has read {self.length}, padding included: "
                           "a larger capacity is needed")
        captures = graph.captures
        try:
            logits = graph(piece.tokens)
        except NotCaptured as error:
            if self.must_capture:
                raise BadInput(f"graph=True: {error}; graph=None decodes step by step where it must") from error
            say(f"decoding runs step by step: {error}", logging.WARNING)
            self.graph = None
            return self._read(piece) if error.ran is None else error.ran
        if graph.captures > captures:
            say(f"decoding {self.batch} rows a step replays a captured CUDA graph")
        return logits

    def _read(self, piece: Piece) -> Tensor:
        out = self.model(piece.tokens, state=self.state, info=Info(segments=piece.segments), donate=self.donate, keep=1)
        self.state = out.state
        return out.logits[:, -1]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and with the mode put back."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def left_pad(prompts: Prompts, device: Any = None) -> tuple[Tensor, Tensor | None]:
    """Prompts as ids [B, T] and segments (None where all are equally long): pads on the left, in segment 0.

    Raises: BadInput for a prompt without tokens.
    """
    if isinstance(prompts, Tensor):
        ids = prompts if prompts.ndim == 2 else prompts[None]
        if ids.shape[1] == 0:
            raise BadInput("the prompt has no tokens; give at least one, such as the one that begins a text")
        return ids.to(device), None
    rows = [list(row) for row in ([prompts] if not prompts or isinstance(prompts[0], int) else prompts)]
    for i, row in enumerate(rows):
        if not row:
            raise BadInput(f"prompt {i} has no tokens; give at least one, such as the one that begins a text")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], dtype=torch.int64, device=device)
    if all(len(row) == longest for row in rows):
        return ids, None
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64, device=device)
    return ids, real


class Step(NamedTuple):
    """One token a row, and which rows have ended (with this token or before; a row that had ended repeats its last).

    `int(step)` is the token of a single row.
    """

    ids: Int[Tensor, " b"]
    done: Bool[Tensor, " b"]

    def __int__(self) -> int:
        return int(self.ids)


def stream(model: Any, prompts: Prompts, *, segments: Tensor | None = None, max_new_tokens: int | None = 100,
           temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
           repetition_penalty: float = 1.0, seed: int | None = None, stop: Stop = (), chunk: int = CHUNK,
           graph: bool | None = None, decoder: Decoder | None = None) -> Iterator[Step]:
    """Continue prompts, one step at a time, as they come.

    prompts:  ids [B, T], or lists of ids of any lengths
    segments: for ids [B, T] with padding: 0 at pads
    stop:     ids, or sequences of ids, that end a row
    max_new_tokens: None goes on until all rows have ended
    graph:    capture the step in a CUDA graph: see `Decoder`
    decoder:  one to use again: it is reset, and keeps its state's memory and its graph. It brings its own capacity, chunk
              and graph
    Other arguments: `Sampler`. Greedy unless a temperature is given; the same seed gives the same tokens.
    Raises: BadInput for settings out of range, an empty prompt, ids outside the vocabulary, or a model that is not causal.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise BadInput(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    given = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampler = Sampler(repetition_penalty=repetition_penalty, temperature=temperature,
                      **{name: value for name, value in given.items() if value is not None})
    device = next(model.parameters()).device
    ids, padded = left_pad(prompts, device)
    segments = padded if segments is None else segments.to(device)
    vocab = model.spec.stem.vocab
    unknown = ids[(ids < 0) | (ids >= vocab)]
    if len(unknown):
        raise BadInput(f"the prompt has token {int(unknown[0])}, and the model knows tokens 0 to {vocab - 1}")
    batch, tokens = ids.shape
    capacity = None if max_new_tokens is None else tokens + max_new_tokens
    if decoder is None:
        decoder = Decoder(model, batch, capacity=capacity, chunk=chunk, graph=graph)
    else:
        _fits(decoder, model, batch, capacity)
        decoder.reset()
    return _steps(decoder, ids, segments, sampler, max_new_tokens, seed, [_sequence(each) for each in stop])


def _fits(decoder: Decoder, model: Any, batch: int, capacity: int | None) -> None:
    """Raise BadInput unless `decoder` can read `batch` rows of `capacity` tokens with `model`."""
    if decoder.model is not model:
        raise BadInput("the decoder was made for another model; make one with Decoder(model, ...)")
    if decoder.batch != batch:
        raise BadInput(f"the decoder reads {decoder.batch} rows side by side, and there are {batch} prompts")
    if not decoder.constant and decoder.capacity is not None and (capacity is None or capacity > decoder.capacity):
        wanted = "an open number of" if capacity is None else capacity
        raise BadInput(f"the decoder has room for {decoder.capacity} tokens a row, and this asks for {wanted}")


def _sequence(stop: int | Sequence[int]) -> list[int]:
    sequence = [stop] if isinstance(stop, int) else list(stop)
    if not sequence:
        raise BadInput("a stop sequence must have at least one token")
    return sequence


def _steps(decoder: Decoder, ids: Tensor, segments: Tensor | None, sampler: Sampler, max_new_tokens: int | None,
           seed: int | None, stops: list[list[int]]) -> Iterator[Step]:
    batch, device = ids.shape[0], ids.device
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    logits = decoder.read(ids, segments)
    seen = None
    if sampler.repetition_penalty != 1:
        real = torch.ones_like(ids, dtype=torch.bool) if segments is None else segments != 0
        counts = torch.zeros(batch, logits.shape[-1], dtype=torch.int64, device=device).scatter_add_(1, ids, real.long())
        seen = counts > 0
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    # the last tokens of each row, as many as the longest stop sequence has; -1 matches none
    tail = torch.full((batch, max(map(len, stops), default=1)), -1, dtype=torch.int64, device=device)
    made = 0
    while True:
        drawn = sampler.draw(logits, seen, generator)
        drawn = torch.where(done, tail[:, -1], drawn)
        tail = torch.cat([tail[:, 1:], drawn[:, None]], 1)
        for sequence in stops:
            done = done | (tail[:, -len(sequence) :] == tail.new_tensor(sequence)).all(1)
        made += 1
        yield Step(drawn, done)
        # looking at `done` waits for the device; without a stop sequence no row ends
        if made == max_new_tokens or (stops and bool(done.all())):
            return
        if seen is not None:
            seen = seen.scatter(1, drawn[:, None], True)
        logits = decoder.read(drawn[:, None])


def generate(model: Any, prompts: Prompts, *, callback: Callable[[Step], None] | None = None,
             **settings: Any) -> list[list[int]]:
    """Continue prompts and return the new tokens of each row, its stop tokens included.

    `callback` sees each step as it comes; the other settings are those of `stream`.
    """
    if callback is None and not settings.get("stop"):
        # no one looks at a token before the end, so the device need not be waited for
        return torch.stack([step.ids for step in stream(model, prompts, **settings)], 1).tolist()
    rows: list[list[int]] = []
    ended: list[bool] = []
    for step in stream(model, prompts, **settings):
        if callback is not None:
            callback(step)
        values = step.ids.tolist()
        rows = rows or [[] for _ in values]
        ended = ended or [False] * len(values)
        for row, value, over in zip(rows, values, ended, strict=True):
            if not over:
                row.append(value)
        ended = step.done.tolist()
    return rows
