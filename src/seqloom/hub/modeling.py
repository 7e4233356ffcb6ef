"""The models as transformers sees them: the same stem, stack and head as a `SequenceModel`, with its calling convention.

Parameters are named `model.stem`, `model.stack` and `lm_head` (or `score`), so that transformers' ways of loading one
kind of head from another's checkpoint work. The computation is that of the layers; nothing is computed here but losses.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from seqloom.core import BadInput
from seqloom.core.marks import NAME as MARKS
from seqloom.core.marks import cast, marks
from seqloom.generate import Piece
from seqloom.hub.cache import SeqloomCache
from seqloom.hub.config import SeqloomConfig
from seqloom.hub.edge import across_samples, segments_of
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.heads.tokens import TokenHeadLayer
from seqloom.models.sequence import SequenceModelLayer
from seqloom.objectives.next_token import IGNORE, linear_cross_entropy

LARGE = 2**28  # scores of a training step, from which on they are not kept: 1 GiB in float32, three with their gradient


@dataclass
class SeqloomOutput(BaseModelOutputWithPast):
    """aux: losses and statistics that layers reported, by name."""

    aux: dict[str, Tensor] | None = None


class SeqloomPreTrainedModel(PreTrainedModel):
    config_class = SeqloomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BlockLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _marks: dict[str, dict] = {}

    # -- making and loading -------------------------------------------------------------------------------------
    def post_init(self) -> None:
        """Record what loading must keep: which parameters stay float32, and the marks that loading drops."""
        self._marks = {name: marks(p) for name, p in self.named_parameters() if hasattr(p, MARKS)}
        self._keep_in_fp32_modules_strict = {name for name, mark in self._marks.items() if mark["keep_float32"]}
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: layers initialise themselves."""

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        """What a checkpoint lacks was made without memory; it is copied from a second model, made for that."""
        lacking = {name: value for name, value in _tensors(self).items() if not getattr(value, "_is_hf_initialized", False)}
        if lacking:
            fresh = _tensors(type(self)(self.config))
            with torch.no_grad():
                for name, value in lacking.items():
                    value.copy_(fresh[name])
        super()._initialize_missing_keys(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors files only.

        Raises: BadInput for a damaged file, and where pickled weights are asked for.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise BadInput("weights are read from safetensors files only, and use_safetensors=False asks for pickled ones")
        try:
            found = super().from_pretrained(path, *args, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise BadInput(f"{path} holds a damaged safetensors file ({error}); copy or save it again") from error
        model = found[0] if isinstance(found, tuple) else found
        model.renew_marks()
        return found

    def renew_marks(self) -> None:
        """Put the marks back on parameters that were replaced while loading, or copied."""
        for name, parameter in self.named_parameters():
            if name in self._marks:
                setattr(parameter, MARKS, self._marks[name])

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.renew_marks()  # copy.deepcopy drops a parameter's attributes

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises: BadInput if a file stands where the folder should."""
        if Path(save_directory).is_file():
            raise BadInput(f"cannot save to {save_directory}: it is a file, and a folder is expected")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """`to`, `half`, `bfloat16`, ..: parameters marked keep_float32 keep it, and their digits."""
        kept = {name: p.data for name, p in self.named_parameters() if self._marks.get(name, marks(p))["keep_float32"]}
        super()._apply(function, recurse)
        now = dict(self.named_parameters())
        for name, value in kept.items():
            parameter = now[name]
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = value.to(device=parameter.device, dtype=torch.promote_types(value.dtype, torch.float32))
        return self

    # -- what all heads share -----------------------------------------------------------------------------------
    def _segments(self, tokens: Tensor | None, *, segments: Tensor | None, past_key_values: Any = None,
                  **said: Tensor | None) -> Tensor | None:
        """The segments of a call, given or translated."""
        if tokens is None or segments is not None:
            return segments
        past = isinstance(past_key_values, SeqloomCache) and past_key_values.get_seq_length() > 0
        return segments_of(*tokens.shape[:2], past=past, device=tokens.device, **said)

    @property
    def _base(self) -> SeqloomModel:
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Module:
        return self._base.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._base.stem = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None,
                                mean_resizing: bool = True) -> nn.Module:
        """A vocabulary of another size: new rows stand at the mean of the old ones, and the spec follows."""
        stem, config = self.get_input_embeddings(), self.config
        size = config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if size == config.vocab_size:
            return stem
        spec = config.spec
        head = spec.head
        grown = [stem]
        if isinstance(head, TokenHead) and head.classes == config.vocab_size:
            head = dataclasses.replace(head, classes=size)
            if (output := self.get_output_embeddings()) is not None and output.weight is not stem.weight:
                grown.append(output)
        for layer in grown:
            layer.weight = _rows(layer.weight, size)
        config.set_spec(dataclasses.replace(spec, stem=dataclasses.replace(spec.stem, vocab=size), head=head))
        for each in self.modules():
            if isinstance(each, SeqloomPreTrainedModel):
                each.config = config
        self.tie_weights()
        return stem


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _rows(weight: nn.Parameter, size: int) -> nn.Parameter:
    old = weight.data
    more = old.mean(0, keepdim=True).expand(max(size - old.shape[0], 0), -1)
    new = nn.Parameter(torch.cat([old[:size], more]), requires_grad=weight.requires_grad)
    if hasattr(weight, MARKS):
        setattr(new, MARKS, getattr(weight, MARKS))
    return new


@contextlib.contextmanager
def _float32_made() -> Iterator[torch.dtype]:
    """Layers are made in float32 and cast after, so that marked parameters keep their digits; gives the dtype asked for."""
    asked = torch.get_default_dtype()
    if asked in (torch.float16, torch.bfloat16):
        torch.set_default_dtype(torch.float32)
    try:
        yield asked
    finally:
        torch.set_default_dtype(asked)


def _made(build: Any, *args: Any) -> nn.Module:
    with _float32_made() as dtype:
        module = build(*args)
        return cast(module, dtype) if dtype != torch.float32 else module


def _with_head(config: SeqloomConfig, head: TokenHead | PooledHead) -> SeqloomConfig:
    """The configuration of the same stack under another head; the one given stays as it is."""
    config = copy.deepcopy(config)
    config.set_spec(dataclasses.replace(config.spec, head=head))
    return config


class SeqloomModel(SeqloomPreTrainedModel):
    """Stem and stack: hidden vectors [B, T, D]. `parts` are layers to use in place of new ones."""

    def __init__(self, config: SeqloomConfig, parts: Any = None):
        super().__init__(config)
        spec = config.spec
        self.stem = _made(spec.stem.build, spec.stack.dim) if parts is None else parts.stem
        self.stack = _made(spec.stack.build) if parts is None else parts.stack
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        return self.stack.checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.stack.checkpointing = value

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: SeqloomCache | None = None,
                inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, segments: Tensor | None = None, seq_idx: Tensor | None = None,
                cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> SeqloomOutput:
        """Exactly one of input_ids [B, T] and inputs_embeds [B, T, D]. Padding and packing: see `hub.edge.segments_of`;
        `segments` [B, T] says it directly. hidden_states: what enters each block, and the output.

        Raises: BadInput where these do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInput("give either input_ids or inputs_embeds, and not both")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        cache, keep = self._cache(past_key_values, use_cache)
        segments = self._segments(
            tokens, segments=segments, past_key_values=cache, attention_mask=attention_mask, position_ids=position_ids,
            seq_idx=seq_idx, cu_seq_lens=cu_seq_lens_q,
        )
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        collect: list[Tensor] | None = [] if wanted else None
        piece, aux = Piece(tokens, segments), None
        if cache is None:
            hidden, _, aux = self.stack(self._embed(tokens), info=piece.info, collect=collect)
        else:
            hidden, aux = self._continue(cache, piece, collect)
        return SeqloomOutput(
            last_hidden_state=hidden, past_key_values=cache if keep else None,
            hidden_states=None if collect is None else tuple(collect), aux=aux or None,
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.is_floating_point() else self.stem(tokens)

    def _cache(self, given: Any, use_cache: bool | None) -> tuple[SeqloomCache | None, bool]:
        """The cache to read and write, and whether to hand it out."""
        if given is not None and not isinstance(given, SeqloomCache):
            raise BadInput(
                f"past_key_values must be a SeqloomCache, which holds the states of any mixer, found {type(given).__name__}; "
                f"leave it out, or pass SeqloomCache()"
            )
        keep = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if not self.stack.spec.causal:
            if given is not None:
                raise BadInput("this model is not causal: it sees whole sequences, and takes no past_key_values")
            return None, False
        return SeqloomCache() if given is None and keep else given, keep or given is not None

    def _continue(self, cache: SeqloomCache, piece: Piece, collect: list[Tensor] | None) -> tuple[Tensor, dict]:
        """The hidden vectors of `piece`, after what the cache holds, and what layers reported of its last part."""
        outputs, layers = [], []
        for part in cache.pieces(piece):
            x = self._embed(part.tokens)
            if cache.state is None and cache.capacity is not None:
                cache.state = self.stack.init_state(x.shape[0], cache.capacity, x.dtype, x.device)
            cache.before(part)
            into: list[Tensor] | None = None if collect is None else []
            y, state, aux = self.stack(x, state=cache.state, info=part.info, donate=cache.capacity is not None, collect=into)
            cache.after(part, state)
            outputs.append(y)
            layers.append(into)
        # what was read again stands before the new tokens
        last = lambda parts: (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, -piece.length :]  # noqa: E731
        if collect is not None:
            collect.extend(last(list(level)) for level in zip(*layers, strict=True))
        return last(outputs), aux


def _added(loss: Tensor, out: SeqloomOutput) -> Tensor:
    """The loss with what layers ask for (routing balance and the like), as the training objectives add it."""
    for name, value in (out.aux or {}).items():
        if name.endswith("loss"):
            loss = loss + value.mean()
    return loss


class _OverTheVocabulary(SeqloomPreTrainedModel):
    """A score for every entry of the vocabulary at every token. `parts` are layers to use in place of new ones."""

    _tied_weights_keys = {"lm_head.weight": "model.stem.weight"}
    skip_logits: bool | None = None  # whether a call with labels returns no logits; None: in training, where they are LARGE

    def __init__(self, config: SeqloomConfig, parts: Any = None):
        spec = config.spec
        if not (isinstance(spec.head, TokenHead) and spec.head.classes == spec.stem.vocab):
            config = _with_head(config, TokenHead(classes=spec.stem.vocab))
        super().__init__(config)
        self.model = SeqloomModel(config, parts)
        self.lm_head = _made(config.spec.head.build, config.hidden_size, self.model.stem) if parts is None else parts.head
        self.post_init()

    def _scored(self, hidden: Tensor, labels: Tensor | None, out: SeqloomOutput, *, skip_logits: bool | None = None,
                **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Scores of `hidden` and the loss of `labels`. Where scores are skipped they are None, and the same loss is made by
        blocks of tokens; a head that was replaced or wrapped, and a loss of one's own, need them and get them.
        """
        if labels is None:
            return self.lm_head(hidden), None
        vocab = self.config.vocab_size
        if skip_logits is None:
            skip_logits = self.skip_logits
        if skip_logits is None:
            skip_logits = self.training and hidden.shape[:-1].numel() * vocab >= LARGE
        targets = labels if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        if not (skip_logits and self._plain_head() and targets.shape == hidden.shape[:-1]
                and kwargs.get("ignore_index", IGNORE) == IGNORE):
            logits = self.lm_head(hidden)
            return logits, _added(self.loss_function(logits=logits, labels=labels, vocab_size=vocab, **kwargs), out)
        if targets is labels and self.loss_function is ForCausalLMLoss:
            targets = nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE)
        targets, count = targets.flatten().to(hidden.device), kwargs.get("num_items_in_batch")
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets)
        count = (targets != IGNORE).sum() if count is None else torch.as_tensor(count, device=loss.device)
        return None, _added((loss / count).float(), out)  # as transformers has it

    def _plain_head(self) -> bool:
        """Is the head the linear map it was built as, whole and here, under transformers' own loss?"""
        head = self.lm_head
        return (type(head) is TokenHeadLayer and type(head.weight) is nn.Parameter and head.weight.ndim == 2
                and not hasattr(head, "_hf_hook") and self.loss_function in (ForCausalLMLoss, ForMaskedLMLoss))


class SeqloomForCausalLM(_OverTheVocabulary, GenerationMixin):
    """Next-token scores, `generate`, and the loss of labels. Raises: BadInput if a mixer is not causal."""

    def __init__(self, config: SeqloomConfig, parts: Any = None):
        stack = config.spec.stack
        for i, block in enumerate(stack.blocks):
            if not block.mixer.causal:
                raise BadInput(f"a causal language model needs causal mixers, and that of block {i} ({block.mixer.key}) is not")
        super().__init__(config, parts)

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: SeqloomCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, logits_to_keep: int | Tensor = 0,
                segments: Tensor | None = None, seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
                skip_logits: bool | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """labels [B, T] are shifted here: the score at t - 1 is for label t, and -100 is ignored, as is a label whose
        previous token belongs to another sample. logits_to_keep: score the last n tokens (0: all), or the given places.
        skip_logits: with labels, make the loss by blocks of tokens and return no logits (None: `self.skip_logits`).
        """
        segments = self._segments(
            input_ids if inputs_embeds is None else inputs_embeds, segments=segments, past_key_values=past_key_values,
            attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx, cu_seq_lens=cu_seq_lens_q,
        )
        out = self.model(
            input_ids=input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, segments=segments, return_dict=True,
        )
        hidden = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        if labels is not None:
            labels = across_samples(labels, segments)
        logits, loss = self._scored(hidden, labels, out, skip_logits=skip_logits, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, generation_mode: Any = None,
                                      batch_size: int | None = None, max_cache_length: int | None = None,
                                      *args: Any) -> None:
        """Put a `SeqloomCache` where transformers would put a cache of keys and values."""
        kind = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        if kind not in (None, "dynamic", "static"):
            raise BadInput(f"cache_implementation {kind!r} is not for states; use None, 'dynamic' or 'static'")
        cache = SeqloomCache(capacity=max_cache_length if kind == "static" else None)
        assisted = "assisted" in str(getattr(generation_mode, "value", generation_mode))
        if assisted or getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


class SeqloomForMaskedLM(_OverTheVocabulary):
    """Scores of what stands at each token, for bidirectional stacks trained to fill in masked tokens."""

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool | None = None, segments: Tensor | None = None, seq_idx: Tensor | None = None,
                cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> MaskedLMOutput:
        """labels [B, T] stand where they are scored, -100 ignored. skip_logits: as for a causal model."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=False, output_hidden_states=output_hidden_states, segments=segments, seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q, return_dict=True,
        )
        logits, loss = self._scored(out.last_hidden_state, labels, out, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class SeqloomForSequenceClassification(SeqloomPreTrainedModel):
    """One answer per row, from its last real token (causal stacks) or the mean of its real tokens (others)."""

    def __init__(self, config: SeqloomConfig, parts: Any = None):
        head = config.spec.head
        if not (isinstance(head, PooledHead) and head.classes == config.num_labels):
            pool = head.pool if isinstance(head, PooledHead) else "last" if config.spec.stack.causal else "mean"
            config = _with_head(config, PooledHead(classes=config.num_labels, pool=pool))
        super().__init__(config)
        self.model = SeqloomModel(config, parts)
        self.score = _made(config.spec.head.build, config.hidden_size, self.model.stem) if parts is None else parts.head
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: SeqloomCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, segments: Tensor | None = None,
                **kwargs: Any) -> SequenceClassifierOutputWithPast:
        """labels [B] (or [B, classes] for several labels): the loss follows config.problem_type, as in transformers."""
        segments = self._segments(
            input_ids if inputs_embeds is None else inputs_embeds, segments=segments, past_key_values=past_key_values,
            attention_mask=attention_mask,
        )
        out = self.model(
            input_ids=input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_hidden_states=output_hidden_states, segments=segments, return_dict=True,
        )
        logits, loss = self.score(out.last_hidden_state, None if segments is None else segments != 0), None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            loss = _added(loss, out)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )


class SeqloomForTokenClassification(SeqloomPreTrainedModel):
    """One answer per token."""

    def __init__(self, config: SeqloomConfig, parts: Any = None):
        head = config.spec.head
        if not (isinstance(head, TokenHead) and not head.tie and head.classes == config.num_labels):
            config = _with_head(config, TokenHead(classes=config.num_labels, tie=False))
        super().__init__(config)
        self.model = SeqloomModel(config, parts)
        self.score = _made(config.spec.head.build, config.hidden_size, self.model.stem) if parts is None else parts.head
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool | None = None, segments: Tensor | None = None, seq_idx: Tensor | None = None,
                cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> TokenClassifierOutput:
        """labels [B, T], -100 ignored."""
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=False, output_hidden_states=output_hidden_states, segments=segments, seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q, return_dict=True,
        )
        logits, loss = self.score(out.last_hidden_state), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
            loss = _added(loss, out)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


def wrap(layer: SequenceModelLayer, **settings: Any) -> Any:
    """A built `SequenceModel` as the class that its head and stack ask for, sharing its parameters.

    settings go to the configuration (eos_token_id, id2label, ..).
    """
    spec = layer.spec
    if isinstance(spec.head, PooledHead):
        cls, settings = SeqloomForSequenceClassification, {"num_labels": spec.head.classes, **settings}
    elif spec.head.classes != spec.stem.vocab:
        cls, settings = SeqloomForTokenClassification, {"num_labels": spec.head.classes, **settings}
    else:
        cls = SeqloomForCausalLM if spec.stack.causal else SeqloomForMaskedLM
    dtype = next((p.dtype for p in layer.parameters() if not marks(p)["keep_float32"]), torch.float32)
    return cls(SeqloomConfig.of(spec, dtype=str(dtype).removeprefix("torch."), **settings), parts=layer).train(layer.training)
