"""Specs: frozen dataclasses that say what is computed, and their way to and from dictionaries and YAML.

A nested spec is stored as a dictionary with its name under "kind" and every field written out. Names resolve through
an explicit table handed in by the caller; nothing is imported by string and nothing registers itself.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from seqloom.core.errors import BadInput, near

KIND = "kind"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of the specs of sequence mixers: what a law or a listing may ask of any of them.

    key:            its name in the table, in files and on the command line
    forms:          how it may be computed, the definition first
    prefer:         automatic choice of form, best first
    causal:         the future never moves the past
    streams:        carries a state from call to call
    constant_state: the state's size does not depend on the length
    examples:       settings under which the laws are tested at width 32, by name
    lacks:          law -> why it does not apply (stated here, never in a test's skip list)
    """

    key: ClassVar[str] = ""
    forms: ClassVar[Mapping[str, Any]] = {}
    prefer: ClassVar[tuple[str, ...]] = ("fused", "chunked", "parallel")
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""

    @classmethod
    def name(cls) -> str:
        return cls.key

    @property
    def causal(self) -> bool:
        return getattr(self, "direction", "causal") == "causal"

    @property
    def streams(self) -> bool:
        return self.causal

    @property
    def constant_state(self) -> bool:
        return self.streams

    @property
    def lacks(self) -> Mapping[str, str]:
        return {}


def to_dict(spec: Any, kinds: Mapping[str, type]) -> Any:
    """Plain data (dict, list, str, number, bool, None) for a spec, all fields written out."""
    if dataclasses.is_dataclass(spec):
        names = {cls: name for name, cls in kinds.items()}
        if type(spec) not in names:
            raise BadInput(f"{type(spec).__name__} is not in the table of kinds, so it cannot be saved")
        values = {field.name: to_dict(getattr(spec, field.name), kinds) for field in dataclasses.fields(spec)}
        if KIND in values:
            raise BadInput(
                f"{type(spec).__name__} has a field called {KIND!r}, which is where a spec's name is stored; rename it"
            )
        return {KIND: names[type(spec)], **values}
    if isinstance(spec, (tuple, list)):
        return [to_dict(item, kinds) for item in spec]
    if isinstance(spec, Mapping):
        return {key: to_dict(value, kinds) for key, value in spec.items()}
    if spec is None or isinstance(spec, (str, int, float, bool)):
        return spec
    raise BadInput(f"a spec may hold numbers, strings, tuples and specs, not {type(spec).__name__}")


def from_dict(data: Any, kinds: Mapping[str, type], where: str = "", lines: Mapping[str, int] | None = None) -> Any:
    """The spec that `data` describes. Unknown kinds and fields are errors with a near-name hint and, from YAML, a line."""
    place = lambda path: f"{path or 'the spec'}" + (f" (line {lines[path]})" if lines and path in lines else "")  # noqa: E731
    if isinstance(data, Mapping) and KIND in data:
        kind = data[KIND]
        if kind not in kinds:
            raise BadInput(f"{place(where)}: no kind {kind!r}; {near(str(kind), kinds)}")
        cls = kinds[kind]
        known = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in data.items():
            if key == KIND:
                continue
            path = f"{where}.{key}" if where else key
            if key not in known:
                raise BadInput(f"{place(path)}: {kind} has no setting {key!r}; {near(key, known)}")
            value = from_dict(value, kinds, path, lines)
            values[key] = _checked(value, hints[key], place(path))
        missing = [
            field.name
            for field in known.values()
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise BadInput(f"{place(where)}: {kind} needs {', '.join(missing)}")
        try:
            return cls(**values)
        except BadInput:
            raise
        except (TypeError, ValueError) as error:
            raise BadInput(f"{place(where)}: {error}") from error
    if isinstance(data, (list, tuple)):
        return tuple(from_dict(item, kinds, f"{where}[{i}]", lines) for i, item in enumerate(data))
    if isinstance(data, Mapping):
        return {key: from_dict(value, kinds, f"{where}.{key}" if where else str(key), lines) for key, value in data.items()}
    return data


def _checked(value: Any, hint: Any, place: str) -> Any:
    """`value` if it fits the annotation (an int is taken for a float), else an error that says what was expected."""
    if not _fits(value, hint):
        raise BadInput(f"{place}: expected {_shown(hint)}, found {value!r}")
    return float(value) if hint is float else value


def _shown(hint: Any) -> str:
    """An annotation as a user reads it."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_shown, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (tuple, list)):
            return False
        if len(items) == 2 and items[1] is Ellipsis:
            return all(_fits(item, items[0]) for item in value)
        return len(items) == len(value) and all(map(_fits, value, items))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is not None:
        return isinstance(value, origin) if isinstance(origin, type) else True
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def load_yaml(text: str, name: str = "the YAML") -> tuple[Any, dict[str, int]]:
    """Data of a YAML text, and the line (from 1) of each dotted path in it. Duplicate keys and bad syntax are errors."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{name}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    lines: dict[str, int] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                child = f"{path}.{key.value}" if path else str(key.value)
                if key.value in seen:
                    raise BadInput(f"{name}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
                seen.add(key.value)
                lines[child] = key.start_mark.line + 1
                walk(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[f"{path}[{i}]"] = value.start_mark.line + 1
                walk(value, f"{path}[{i}]")

    if root is not None:
        walk(root, "")
    try:
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:  # tags that would build objects
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{name}{line}: not plain YAML: {getattr(error, 'problem', None) or error}") from error


# Format versions ------------------------------------------------------------------------------------------------

FORMAT = 1
# UPGRADES[n] turns data of format n into data of format n + 1. Every format change ships one, and a tiny checkpoint
# of each released format stays in tests/.
UPGRADES: dict[int, typing.Callable[[dict], dict]] = {}


def pack(spec: Any, kinds: Mapping[str, type]) -> dict:
    """A spec with its format version, ready for JSON."""
    return {"format": FORMAT, "spec": to_dict(spec, kinds)}


def unpack(data: Mapping[str, Any], kinds: Mapping[str, type], name: str = "this checkpoint") -> Any:
    """The spec stored by `pack`, upgraded from older formats; only a newer one is refused."""
    version = data.get("format")
    if not isinstance(version, int) or "spec" not in data:
        raise BadInput(f"{name} holds no seqloom spec: 'format' and 'spec' are expected")
    if version > FORMAT:
        raise BadInput(f"{name} has format {version}, newer than this seqloom reads ({FORMAT}); upgrade seqloom")
    stored = dict(data["spec"])
    for older in range(version, FORMAT):
        stored = UPGRADES[older](stored)
    return from_dict(stored, kinds)
