"""DeltaProduct: once a token the decay, then three steps, each told its own error; read after the last."""

from delta_loop import make

make("delta_product", 12, decay=True, gate=True, steps=3, reflect=True)
