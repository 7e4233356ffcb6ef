"""DeltaNet."""

from delta_loop import make

make("delta", 3, decay=False, gate=False)
