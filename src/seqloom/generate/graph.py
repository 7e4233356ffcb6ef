"""A step of decoding captured in a CUDA graph: hundreds of small launches become one.

A graph repeats the same kernels on the same addresses. So the state is written in place (`donate=True`), the token is copied
into a tensor that stays, and the result is copied out of one. The first step runs as any other, which compiles kernels and
takes workspaces; the second is captured and replayed, as are all others.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.core import state as st

log = logging.getLogger("seqloom.generate")
_said: set[str] = set()


def say(sentence: str, level: int = logging.INFO) -> None:
    """Log `sentence`, once in this process."""
    if sentence not in _said:
        _said.add(sentence)
        log.log(level, sentence)


class NotCaptured(RuntimeError):
    """A step could not be captured. The message says why; `ran` is its result if it ran all the same."""

    def __init__(self, why: str, ran: Tensor | None = None):
        super().__init__(why)
        self.ran = ran


class StepGraph:
    """`step(x) -> y`, which also overwrites a state's tensors in place, as a graph over fixed addresses.

    step:  what to capture: a function of x [B, ...] and the state, free of other side effects
    state: returns the pytree of tensors that a step writes in place
    model: whose parameters the graph reads; if they move, or autocast changes, the step is captured anew

    A call returns a copy of y. Raises: NotCaptured where the step cannot be captured; the state is then as before the call,
    or, where `ran` is not None, as after the step, whose result that is.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], state: Callable[[], Any], model: nn.Module):
        self.step, self.state, self.model = step, state, model
        self.captures = 0
        self.drop()

    def drop(self) -> None:
        """Forget the graph and its memory: the next step runs as it is, and the one after is captured."""
        self._graph: Any = None
        self._around: tuple | None = None        # what a graph fixes, at the last call
        self._known: Any = None                  # the state at the last call
        self._places: tuple[int, ...] = ()
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._side: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        around = self._surroundings(x)
        if around != self._around or not self._in_place():
            return self._first(x, around)
        if self._graph is None:
            self._capture(x)
        assert self._x is not None and self._y is not None
        self._x.copy_(x)
        self._graph.replay()
        return self._y.clone()

    def _surroundings(self, x: Tensor) -> tuple:
        """Shapes, where the parameters lie (as the first of them tells), and the dtype that products are made in."""
        first, kind = next(self.model.parameters()), x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return tuple(x.shape), x.dtype, first.data_ptr(), first.dtype, cast

    def _in_place(self) -> bool:
        """Whether the state lies where it did at the last call. A state that is the same value is not looked through."""
        state = self.state()
        if state is not self._known:
            if addresses(state) != self._places:
                return False
            self._known = state
        return True

    def _first(self, x: Tensor, around: tuple) -> Tensor:
        """The step as it is, on the stream that is captured next, so that its library handles have their workspaces."""
        self.drop()
        before = addresses(self.state())
        y = self._beside(x)
        if addresses(self.state()) != before:
            raise NotCaptured(MOVED, y)
        self._around, self._known, self._places = around, self.state(), before
        return y

    def _beside(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return self.step(x)
        self._side = torch.cuda.Stream(x.device)
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._side):
            y = self.step(x)
        torch.cuda.current_stream(x.device).wait_stream(self._side)
        return y.clone()  # in this stream's memory

    def _capture(self, x: Tensor) -> None:
        self._x = x.clone()
        torch.clear_autocast_cache()  # casts that were made outside the graph would be freed under it
        try:
            self._graph, self._y = capture(self.step, self._x, self._side)
        except Exception as error:  # the driver reports what cannot be captured in many ways
            self.drop()
            said = str(error).strip().splitlines()
            raise NotCaptured(f"{type(error).__name__}: {said[0] if said else 'no reason given'}") from error
        finally:
            torch.clear_autocast_cache()
        if addresses(self.state()) != self._places:
            self.drop()
            raise NotCaptured(MOVED)
        self._known = self.state()
        self.captures += 1


MOVED = "a step put the state at other addresses, which a graph cannot follow"


def capture(step: Callable[[Tensor], Tensor], x: Tensor, stream: Any) -> tuple[Any, Tensor]:
    """A graph of `step(x)`, which has not run yet, and the tensor that holds its result after a replay."""
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[x.device.index or 0]
    before, cause = generator.clone_state(), None
    # to free another graph or its memory is not allowed while one is captured, and a collector may come at any time
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                y = step(x)
            except Exception as error:
                cause = error  # leaving a capture that failed raises again and hides why
                raise
    except Exception as error:
        # a generator whose capture failed refuses every number drawn after it: give it the state it had
        generator.graphsafe_set_state(before)
        raise (cause or error) from error
    finally:
        if collects:
            gc.enable()
    return graph, y


def addresses(state: Any) -> tuple[int, ...]:
    """Where the tensors of a state lie."""
    return tuple(leaf.data_ptr() for leaf in st.leaves(state))
