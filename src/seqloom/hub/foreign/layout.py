"""What every importer of foreign weights shares: tables of names, how they are applied, and reading configurations.

A kind of checkpoint is a `Layout`: a function from its config.json to the model it describes, and a table of names. The
model's own parameters drive the reading: each one is looked up in the table and made from foreign tensors, so that none can
stay unfilled, and a foreign tensor that nothing asked for is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqloom.core import BadInput, Spec
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model

Config = Mapping[str, Any]


class Made(NamedTuple):
    """A parameter that is computed from the tensors of these full names: make(tensors, like, spec of the block's mixer)."""

    names: tuple[str, ...]
    make: Callable[[list[Tensor], Tensor, Any], Tensor]


# What stands for a parameter or, by a prefix of its name, for all of a module: the foreign prefix, several whose rows are
# stacked in this order, `Made`, a list of these of which the first that the file has counts, or a function from the block's
# mixer to one of these.
Source = str | tuple[str, ...] | Made | list[Any] | Callable[[Any], Any]
Rules = Mapping[str, Source]


class Names(NamedTuple):
    """The foreign names of a model's parameters, by the longest prefix of ours that has a rule.

    top:     outside the blocks
    layer:   where block number {} is
    block:   in a block, but for its mixer
    mixers:  of the mixer of a block, by that mixer's key in the table of mixers
    ignored: endings of tensors that say nothing which the configuration does not
    """

    top: Rules
    layer: str
    block: Rules
    mixers: Mapping[str, Rules]
    ignored: tuple[str, ...] = ()


class Layout(NamedTuple):
    """How one kind of checkpoint is read.

    spec:   its config.json -> the model it describes; raises BadInput for an option that has no counterpart
    names:  what its tensors are called
    writes: who writes such files
    note:   what of it is read and what is not
    """

    spec: Callable[[Config], SequenceModel]
    names: Names
    writes: str = "transformers"
    note: str = ""


class Tensors:
    """Tensors by foreign names; what was never taken at the end was not understood."""

    def __init__(self, tensors: Mapping[str, Tensor], owner: str):
        self.tensors, self.owner, self.left = tensors, owner, set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise self.lack(name)
        self.left.discard(name)
        return self.tensors[name]

    def lack(self, names: str) -> BadInput:
        return BadInput(f"{self.owner} has no tensor {names}, which its config.json calls for")

    def drop(self, *endings: str) -> None:
        """Leave out tensors that say nothing which the configuration does not."""
        self.left = {name for name in self.left if not (endings and name.endswith(endings))}

    def done(self) -> None:
        if self.left:
            raise BadInput(f"{self.owner} has {len(self.left)} tensors that its config.json does not call for, "
                           f"such as {min(self.left)}")

    def made(self, source: Source, like: Tensor, *, prefix: str, rest: str, mixer: Spec | None) -> Tensor:
        """The parameter that `source` stands for: foreign names are `prefix` + name + `rest`, those of `Made` without rest."""
        if callable(source):
            source = source(mixer)
        if isinstance(source, list):
            lacking = [[name for name in _full(each, prefix, rest) if name not in self] for each in source]
            if all(lacking):
                raise self.lack(" or ".join(names[0] for names in lacking))
            source = source[lacking.index([])]
        parts = [self.take(name) for name in _full(source, prefix, rest)]
        if isinstance(source, Made):
            return source.make(parts, like, mixer)
        # a depthwise convolution's weight is [D, W] here and [D, 1, W] elsewhere
        parts = [part.squeeze(1) if part.ndim == like.ndim + 1 and part.shape[1] == 1 else part for part in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _full(source: Any, prefix: str, rest: str) -> list[str]:
    if isinstance(source, Made):
        return [prefix + name for name in source.names]
    return [prefix + name + rest for name in ((source,) if isinstance(source, str) else source)]


def read(source: Tensors, spec: SequenceModel, names: Names) -> dict[str, Tensor]:
    """Tensors by the names of a `SequenceModel`, for every parameter of `spec`.

    Raises: BadInput for a tensor that is missing, that nothing calls for, or that contradicts the configuration.
    """
    source.drop(*names.ignored)
    with torch.device("meta"):
        layer = spec.build()
    found = {}
    for name, like in layer.named_parameters():
        rules, prefix, inner, mixer = names.top, "", name, None
        if name.startswith("stack.blocks."):
            index, _, inner = name.removeprefix("stack.blocks.").partition(".")
            mixer, prefix = spec.stack.blocks[int(index)].mixer, names.layer.format(index) + "."
            rules = names.block if not inner.startswith("mixer.") else names.mixers[mixer.key]
        rule, rest = _rule(rules, inner, source.owner)
        found[name] = source.made(rule, like, prefix=prefix, rest=rest, mixer=mixer)
    _tied(source, spec, names, found)
    source.done()
    return found


def _rule(rules: Rules, name: str, owner: str) -> tuple[Source, str]:
    """The rule of the longest prefix of `name`, and what is left of the name."""
    prefix = name
    while prefix not in rules:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            raise BadInput(f"{owner}: its config.json calls for {name}, and no tensor of its kind is known to be it")
    return rules[prefix], name[len(prefix):]


def _tied(source: Tensors, spec: SequenceModel, names: Names, found: Mapping[str, Tensor]) -> None:
    """A head that shares the embeddings may be stored as well, if it says the same."""
    head = f"{names.top.get('head')}.weight"
    if getattr(spec.head, "tie", False) and head in source and not torch.equal(source.take(head), found["stem.weight"]):
        raise BadInput(f"{source.owner} ties the head to the embeddings (tie_word_embeddings), and its {head} differs "
                       "from them; set it to false in config.json if the head is its own")


# Ways to make a parameter ---------------------------------------------------------------------------------------------

def ones(parts: list[Tensor], like: Tensor, mixer: Any) -> Tensor:
    """A factor that is always 1 there, and therefore not stored."""
    return torch.ones(like.shape)


def plus_one(parts: list[Tensor], like: Tensor, mixer: Any) -> Tensor:
    """A factor that is stored as its difference from 1; in float32, since the sum has more digits than its terms."""
    return parts[0].float() + 1 if parts[0].dtype in (torch.bfloat16, torch.float16) else parts[0] + 1


def bare(parts: list[Tensor], like: Tensor, mixer: Any) -> Tensor:
    """The one tensor, whatever our name for it ends in."""
    return parts[0]


# Configurations -------------------------------------------------------------------------------------------------------

def only(config: Config, kind: str, **allowed: tuple) -> None:
    """Raise BadInput if an option has another value than those allowed (the first is what it means when absent)."""
    for name, values in allowed.items():
        found = config.get(name, values[0])
        if found not in values:
            known = " or ".join(repr(value) for value in values)
            raise BadInput(f"{kind} checkpoints are read with {name} = {known}, and this one has {found!r}")


def normalised(config: Config, model_type: str) -> Config:
    """The configuration with every default filled in and old spellings renewed, by transformers' own class.

    Raises: BadInput if that class refuses it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:  # each field's check raises its own kind
        raise BadInput(f"config.json is not one of a {model_type} model: {' '.join(str(error).split())}") from error
    return {name: getattr(made, name) for name in made}


def model(config: Config, blocks: Iterable[Block], eps: float) -> SequenceModel:
    """The language model of these blocks, whose final norm has `eps`."""
    stack = Stack(dim=config["hidden_size"], blocks=tuple(blocks), norm_eps=eps)
    return language_model(vocab=config["vocab_size"], stack=stack, tie=bool(config["tie_word_embeddings"]))
