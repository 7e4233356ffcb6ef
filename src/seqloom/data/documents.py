"""Documents from the user's files: text, jsonl, csv, parquet, folders, data sets of the hub, the standard library.

A document is what is held out or trained on as a whole, and never sees another. Its parts are stretches of text that are
learnt from or only read (the prompt of a completion, the user's turns of a chat). Files are read in pieces, never whole
where they are large, so that data larger than memory streams.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqloom.core import BadInput, near, require_extra
from seqloom.data.chat import chat_parts

TEXT = {
    ".txt", ".text", ".md", ".rst", ".tex", ".log", ".org", ".adoc", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu",
    ".rs", ".go", ".java", ".kt", ".swift", ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs",
    ".ml", ".scala", ".sql", ".sh", ".html", ".xml", ".css", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".srt", ".vtt",
    ".fasta", ".fa",
}
TABLES = {".jsonl", ".csv", ".tsv", ".parquet"}
PIECE = 8192  # characters: a text that stands alone is cut at blank lines into documents of at least this size
LARGE = 2**26  # bytes: a file of a folder above this size is cut as if it stood alone
READ = 2**20  # bytes read at a time
STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIP = {"__pycache__", "node_modules"}  # and what is hidden


@dataclass(frozen=True)
class Document:
    """name: where it is, for messages. parts: (text, learnt), tokenised one by one; a text of None is the token that ends a
    document or a turn. ends: False where the text goes on in the next document."""

    name: str
    parts: tuple[tuple[str | None, bool], ...]
    ends: bool = True
    chat: bool = False

    @property
    def text(self) -> str:
        return "".join(text or "" for text, _ in self.parts)

    def digest(self) -> int:
        """64 bits of its content. Equal documents fall on the same side of a split, whatever their names and order."""
        return int.from_bytes(hashlib.blake2b(self.text.encode(), digest_size=8).digest(), "big")


def documents(source: str, *, column: str | None = None, template: str | None = None) -> Iterator[Document]:
    """All documents of `source`, in an order that does not change: a path, "stdlib" (the standard library's own source), or
    "hf:NAME" (or "hf:NAME:CONFIGURATION") for the train split of a Hugging Face data set.

    A text file that stands alone is cut at blank lines; a file of a folder, or a row of a table, is one document. Rows hold
    text in `column` ("text" unless given), or "prompt" and "completion", or "messages", which `template` (Jinja; a plain one
    by default) turns into text.

    Raises: BadInput, as soon as the offending file or row is met, naming it.
    """
    if source == "stdlib":
        yield from _standard_library()
    elif source.startswith("hf:"):
        yield from _hub(source, column, template)
    else:
        yield from _path(Path(source), column, template)


def split(digests: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out, as bool [n], from their content digests (uint64) and sizes in bytes.

    In the order of their digests, as many as fit into `share` of all bytes: neither names, nor order, nor positions count, and
    a copy of a document is on its side too. A document above a fifth of the room is never held out, so that the held-out side
    is many documents, not one; where that leaves none, the smallest is.
    """
    room = share * sizes.sum()
    fits = sizes <= room / 5
    order = np.argsort(digests, kind="stable")
    order = order[fits[order]]
    within = order[np.cumsum(sizes[order]) <= room]
    if len(within):
        # as a threshold, and without the copies of one that did not fit any more
        left = order[len(within) :]
        last = digests[within].max()
        if len(left) and digests[left].min() <= last:
            last -= np.uint64(1)
        held = fits & (digests <= last)
        if held.any():
            return held
    held = np.zeros(len(sizes), bool)
    if share > 0 and len(np.unique(digests)) > 1:
        held = digests == digests[np.lexsort((digests, sizes))[0]]
    return held


# Files and folders ------------------------------------------------------------------------------------------------


def _path(path: Path, column: str | None, template: str | None) -> Iterator[Document]:
    if not path.exists():
        raise BadInput(f"no file or folder {path}; --data takes a file, a folder, 'stdlib' or 'hf:NAME'")
    if not path.is_dir():
        if path.stat().st_size == 0:
            raise BadInput(f"{path} is empty")
        yield from _file(path, path.name, column, template, alone=True)
        return
    files = files_of(path)
    if not files:
        raise BadInput(f"the folder {path} holds no text: {', '.join(sorted(TEXT | TABLES))} are read")
    full = [file for file in files if file.stat().st_size]
    if not full:
        raise BadInput(f"all {len(files)} text files of {path} are empty")
    for file in full:
        yield from _file(file, file.relative_to(path).as_posix(), column, template, alone=len(full) == 1)


def files_of(path: Path) -> list[Path]:
    """The files that are read of a path, in order: all of a folder but hidden ones and caches."""
    if not path.is_dir():
        return [path]
    found = []
    for file in path.rglob("*"):
        passed = any(part in SKIP or part.startswith(".") for part in file.relative_to(path).parts)
        if not passed and file.suffix.lower() in TEXT | TABLES and file.is_file():
            found.append(file)
    return sorted(found)


def _file(path: Path, name: str, column: str | None, template: str | None, *, alone: bool) -> Iterator[Document]:
    kind = path.suffix.lower()
    if kind == ".jsonl":
        yield from _rows(_json_lines(path, name), column, template)
    elif kind in (".csv", ".tsv"):
        yield from _rows(_csv_rows(path, name, "," if kind == ".csv" else "\t"), column, template)
    elif kind == ".parquet":
        yield from _rows(_parquet_rows(path, name, column), column, template)
    elif alone or path.stat().st_size > LARGE:
        yield from _pieces(_decoded(path), name)
    else:
        text = "".join(_decoded(path))
        if text:
            yield Document(name, ((text, True),))


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file in pieces, without a byte order mark. Raises: BadInput with the offset of a byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    done = 0  # bytes given to the decoder, of which it may hold the last few back
    with path.open("rb") as file:
        while True:
            data = file.read(READ)
            before = done - len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at, byte = before + error.start, error.object[error.start]
                raise BadInput(f"{path} is not UTF-8: byte {at} is {byte:#04x} ({error.reason})") from error
            if before == 0:
                text = text.removeprefix("\ufeff")
            done += len(data)
            if text:
                yield text
            if not data:
                return


def _lines(text: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, cut at "\\n" alone: other breaks may stand inside a value."""
    rest = ""
    for piece in text:
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest


def _pieces(text: Iterable[str], name: str) -> Iterator[Document]:
    """One text as documents of PIECE to 2 PIECE characters, cut after a blank line, or a line, or anywhere where there is
    none."""
    rest, start = "", 0
    for more in text:
        rest += more
        at = 0
        while len(rest) - at > 2 * PIECE:
            cut = at + 2 * PIECE
            for mark in ("\n\n", "\n"):
                found = rest.find(mark, at + PIECE, at + 2 * PIECE)
                if found >= 0:
                    cut = found + len(mark)
                    break
            yield Document(f"{name}, character {start + at}", ((rest[at:cut], True),), ends=False)
            at = cut
        rest, start = rest[at:], start + at
    if rest:
        yield Document(f"{name}, character {start}", ((rest, True),))


# Tables -----------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, name: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_lines(_decoded(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path}, line {number}: expected an object with named values, found {type(row).__name__}")
        yield f"{name}, line {number}", row


def _csv_rows(path: Path, name: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(2**31 - 1)  # the library's own limit of 128 KiB is less than a long text
    reader = csv.DictReader(_lines(_decoded(path)), delimiter=delimiter)
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            row.pop(None, None)  # cells beyond the header
            yield f"{name}, row {number}", row
    except csv.Error as error:
        raise BadInput(f"{path}, line {reader.line_num}: not readable as a table: {error}") from error
    if not number:
        raise BadInput(f"{path} has a header and no rows")


def _parquet_rows(path: Path, name: str, column: str | None) -> Iterator[tuple[str, dict]]:
    parquet = require_extra("pyarrow.parquet", "data", f"reading {path}")
    arrow = require_extra("pyarrow", "data", f"reading {path}")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [each for each in ([column] if column else ["messages", "prompt", "completion", "text"]) if each in names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (arrow.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path} is not a readable parquet file: {_first_line(error)}") from error


def _hub(source: str, column: str | None, template: str | None) -> Iterator[Document]:
    """A data set by the `datasets` library: fetched once, memory-mapped after that."""
    datasets = require_extra("datasets", "data", f"reading {source}")
    name, config = source.removeprefix("hf:"), None
    if ":" in name and not Path(name).exists():
        name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config, split="train")
    except Exception as error:  # of many kinds: no such name, no network, no train split, several configurations
        raise BadInput(f"the data set {source} cannot be loaded: {_first_line(error)}") from error
    yield from _rows(((f"{source}, row {i}", row) for i, row in enumerate(rows, 1)), column, template)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rows(rows: Iterator[tuple[str, dict]], column: str | None, template: str | None) -> Iterator[Document]:
    """Rows of a table: the text column, a prompt with its completion, or the messages of a chat. Empty rows are passed over."""
    for key, row in rows:
        if column is None and row.get("messages") is not None:
            yield Document(key, chat_parts(row["messages"], key, template), chat=True)
        elif column is None and {"prompt", "completion"} <= row.keys():
            parts = ((_text(row, "prompt", key), False), (_text(row, "completion", key), True))
            if parts[1][0]:
                yield Document(key, tuple(part for part in parts if part[0]))
        else:
            wanted = column or "text"
            if wanted not in row:
                names = [str(field) for field in row]
                hint = near(wanted, names)
                listed = "" if hint.startswith("known") else f" (columns: {', '.join(names)})"
                raise BadInput(f"{key}: no column {wanted!r}; {hint}{listed}; name one with --column")
            text = _text(row, wanted, key)
            if text:
                yield Document(key, ((text, True),))


def _text(row: dict, column: str, key: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        raise BadInput(f"{key}: column {column!r} holds a {type(value).__name__}, not text")
    return str(value)


# The standard library ---------------------------------------------------------------------------------------------


def _standard_library() -> Iterator[Document]:
    """The Python standard library's own source text, without its tests: a real corpus on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if STDLIB_SKIP.intersection(inside.parts) or not path.stat().st_size:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of files declare another encoding
            continue
        yield Document(inside.as_posix(), ((text, True),))
