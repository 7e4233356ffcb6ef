"""What every importer of foreign weights shares: taking tensors by their foreign names, and reading configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from seqloom.core import BadInput
from seqloom.models import SequenceModel

Config = Mapping[str, Any]


class Layout(NamedTuple):
    """How one kind of checkpoint is read.

    spec:    its config.json -> the model it describes; raises BadInput for an option that has no counterpart
    tensors: (its tensors, that model) -> tensors by the names of a `SequenceModel`
    """

    spec: Callable[[Config], SequenceModel]
    tensors: Callable[[Tensors, SequenceModel], dict[str, Tensor]]


class Tensors:
    """Tensors by foreign names, each to be taken once; what is left over at the end was not understood."""

    def __init__(self, tensors: Mapping[str, Tensor], owner: str):
        self.tensors, self.owner = dict(tensors), owner

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BadInput(f"{self.owner} has no tensor {name}, which its config.json calls for")
        return self.tensors.pop(name)

    def drop(self, *endings: str) -> None:
        """Tensors that say nothing which the configuration does not."""
        for name in [name for name in self.tensors if name.endswith(endings)]:
            del self.tensors[name]

    def done(self) -> None:
        if self.tensors:
            raise BadInput(f"{self.owner} has {len(self.tensors)} tensors that its config.json does not call for, "
                           f"such as {min(self.tensors)}")


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
