"""The table of laws, in the order in which they are shown."""

from __future__ import annotations

from seqloom.laws import contract, equal, graph, isolation, precision, streaming
from seqloom.laws.law import Law, causal, constant, streams

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(equal.forms_agree, equal.one_form),
        Law(equal.gradient),
        Law(equal.any_length),
        Law(equal.long, equal.one_form),
        Law(streaming.resume, streams),
        Law(streaming.step_by_step, streams),
        Law(streaming.canonical_state, constant),
        Law(isolation.future, causal),
        Law(isolation.padding),
        Law(isolation.poison),
        Law(isolation.packing),
        Law(isolation.float32_segments),
        Law(isolation.batch_slot),
        Law(streaming.beam, streams),
        Law(streaming.donate, streams),
        Law(streaming.state_bytes, streams),
        Law(contract.liveness),
        Law(contract.undeclared_info),
        Law(contract.cross_mixing, contract.mixes_across),
        Law(precision.marked_dtypes),
        Law(precision.bf16_error),
        Law(graph.one_graph),
    )
}
