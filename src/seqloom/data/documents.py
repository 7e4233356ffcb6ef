"""Documents from the user's files: text, jsonl, csv, parquet, folders, data sets of the hub, the standard library.

A document has a name, which decides whether it is held out, and parts: stretches of text that are learnt from or only read
(the prompt of a completion, the user's turns of a chat).
"""

from __future__ import annotations

import csv
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqloom.core import BadInput, near, require_extra

TEXT = {".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".ts", ".html", ".css", ".json", ".yaml", ".yml", ".toml", ".tex", ".log", ".sh"}
TABLES = {".jsonl", ".csv", ".parquet"}
PIECE = 8192  # characters: a single text file is cut at blank lines into documents of about this size
STDLIB_SKIP = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idle_test"}


@dataclass(frozen=True)
class Document:
    """`parts`: (text, learnt). `name` is unique in its source and independent of order."""

    name: str
    parts: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


def documents(source: str, *, column: str | None = None) -> Iterator[Document]:
    """All documents of `source`: a path, "stdlib", or "hf:NAME" for a data set of the Hugging Face hub.

    Raises: BadInput, as soon as the offending file or row is met.
    """
    if source == "stdlib":
        yield from _standard_library()
    elif source.startswith("hf:"):
        datasets = require_extra("datasets", "data", f"reading {source}")
        rows = datasets.load_dataset(source.removeprefix("hf:"), split="train", streaming=True)
        yield from _rows(((str(i), row) for i, row in enumerate(rows)), source, column)
    else:
        yield from _path(Path(source), column)


def held_out(sizes: dict[str, int], share: float) -> set[str]:
    """The documents held out of those in `sizes` (bytes by name): in the order of a digest of their names, as many as fit
    into `share` of the bytes.

    So order does not matter, and no position inside a document does. A document of more than a fifth of the room is
    passed over, so that the held-out side is many documents, not one; both sides get at least one of several documents.
    """
    ranked = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    room = share * sum(sizes.values())
    held, used = set(), 0
    for name in ranked:
        if sizes[name] <= room / 5 and used + sizes[name] <= room:
            held.add(name)
            used += sizes[name]
    if not held and share > 0 and len(ranked) > 1:
        held = {min(ranked, key=sizes.__getitem__)}
    return held


def _path(path: Path, column: str | None) -> Iterator[Document]:
    if not path.exists():
        raise BadInput(f"no file or folder {path}; --data takes a file, a folder, 'stdlib' or 'hf:NAME'")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT | TABLES)
        if not files:
            raise BadInput(f"the folder {path} holds no text: {', '.join(sorted(TEXT | TABLES))} are read")
        found = False
        for file in files:
            if file.stat().st_size:
                found = True
                yield from _file(file, str(file.relative_to(path)), column, alone=len(files) == 1)
        if not found:
            raise BadInput(f"all {len(files)} files of {path} are empty")
        return
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty")
    yield from _file(path, path.name, column, alone=True)


def _file(path: Path, name: str, column: str | None, *, alone: bool) -> Iterator[Document]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _rows(_json_lines(path, name), name, column)
    elif kind == ".csv":
        yield from _rows(_csv_rows(path, name), name, column)
    elif kind == ".parquet":
        yield from _rows(_parquet_rows(path, name), name, column)
    elif alone:
        yield from _pieces(_read(path), name)
    else:
        yield Document(name, ((_read(path), True),))


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from error


def _pieces(text: str, name: str) -> Iterator[Document]:
    """One text as documents of about PIECE characters, cut at blank lines (at line ends where there are none)."""
    for mark in ("\n\n", "\n"):
        if text.count(mark) * PIECE >= len(text) or mark == "\n":
            break
    piece, start = "", 0
    for part in text.splitlines(keepends=True) if mark == "\n" else _split_keep(text, mark):
        piece += part
        if len(piece) >= PIECE:
            yield Document(f"{name}#{start}", ((piece, True),))
            start, piece = start + len(piece), ""
    if piece:
        yield Document(f"{name}#{start}", ((piece, True),))


def _split_keep(text: str, mark: str) -> list[str]:
    parts = text.split(mark)
    return [part + mark for part in parts[:-1]] + parts[-1:]


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{path} is not UTF-8: byte {offset + error.start} (line {number})") from error
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise BadInput(f"{path}, line {number}: expected an object with named values, found {type(row).__name__}")
            yield f"{name}#{number}", row


def _csv_rows(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(_read(path).splitlines(keepends=True))
    for number, row in enumerate(reader, 1):
        yield f"{name}#{number}", row


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    parquet = require_extra("pyarrow.parquet", "data", f"reading {path}")
    arrow = require_extra("pyarrow", "data", f"reading {path}")
    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise BadInput(f"{path} is not a parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{name}#{number}", row


def _rows(rows: Iterator[tuple[str, dict]], name: str, column: str | None) -> Iterator[Document]:
    """Rows of a table: the text column, a prompt with its completion, or the messages of a chat."""
    for key, row in rows:
        if column is None and "messages" in row:
            yield Document(key, _chat(row["messages"], key))
            continue
        if column is None and "prompt" in row and "completion" in row:
            yield Document(key, ((str(row["prompt"]), False), (str(row["completion"]), True)))
            continue
        wanted = column or "text"
        if wanted not in row:
            names = [str(field) for field in row]
            hint = near(wanted, names)
            listed = "" if hint.startswith("known") else f" (columns: {', '.join(names)})"
            raise BadInput(f"{name} has no column {wanted!r}; {hint}{listed}; name one with --column")
        if row[wanted]:
            yield Document(key, ((str(row[wanted]), True),))


def _chat(messages: Any, key: str) -> tuple[tuple[str, bool], ...]:
    """Turns as "role: content" paragraphs; what the assistant says is learnt, the rest is read."""
    parts = []
    if not isinstance(messages, list):
        raise BadInput(f"{key}: 'messages' must be a list of {{role, content}}, found {type(messages).__name__}")
    for turn in messages:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise BadInput(f"{key}: every message needs 'role' and 'content', found {turn!r}")
        answer = turn["role"] == "assistant"
        parts += [(f"{turn['role']}: ", False), (f"{turn['content']}\n\n", answer)]
    return tuple(parts)


def _standard_library() -> Iterator[Document]:
    """The Python standard library's own source text, without its tests: a real corpus on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if STDLIB_SKIP.intersection(inside.parts) or not path.stat().st_size:
            continue
        try:
            yield Document(inside.as_posix(), ((path.read_text(encoding="utf-8"), True),))
        except UnicodeDecodeError:  # a handful of files declare another encoding
            continue
