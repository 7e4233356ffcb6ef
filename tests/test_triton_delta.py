"""The fused delta-rule scan, by Triton's interpreter on the CPU: against the chunked form in float64, and through compilers.

The interpreter has to be asked for before anything is imported, and would offer fused forms to every other test: the checks
run once, in a process of their own, which prints what it found.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from interpreted import pattern, report_of, run_checks
from torch import Tensor
from torch.nn import functional as F

from seqloom.core.segments import Segments, Track, resolve
from seqloom.kernels import delta_scan

EDGES = (3, 4, 30, 63, 64, 65, 127, 128)  # at and beside those of chunks, tiles or programs

# tokens, key, value, decay, segments with NaN at pads, first state, steps a token
CASES = {
    "one_token": (1, 16, 16, False, False, False, 1),
    "short": (5, 16, 20, True, False, False, 1),
    "one_chunk": (64, 32, 16, False, True, True, 1),
    "plain": (130, 24, 48, False, False, True, 1),
    "packed": (130, 16, 24, True, True, True, 1),
    "wide": (70, 80, 16, True, False, True, 1),
    "steps": (40, 16, 16, True, True, False, 2),
}


def streams(tokens: int, key: int, value: int, decay: bool, steps: int = 1, batch: int = 2, heads: int = 1) -> list[Tensor]:
    """q, k, v, beta in (0, 2) and, if asked, log decays from mild to violent, one kind a row."""
    long = (batch, tokens) if steps == 1 else (batch, tokens, steps)
    q = torch.randn(batch, tokens, heads, key).double() * key**-0.5
    k, v = F.normalize(torch.randn(*long, heads, key) + 0.3, dim=-1).double(), torch.randn(*long, heads, value).double()
    log_a = -torch.rand(batch, tokens, heads).double() * torch.tensor([0.05, 3.0])[:batch, None, None]
    return [q, k, v, 2 * torch.rand(*long, heads).double()] + [log_a] * decay


def everything(form, inputs: list[Tensor], state: Tensor | None, segments: Segments | None, dtype: torch.dtype) -> list[Tensor]:
    """y, the final state and the gradients of all streams and of the state, under fixed random cotangents."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
    start = None if state is None else state.to(wide).clone().requires_grad_()
    y, new, _ = form(*leaves, state=start, segments=segments)
    draw = torch.Generator().manual_seed(1)
    weigh = lambda x: (x * torch.randn(x.shape, generator=draw).to(x.dtype)).sum()  # noqa: E731
    return [y, new, *torch.autograd.grad(weigh(y) + weigh(new), leaves + [start] * (start is not None))]


