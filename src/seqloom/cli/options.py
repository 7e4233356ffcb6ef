"""Options of a verb: a dataclass, filled from `--config file.yaml` and then from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from seqloom.core import BadInput, load_yaml, near
from seqloom.core.spec import _fits

Options = TypeVar("Options")


def parse(options: type[Options], argv: list[str], *, verb: str) -> Options:
    """The options of `verb` from `argv`. A YAML file given with --config sets defaults that later words override."""
    import tyro

    argv, path = _config(argv)
    _known(options, argv, verb)
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


def _known(options: type, argv: list[str], verb: str) -> None:
    """Raise BadInput, with the nearest option, for a word that looks like an option and is none."""
    hints = typing.get_type_hints(options)
    known = {"--help"}
    for field in dataclasses.fields(options):
        option = field.name.replace("_", "-")
        known |= {f"--{option}", f"--no-{option}"} if hints[field.name] is bool else {f"--{option}"}
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name != "--" and name not in known:
            raise BadInput(f"{verb}: no option {name}; {near(name, known)}")


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
        if isinstance(value, str) and float in (hints[name], *typing.get_args(hints[name])):
            with contextlib.suppress(ValueError):  # YAML reads 2e-3, without a point, as text
                value = float(value)
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
    """What the parser drew as a box, as one sentence without its repetitions."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [re.sub(r"[│╭╮╰╯─┃━┏┓┗┛]+", " ", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not set(line) <= set("-= ")]
    words = " ".join(lines)
    words = re.sub(r"\s+", " ", words).strip()
    words = re.sub(r"\.? For full helptext, (run|see):? .*$", "", words)
    words = re.sub(r"^(Parsing error|Required options|Invalid choice|Value error|Missing argument|Error) ", "", words)
    words = re.sub(r"^Unrecognized options:? (Unrecognized options: )?", "not understood: ", words)
    words = re.sub(r"^Error parsing [A-Z]\w+: ", "", words)  # what the options' own checks found
    words = re.sub(r"^Missing from seqloom \w+: (.*?) ?\(required\)$", r"missing: \1", words)
    wrong = re.match(r"Error parsing (--\S+): (.*?)(?: Argument helptext: \1 (\S+).*)?$", words)
    if wrong:
        value = re.search(r"from \['?(.*?)'?\]|: '(.*?)'$", wrong[2])
        given = next(filter(None, value.groups()), "") if value else None
        words = f"{wrong[1]} cannot be {given!r}" if given is not None else f"{wrong[1]}: {wrong[2]}"
        words += f"; it takes {wrong[3]}" if wrong[3] else ""
    return words or "the options could not be read"


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Around work that fills `folder`: if it fails, what stayed empty is removed, so that nothing is left of bad input."""
    new = [each for each in (folder / "data", folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        for each in new:
            with contextlib.suppress(OSError):  # not empty: it holds something worth keeping
                each.rmdir()
        raise


def at_least(least: int, **values: int | None) -> None:
    """Raise BadInput for an option below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise BadInput(f"--{name} must be at least {least}, not {value}")


def device_of(name: str) -> str:
    """`name`, if tensors can be made there. Raises: BadInput otherwise."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def stderr(*words: object) -> None:
    print(*words, file=sys.stderr)
