"""The configuration: a spec as nested JSON under one key, and what transformers' code looks for beside it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from seqloom.core import BadInput
from seqloom.core.spec import pack, unpack
from seqloom.models import KINDS, SequenceModel
from seqloom.models.heads import PooledHead, TokenHead


class SeqloomConfig(PreTrainedConfig):
    """`SeqloomConfig(seqloom=pack(spec, KINDS))` or `SeqloomConfig.of(spec)`; `config.spec` gives the spec back.

    All that follows from the spec (widths, vocabulary, tying) is written to config.json as well, for other readers, and
    is taken from the spec when read. A file of an older format is upgraded; a newer one is refused.

    Raises: BadInput if the file has no spec, a newer format, or settings this version does not know.
    """

    model_type = "seqloom"
    keys_to_ignore_at_inference = ["past_key_values"]

    seqloom: dict | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 1
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def of(cls, spec: SequenceModel, **settings: Any) -> SeqloomConfig:
        return cls(seqloom=pack(spec, KINDS), **settings)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.seqloom is not None:
            if not isinstance(self.seqloom, dict):
                raise BadInput(f"the configuration's 'seqloom' must hold a spec and its format, found {self.seqloom!r}")
            spec = unpack(self.seqloom, KINDS)
            self.set_spec(spec)
            if isinstance(spec.head, PooledHead) and self.id2label is None:
                kwargs.setdefault("num_labels", spec.head.classes)
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> SequenceModel:
        if self.seqloom is None:
            raise BadInput("this configuration has no spec; make it with SeqloomConfig.of(spec)")
        return unpack(self.seqloom, KINDS)

    def set_spec(self, spec: SequenceModel) -> None:
        """Make `spec` the one this configuration holds, and everything beside it follow."""
        self.seqloom = pack(spec, KINDS)
        self.vocab_size = getattr(spec.stem, "vocab", 0)
        self.hidden_size = spec.stack.dim
        self.num_hidden_layers = len(spec.stack.blocks)
        self.num_attention_heads = max(getattr(block.mixer, "heads", None) or 1 for block in spec.stack.blocks)
        self.tie_word_embeddings = isinstance(spec.head, TokenHead) and spec.head.tie
