"""Reads files as rows, with one generator per file format.

Every reader yields ``(place, row)`` and every error names ``file:place``. A place is a line, or the number of the row
if lines do not separate rows (Parquet, a JSON object that contains the rows, JSON on one line). JSON Lines, JSON
arrays, CSV and Parquet are streamed, so these files may be larger than memory.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from ingle.config.data import TAGGED_SUFFIXES
from ingle.errors import DataError
from ingle.wording import first_line

Row = dict[str, Any]
Place = int | str
Rows = Iterator[tuple[Place, Row]]

_CHUNK_BYTES = 1 << 20

#: Keys under which a .json file with a single object contains its rows.
_WRAPPERS = ("data", "rows", "examples", "instances", "train")


def read_rows(path: Path, reader: Callable[[Path], Rows] | None = None) -> Rows:
    """Yields the rows of a file with their places.

    Args:
        path: The file.
        reader: Reads it; by default the suffix decides.

    Raises:
        DataError: The suffix is unknown, or the file is missing, empty, malformed or not UTF-8.
    """
    reader = reader or _READERS.get(data_suffix(path))
    if reader is None:
        raise DataError(
            f"The format of {path.name} is unknown.",
            where=str(path),
            fix=f"use one of {', '.join(known_suffixes())}, each also with .gz; or, for a text in every line, set "
            "lines: true in data.sources",
        )
    empty = True
    try:
        for place, row in reader(path):
            empty = False
            yield place, row
    except FileNotFoundError:
        raise DataError("The data file does not exist.", where=str(path)) from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for damaged files
        raise DataError(
            "The file cannot be read.", where=str(path), why=first_line(error), fix="write or copy the file again"
        ) from error
    if empty:
        raise DataError("The file has no rows.", where=str(path), fix="add rows, or leave the file out")


def data_suffix(path: Path) -> str:
    """Returns the suffix of the format: ``.jsonl`` for ``a.jsonl.gz``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def known_suffixes() -> tuple[str, ...]:
    """Returns the suffixes of data files."""
    return (*_READERS, *TAGGED_SUFFIXES)


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _wrong_encoding(path: Path, line: int, error: UnicodeDecodeError) -> DataError:
    data = error.object[max(error.start - 20, 0) : error.start + 20]
    is_utf16 = error.start == 0 and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    charset, other = ("UTF-16", "LATIN1") if is_utf16 else ("LATIN1", "UTF-16")
    converted = path.with_name(f"utf8-{path.name}")
    return DataError(
        "The file is not UTF-8.",
        where=f"{path}:{line}",
        why=f"byte 0x{error.object[error.start]:02x} in {data!r}",
        fix=f"convert it: iconv -f {charset} -t UTF-8 '{path}' > '{converted}' (or -f {other})",
    )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a text file with their numbers from 1.

    Raises:
        DataError: A line is not UTF-8.
    """
    with _open(path) as file:
        yield from _decode_lines(path, file, 1)


def _decode_lines(path: Path, lines: Iterable[bytes], first: int) -> Iterator[tuple[int, str]]:
    for line, raw in enumerate(lines, first):
        data = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
        try:
            yield line, data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _wrong_encoding(path, line, error) from None


def malformed(path: Path, place: Place, why: str) -> DataError:
    """Returns the error for a row that cannot be read."""
    return DataError("The row is malformed.", where=f"{path}:{place}", why=why, fix="correct or remove the row")


def _as_row(path: Path, place: Place, value: object) -> Row:
    if not isinstance(value, dict):
        raise malformed(path, place, f"a row must be a JSON object, not {type(value).__name__}")
    return value


def _reject_repeats(pairs: list[tuple[str, Any]]) -> Row:
    """Builds a JSON object; refuses duplicate keys, because either value could be meant."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return row


#: Refuses duplicate keys; numbers with thousands of digits, which Python refuses to read, raise ``ValueError`` too.
_DECODER = json.JSONDecoder(object_pairs_hook=_reject_repeats)


def _decode(text: str) -> object:
    """Reads a line; ``decode`` also looks for white space, which is seldom there."""
    if text[0] == "{":
        value, end = _DECODER.raw_decode(text)
        if text[end:] in ("\n", ""):
            return value
    return _DECODER.decode(text)


def _explain(error: ValueError | RecursionError) -> str:
    """Returns why a text could not be read as JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    if "integer string conversion" in str(error):
        return "a number has too many digits"
    return str(error)


def read_json_lines(path: Path, content: bytes, first: int) -> Rows:
    """Yields the rows of a part of a JSON Lines file.

    Args:
        path: The file, for errors.
        content: Complete lines of it.
        first: Number of the first of them.

    Raises:
        DataError: A line is malformed or not UTF-8.
    """
    return _parse_lines(path, _decode_lines(path, io.BytesIO(content), first))


def has_json_lines(path: Path) -> bool:
    """Returns whether parts of a file can be read by :func:`read_json_lines`."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _read_jsonl(path: Path) -> Rows:
    return _parse_lines(path, read_lines(path))


def _parse_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Rows:
    for line, text in lines:
        if not text or text.isspace():
            continue
        try:
            value = _decode(text)
        except (ValueError, RecursionError) as error:
            raise malformed(path, line, _explain(error)) from None
        yield line, _as_row(path, line, value)


