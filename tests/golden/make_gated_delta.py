"""Gated DeltaNet: the decay, then the delta rule; a gated norm at the end."""

from delta_loop import make

make("gated_delta", 4, decay=True, gate=True)
