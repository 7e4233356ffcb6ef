"""What may be known about each token besides its vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Info:
    """Optional facts per token, each [B, T]. A mixer declares which it uses; passing another one is an error.

    segments:  integer id of the sample a token belongs to; 0 holds (padding), a change between non-zero ids resets
    positions: where the token stands in its segment; counted from the state when absent
    weight:    how many tokens this one stands for (after pooling)
    dt:        time since the previous token, in units of the usual step
    ids:       vocabulary ids, for mixers that look at them
    role:      integer role (source, target, register, ...)
    """

    segments: Tensor | None = None
    positions: Tensor | None = None
    weight: Tensor | None = None
    dt: Tensor | None = None
    ids: Tensor | None = None
    role: Tensor | None = None

    def given(self) -> frozenset[str]:
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def check(self, owner: str, uses: frozenset[str]) -> None:
        """Raise if a field is given that `owner` does not use: it would be dropped in silence."""
        extra = self.given() - uses
        if extra:
            raise ValueError(
                f"{owner} does not use info.{', info.'.join(sorted(extra))}; "
                f"it uses {', '.join(sorted(uses)) or 'none'}"
            )

    def only(self, names: frozenset[str]) -> Info:
        """The fields in `names`, the others dropped: how a stack hands each block what it declares."""
        return replace(self, **{name: None for name in self.given() - names})

    def map(self, function: Callable[[Tensor], Tensor]) -> Info:
        return replace(self, **{name: function(getattr(self, name)) for name in self.given()})

    def slice(self, start: int, stop: int) -> Info:
        """Tokens start to stop."""
        return self.map(lambda value: value[:, start:stop])


pytree.register_dataclass(Info)
