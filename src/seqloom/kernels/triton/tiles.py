"""Tile configurations of the Triton kernels: data, shipped per family of cards, with the user's own on top.

A kernel's file says

    CONFIGS = Tiles("delta_scan", hopper={(64, 2): Config(Tile(..), ..), ..})

and reads CONFIGS[key] when it launches; a Config is a NamedTuple of passes, each a NamedTuple of whole numbers. Nothing is
tuned while a program runs. `seqloom bench --tune` writes what it finds best on the card it runs on to `user_file()`:

    {"NVIDIA H100 80GB HBM3": {"delta_scan": {"(64, 2)": {"system": [64, 0, 4, 1], ..}, ..}}}

which the kernels read once a process, at their first launch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch

from seqloom.core import BadInput

log = logging.getLogger("seqloom.kernels")
VARIABLE = "SEQLOOM_TILES"
# NVIDIA's compute capability, first number: family. The nearest measured one stands in for the others
FAMILIES = {7: "turing", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}
AGE = ("turing", "ampere", "hopper", "blackwell")


class Tiles(MutableMapping):
    """key -> Config on this process's card. Keyword arguments: the shipped tables by family; at least one."""

    def __init__(self, kernel: str, **families: dict[Any, Any]):
        self.kernel, self.families = kernel, families
        self._table: dict[Any, Any] | None = None

    @property
    def table(self) -> dict[Any, Any]:
        if self._table is None:
            self._table = self._resolve(card())
        return self._table

    def _resolve(self, card: tuple[str, str] | None) -> dict[Any, Any]:
        if card is None:  # interpreted on a CPU, or compiled for a card that is elsewhere
            return dict(next(iter(self.families.values())))
        name, family = card
        taken = nearest(family, tuple(self.families))
        if taken != family:
            say_once(f"the Triton kernels have tiles measured on {', '.join(self.families)} and none for {name} ({family}): it "
                     f"takes those of {taken}; `seqloom bench --tune` finds its own")
        table = dict(self.families[taken])
        own = user_tiles().get(name, {}).get(self.kernel, {})
        for key, config in table.items():
            if str(key) in own:
                table[key] = self._own(config, own[str(key)], str(key))
        return table

    def _own(self, config: Any, own: dict[str, list[int]], key: str) -> Any:
        """`config` with the user's tiles; as it is where those are of other passes (an older version's file)."""
        passes = {name: getattr(config, name) for name in config._fields}
        fit = isinstance(own, dict) and own.keys() == passes.keys()
        if not fit or any(len(tile) != len(passes[name]) for name, tile in own.items()):
            say_once(f"{user_file()}: {self.kernel} {key} has other passes than this version and is not used; "
                     "`seqloom bench --tune` makes a new one")
            return config
        return config._replace(**{name: type(passes[name])(*tile) for name, tile in own.items()})

    def __getitem__(self, key: Any) -> Any:
        return self.table[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.table[key] = value

    def __delitem__(self, key: Any) -> None:
        del self.table[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


def card() -> tuple[str, str] | None:
    """(name, family) of the CUDA card in use; None where there is none."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    if torch.version.hip:
        return name, "amd"
    return name, FAMILIES.get(torch.cuda.get_device_capability()[0], "unknown")


def nearest(family: str, known: tuple[str, ...]) -> str:
    """The family of `known` that is nearest in age; the first where the age is not known."""
    if family in known:
        return family
    if family not in AGE:
        return known[0]
    return min(known, key=lambda other: abs(AGE.index(other) - AGE.index(family)) if other in AGE else len(AGE))


def user_file() -> Path:
    """Where the user's own tiles are: $SEQLOOM_TILES, or seqloom/tiles.json in the folder of settings."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if sys.platform == "win32":
        home = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    else:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "seqloom" / "tiles.json"


@functools.lru_cache(maxsize=1)
def user_tiles() -> dict[str, Any]:
    """What `user_file()` holds; nothing where there is none. Raises: BadInput for a file that is not such a table."""
    path = user_file()
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as tiles ({error}); delete it, or run `seqloom bench --tune` again") from error
    if not isinstance(data, dict) or not all(isinstance(each, dict) for each in data.values()):
        raise BadInput(f"{path} holds no tiles: a table by card is expected; delete it, or run `seqloom bench --tune` again")
    return data


def write(name: str, kernel: str, table: MutableMapping) -> Path:
    """Store `table` as the user's tiles of `kernel` on the card `name`, beside what the file holds already."""
    user_tiles.cache_clear()
    data, path = user_tiles(), user_file()
    data.setdefault(name, {})[kernel] = {
        str(key): {field: list(getattr(config, field)) for field in config._fields} for key, config in table.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    user_tiles.cache_clear()
    return path


@functools.cache
def say_once(sentence: str) -> None:
    log.warning(sentence)
