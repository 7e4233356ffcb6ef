"""Options of a verb: a dataclass, filled from `--config file.yaml` and then from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from seqloom.core import BadInput, load_yaml, near
from seqloom.core.spec import _fits

Options = TypeVar("Options")


def parse(options: type[Options], argv: list[str], *, verb: str) -> Options:
    """The options of `verb` from `argv`. A YAML file given with --config sets defaults that later words override."""
    import tyro

    argv, path = _config(argv)
    default = read_config(options, path) if path is not None else None
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            kwargs = {} if default is None else {"default": default}
            return tyro.cli(options, args=argv, prog=f"seqloom {verb}", description=options.__doc__, **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            print(out.getvalue(), end="")
            raise SystemExit(0) from None
        raise BadInput(f"{verb}: {_sentence(err.getvalue() or out.getvalue())}") from None


def _config(argv: list[str]) -> tuple[list[str], Path | None]:
    rest, path = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            value = next(words, None)
            if value is None:
                raise BadInput("--config needs a YAML file after it")
            path = Path(value)
        elif word.startswith("--config="):
            path = Path(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, path


def read_config(options: type[Options], path: Path) -> Options:
    """`options` from a YAML file; an unknown key or a value of the wrong type is an error that names the line."""
    if not path.is_file():
        raise BadInput(f"no file {path} (--config)")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not UTF-8") from error
    data, lines = load_yaml(text, str(path))
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected 'option: value' lines, found {type(data).__name__}")
    known = {field.name: field for field in dataclasses.fields(options) if field.init}
    hints = typing.get_type_hints(options)
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise BadInput(f"{path}, line {lines[str(key)]}: no option {key!r}; {near(name, known)}")
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])):
            value = Path(value)
        if not _fits(value, hints[name]):
            raise BadInput(f"{path}, line {lines[str(key)]}: {key} cannot be {value!r}")
        values[name] = value
    missing = [
        field.name for field in known.values()
        if field.name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in missing:  # may still come from the command line
        import tyro

        values[name] = tyro.MISSING
    return options(**values)


def _sentence(text: str) -> str:
    """What the parser drew as a box, as one sentence."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"[│╭╮╰╯─┃━┏┓┗┛]+", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not set(line) <= set("-= ")]
    words = " ".join(lines)
    words = re.sub(r"^(Parsing error|Unrecognized options|Required options|Invalid choice|Error)\s+", "", words)
    return re.sub(r"\s+", " ", words).replace(": :", ":").strip() or "the options could not be read"


def stderr(*words: object) -> None:
    print(*words, file=sys.stderr)