def furthest(found: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error; one that is not a number counts as 1e9."""
    errors = ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-3) for x, y in zip(found, want, strict=True))
    return max(torch.nan_to_num(error, nan=1e9).item() for error in errors)


def case(tokens: int, key: int, value: int, decay: bool, packed: bool, first: bool, steps: int) -> float:
    inputs = [x.float().double() for x in streams(tokens, key, value, decay, steps)]
    segments = pattern(tokens, *EDGES) if packed else None
    state = torch.randn(2, 1, key, value).double() if first else None
    if segments is not None:
        inputs = [segments.hold(x, float("nan")) for x in inputs]
    return furthest(*(everything(form, inputs, state, segments, dtype)
                      for form, dtype in ((delta_scan.fused, torch.float32), (delta_scan.chunked, torch.float64))))


def spans() -> float:
    """Rows cut in spans, some of them empty, as long rows are on a card that has few of them."""
    from seqloom.kernels.triton import delta_scan as kernels

    kernels.SHORTEST, before = 1, kernels.SHORTEST
    try:
        cuts = [kernels._spans(torch.empty(1, 1, 1, 16), 2, tokens, 1, 20) for tokens in (260, 330)]
        plain = case(260, 24, 40, False, False, False, 1), case(260, 16, 20, True, False, True, 1)
        return max(*plain, case(330, 16, 20, True, True, True, 1)) if cuts == [4, 4] else 1e9
    finally:
        kernels.SHORTEST = before


def quiet_spans() -> float:
    from seqloom.kernels.triton import delta_scan as kernels

    kernels.SHORTEST, before = 1, kernels.SHORTEST
    try:
        return neighbour(400)
    finally:
        kernels.SHORTEST = before


def neighbour(tokens: int = 90) -> float:
    """Values and log decays of another segment a million times larger move nothing by one bit: the number of outputs moved."""
    quiet = streams(tokens, 16, 16, True)
    loud = [x.clone() for x in quiet]
    ids = torch.ones(2, tokens, dtype=torch.int64)
    ids[:, 30:65], ids[:, 65:] = 2, 3
    other = ids == 2
    for i in (2, 4):
        loud[i][:, 30:65] *= 1e6
    segments, state, moved = resolve(ids, Track.start(2))[0], torch.ones(2, 1, 16, 16), 0
    runs = (everything(delta_scan.fused, inputs, state, segments, torch.float32) for inputs in (loud, quiet))
    for x, y in zip(*runs, strict=True):
        if x.shape[1] == tokens:
            x, y = (torch.where(other.reshape(2, tokens, *(1,) * (z.ndim - 2)), 0.0, z) for z in (x, y))
        moved += not torch.equal(x, y)
    return moved


def repeated() -> float:
    """One key again and again at beta 2: powers of the triangular system grow like binomials, its inverse does not."""
    inputs = streams(64, 16, 16, False)
    inputs[1][:], inputs[3][:] = inputs[1][:, :1], 2.0
    return furthest(*(everything(form, inputs, None, None, dtype)
                      for form, dtype in ((delta_scan.fused, torch.float32), (delta_scan.chunked, torch.float64))))


def low() -> float:
    """float16 streams (the interpreter has no bfloat16), beta and decays in float32 as layers pass them."""
    inputs = streams(130, 32, 32, True)
    inputs = [x.half().double() for x in inputs[:3]] + [x.float().double() for x in inputs[3:]]

    def form(*streams: Tensor, **options: Tensor | None):
        y, new, _ = delta_scan.fused(*(x.half() for x in streams[:3]), *streams[3:], **options)
        return y.float(), new, None

    state = torch.randn(2, 1, 32, 32).float().double()
    exact = everything(delta_scan.chunked, inputs, state, None, torch.float64)
    return furthest(everything(form, inputs, state, None, torch.float32), exact)


def again() -> float:
    """Strided streams, as a layer splits them, give the same bits, and a second run does."""
    q, k, v, beta = (x.float() for x in streams(70, 16, 16, False))
    packed = torch.cat([q, k, v], -1)
    split = lambda x: [*x.split(16, -1), beta]  # noqa: E731
    runs = [everything(delta_scan.fused, [q, k, v, beta], None, None, torch.float32) for _ in range(2)]
    strided = delta_scan.fused(*split(packed)).y
    return sum(not torch.equal(x, y) for x, y in zip(*runs, strict=True)) + (not torch.equal(strided, runs[0][0]))


def kept() -> float:
    """Bytes that a final state keeps alive beyond its own, of sizes that the kernels fill up."""
    new = delta_scan.fused(*(x.float() for x in streams(5, 6, 10, False))).state
    return new.untyped_storage().nbytes() - new.nbytes


def _traced(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return delta_scan.fused(q, k, v, beta, log_a, state=state)[:2]


def compiled() -> float:
    inputs = [*streams(20, 16, 16, True, batch=1), torch.randn(1, 1, 16, 16)]

    def both(form) -> list[Tensor]:
        leaves = [x.float().clone().requires_grad_() for x in inputs]
        y, new = form(*leaves)
        return [y, new, *torch.autograd.grad(y.square().sum() + new.sum(), leaves)]

    return furthest(both(torch.compile(_traced, fullgraph=True, backend="aot_eager")), both(_traced))


def exported() -> float:
    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return _traced(*inputs)

    inputs = [x.float() for x in (*streams(20, 16, 16, True, batch=1), torch.randn(1, 1, 16, 16))]
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=[(*({1: tokens},) * 5, None)])
    short = [x[:, :9] for x in inputs[:5]] + inputs[5:]
    return furthest(list(program.module()(*short)), list(_traced(*short)))


CHECKS = (spans, quiet_spans, neighbour, repeated, low, again, kept, compiled, exported)

if __name__ == "__main__":
    run_checks({**{name: partial(case, *given) for name, given in CASES.items()}, **{each.__name__: each for each in CHECKS}})


@pytest.fixture(scope="module")
def report() -> dict[str, float]:
    return report_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_chunked_form_in_float64(report, name):
    assert report[name] < 1e-5


def test_spans_of_a_long_row_agree_with_the_chunked_form(report):
    assert report["spans"] < 1e-5


def test_a_violent_neighbour_leaves_no_rounding_error(report):
    assert report["neighbour"] == report["quiet_spans"] == 0


def test_repeated_keys_do_not_cancel(report):
    assert report["repeated"] < 1e-4


def test_float16_streams_lose_what_float16_loses(report):
    assert report["low"] < 2e-3


def test_it_is_deterministic_and_takes_strided_streams(report):
    assert report["again"] == 0


def test_a_state_keeps_nothing_else_alive(report):
    assert report["kept"] == 0


def test_compilers_pass_through_it_without_a_break(report):
    assert report["compiled"] == report["exported"] == 0
