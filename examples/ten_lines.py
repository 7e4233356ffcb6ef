"""The README's ten lines: a hybrid stack, two samples packed in each row, cut where one ends and carried on."""

import torch

from seqloom import Block, DeltaNet, Info, SoftmaxAttention, Stack

blocks = (Block(mixer=DeltaNet(heads=4)),) * 3 + (Block(mixer=SoftmaxAttention(heads=4, window=512)),)
stack = Stack(dim=256, blocks=blocks).build()
x = torch.randn(2, 1000, 256)
segments = torch.ones(2, 1000, dtype=torch.int64)
segments[:, 600:] = 2  # two samples packed in each row
whole = stack(x, info=Info(segments=segments))  # Mixed(y, state, aux)
start = stack(x[:, :600], info=Info(segments=segments[:, :600]))  # cut anywhere, carry the state
rest = stack(x[:, 600:], state=start.state, info=Info(segments=segments[:, 600:]))
torch.testing.assert_close(rest.y, whole.y[:, 600:], rtol=1e-3, atol=1e-4)
print("cut and carried on: the same as in one piece")
