"""Laws on compilation: a layer is one graph, and lengths of a bucket share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo

from seqloom.laws.cases import WIDTH, Case, build, draw, info, patterns
from seqloom.laws.law import Measure, Untested
from seqloom.laws.observe import gap

BUCKET = (70, 83, 97, 111, 126)  # lengths of one bucket: as many chunks of 64 and of 32 or 16 pairs, none of them full


def one_graph(case: Case, device: str) -> Iterator[Measure]:
    """One compiled graph, no graph break, and no recompilation over 5 lengths of a bucket or 5 steps of decoding.

    The automatic form, traced for training with a dynamic length and run as traced: what a backend makes of a graph is
    its own affair.
    """
    if hasattr(build, "__wrapped__"):
        raise Untested("annotations are being checked at run time, which no compiler traces")
    layer, x = build(case, device=device), draw(5, max(BUCKET), WIDTH, name="graph", device=device)
    ids = patterns(max(BUCKET), device)
    torch._dynamo.reset()  # what other cases compiled counts towards its limit
    counted = Counter()
    run = counted.compile(lambda x, ids: layer(x, info=info(ids))[:2])
    for tokens in BUCKET:
        part, part_ids = x[:, :tokens].clone().requires_grad_(), ids[:, :tokens].clone()
        for value in (part, part_ids):
            torch._dynamo.maybe_mark_dynamic(value, 1)
        got, want = run(part, part_ids)[0], layer(part, info=info(part_ids)).y
        yield Measure(f"T={tokens}, compiled against eager", gap(got, want), 1e-12)
        slopes = [torch.autograd.grad((y * part.detach()).sum(), part)[0] for y in (got, want)]
        yield Measure(f"T={tokens}, compiled against eager, gradient", gap(*slopes), 1e-12)
    yield Measure(f"graphs for lengths {BUCKET}", counted.graphs, 1)
    with torch.no_grad():
        if not case.spec.streams:
            return
        counted = Counter()
        step = counted.compile(lambda x, state: layer(x, state=state, donate=True)[:2])
        state, eager = layer.init_state(5, capacity=12), layer.init_state(5, capacity=12)
        for t in range(5):
            y, state = step(x[:, t : t + 1].clone(), state)
            want, eager, _ = layer(x[:, t : t + 1], state=eager, donate=True)
            yield Measure(f"step {t}, compiled against eager", gap(y, want), 1e-12)
        yield Measure("graphs for 5 steps of decoding", counted.graphs, 1)


class Counter:
    """A backend that runs a traced graph as it is and counts how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, fullgraph=True, backend=self)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        self.graphs += 1
        return graph.forward


__all__ = ["one_graph"]