def _read_json(path: Path) -> Rows:
    """Reads an array of objects, one object (which may contain such an array), or JSON Lines named ``.json``."""
    lines = (text for _, text in read_lines(path) if text.strip())
    first, is_single = next(lines, "").strip(), next(lines, None) is None
    if first.startswith("["):
        yield from _read_json_array(path)
    elif not is_single and _is_json(first):
        yield from _read_jsonl(path)
    elif first:
        yield from _read_json_object(path)


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass  # a complete line; the reader of lines raises the error
    return True


def _read_json_object(path: Path) -> Rows:
    text = "".join(text for _, text in read_lines(path))
    try:
        row = _as_row(path, 1, _DECODER.decode(text))
    except (ValueError, RecursionError) as error:
        raise malformed(path, getattr(error, "lineno", 1), _explain(error)) from None
    wrapped = [row[name] for name in _WRAPPERS if isinstance(row.get(name), list)]
    if not wrapped:
        yield 1, row
        return
    for number, item in enumerate(wrapped[0], 1):
        yield f"row {number}", _as_row(path, f"row {number}", item)


class _Text:
    """A window of decoded text that moves through a file and counts lines."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.pos, self.line, self.ended = "", 0, 1, False

    def grow(self) -> None:
        data = self._file.read(max(_CHUNK_BYTES, len(self.text)))  # doubling keeps the time for one long row linear
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            lines = self.text.count("\n", self.pos) + error.object[: error.start].count(b"\n")
            raise _wrong_encoding(self._path, self.line + lines, error) from None
        self.text, self.pos, self.ended = self.text[self.pos :] + more, 0, not data

    def advance(self, pos: int) -> None:
        self.line += self.text.count("\n", self.pos, pos)
        self.pos = pos

    def peek(self) -> str:
        """Moves to the next character that is not white space, and returns it; "" at the end."""
        while True:
            pos = self.pos
            while pos < len(self.text) and self.text[pos].isspace():
                pos += 1
            self.advance(pos)
            if pos < len(self.text) or self.ended:
                return self.text[pos : pos + 1]
            self.grow()

    def value(self, number: int) -> object:
        """Reads the next value, which is row ``number``."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.pos)
            except (ValueError, RecursionError) as error:
                if self.ended or not isinstance(error, json.JSONDecodeError):
                    line = self.line + self.text.count("\n", self.pos, getattr(error, "pos", self.pos))
                    raise malformed(self._path, line, f"row {number}: {_explain(error)}") from None
                self.grow()
            else:
                self.advance(end)
                return value


def _read_json_array(path: Path) -> Rows:
    """Reads an array of rows. Places are lines, unless the second row begins on the line of the first."""
    with _open(path) as file:
        window = _Text(path, file)
        window.peek()
        window.advance(window.pos + 1)
        number, in_lines = 0, True
        pending: tuple[Place, Row] | None = None  # the first row, until the second decides what places are
        while (char := window.peek()) != "]":
            line, number = window.line, number + 1
            if number == 2:
                assert pending is not None, "there was a first row"
                in_lines = pending[0] != line
                yield (pending[0] if in_lines else "row 1"), pending[1]
            place: Place = line if in_lines else f"row {number}"
            if char != "{":
                raise malformed(path, place, f"row {number}: expected an object, found {char or 'the end of file'!r}")
            row = _as_row(path, place, window.value(number))
            if number == 1:
                pending = (line, row)
            else:
                yield place, row
            if window.peek() == ",":
                window.advance(window.pos + 1)
            elif window.peek() != "]":
                raise malformed(path, window.line, f"expected ',' or ']' after row {number}")
        if number == 1 and pending is not None:
            yield pending


def _read_delimited(path: Path, delimiter: str) -> Rows:
    # Fields of text datasets are often longer than csv's default limit of 128 KiB.
    csv.field_size_limit(1 << 30)
    reader = csv.reader((text for _, text in read_lines(path)), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise malformed(path, 1, f"a column name occurs twice: {', '.join(header)}")
        line = reader.line_num + 1
        for values in reader:
            if len(values) == len(header):
                yield line, dict(zip(header, values, strict=True))
            elif values:
                raise malformed(path, line, f"{len(values)} fields, but the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise malformed(path, line, str(error)) from None


def _read_text(path: Path) -> Rows:
    """Reads a file as one document."""
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, 1 + error.object.count(b"\n", 0, error.start), error) from None
    del data  # it is as large as the text
    if not text.isspace() and text:
        yield 1, {"text": text}


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with _open(path) as file:
            source = parquet.ParquetFile(pyarrow.BufferReader(file.read()) if path.suffix.lower() == ".gz" else path)
            names = source.schema_arrow.names
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise DataError(f"The column {twice[0]!r} occurs twice.", where=str(path), fix="rename one of them")
            number = 0
            for batch in source.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (
        pyarrow.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # OverflowError: values outside of Python's range, such as dates
        raise DataError(
            "The file is not Parquet, or it is damaged.",
            where=str(path),
            why=first_line(error),
            fix="write or copy the file again",
        ) from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
