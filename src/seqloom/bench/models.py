"""Training speed of whole models beside what a user would pick instead: transformers and x-transformers.

Width 256, float32, forward and backward of the next-token loss, one process, interleaved rounds. Rows where another
library is faster are printed like all others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from seqloom.core import form_report
from seqloom.models.presets import preset
from seqloom.study.fit import count_parameters

VOCAB = 256


def step_of(
    model: nn.Module, ids: torch.Tensor, logits: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    """One forward and backward pass, gradients cleared."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        scores = logits(model, ids)
        F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    return step


def ours(name: str, layers: int = 4) -> tuple[nn.Module, Callable]:
    return preset(f"{name}-small", vocab=VOCAB, dim=256, layers=layers).build(), lambda model, ids: model(ids).logits


def transformers_llama(layers: int = 4) -> tuple[nn.Module, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config), lambda model, ids: model(ids).logits


def x_transformers(layers: int = 4) -> tuple[nn.Module, Callable]:
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=VOCAB,
        max_seq_len=16384,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_layers=Decoder(
            dim=256,
            depth=layers,
            heads=4,
            attn_dim_head=64,
            attn_flash=True,
            rotary_pos_emb=True,
            ff_swish=True,
            ff_glu=True,
            ff_mult=2.67,
            use_rmsnorm=True,
        ),
    )
    return model, lambda model, ids: model(ids)


def transformers_mamba2(layers: int = 6, chunk: int = 256) -> tuple[nn.Module, Callable]:
    """Its default chunk is 256; 64 suits a CPU better."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=layers,
        state_size=64,
        num_heads=8,
        head_dim=64,
        n_groups=1,
        expand=2,
        tie_word_embeddings=True,
        use_cache=False,
        chunk_size=chunk,
    )
    return Mamba2ForCausalLM(config), lambda model, ids: model(ids).logits


def transformers_mamba(layers: int = 8) -> tuple[nn.Module, Callable]:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=256, num_hidden_layers=layers, state_size=16, use_cache=False)
    return MambaForCausalLM(config), lambda model, ids: model(ids).logits


def our_mamba(layers: int = 8) -> tuple[nn.Module, Callable]:
    """Mamba blocks as the paper has them: no channel mixer."""
    return _blocks("mamba", layers)


def our_mamba2(layers: int = 6) -> tuple[nn.Module, Callable]:
    return _blocks("mamba2", layers, state=64, head_dim=64)


def _blocks(name: str, layers: int, **settings: int) -> tuple[nn.Module, Callable]:
    from seqloom.models import Block, Stack
    from seqloom.models.presets import mixer_for
    from seqloom.models.sequence import language_model

    block = Block(mixer=mixer_for(name, 256, **settings), mlp=None)
    model = language_model(vocab=VOCAB, stack=Stack(dim=256, blocks=(block,) * layers)).build()
    return model, lambda model, ids: model(ids).logits


def tokens(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def describe(model: nn.Module) -> dict[str, object]:
    return {"parameters": count_parameters(model), "forms": form_report()}
