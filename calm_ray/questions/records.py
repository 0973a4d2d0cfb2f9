"""Reads records from files row by row, so that a file of any size takes the memory of one row or one batch.

A record carries its row number, from 1: the line of a JSONL file, the element of a JSON list, the row of a table
(not counting the header).
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from calm_ray.core.errors import BadRow, InputError
from calm_ray.core.safety import as_input_error
from calm_ray.questions.hub import HUB, hub_rows

BATCH = 1_000
"""Rows of a Parquet file held in memory at a time."""

_CHUNK = 1 << 20
_LONGEST_ROW = 16 << 20
"""In characters or bytes; a longer row cannot be a question and would fill the memory."""
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"\s*")

# BMLAMA's Chinese files were published with a tab inside a column name, so their header has one cell too many.
_BROKEN_HEADERS: dict[tuple[str, ...], list[str]] = {
    ("Prompt", "Ans", "Candidate", "Ans", "Subject"): ["Prompt", "Ans", "Candidate Ans", "Subject"],
}


@dataclass(frozen=True, slots=True)
class Record:
    row: int
    value: Any
    """None if the row is bad."""
    bad: BadRow | None = None
    notes: tuple[str, ...] = ()
    """Repairs made while reading the row."""


class _NotUtf8(Exception):
    def __init__(self, byte: int) -> None:
        super().__init__(byte)
        self.byte = byte


class _TooLong(Exception):
    """A row exceeds `_LONGEST_ROW`."""


def read_records(part: str) -> Iterator[Record]:
    """Yields the records of a file (parsed by its suffix) or of a split of a Hub dataset.

    A line that is not JSON, or has more or fewer cells than the header, is one bad record. Raises InputError if the
    rest of a file cannot be trusted: it is not UTF-8, a truncated JSON list or a corrupt Parquet file.
    """
    if part.startswith(HUB):
        for row, value in enumerate(hub_rows(part), start=1):
            yield Record(row, value)
        return
    file, row = Path(part), 0
    try:
        for record in READERS[file.suffix](file):
            row = record.row
            yield record
    except _NotUtf8 as error:
        raise InputError(
            f"{file}, row {row + 1}: byte {error.byte} of the file is not UTF-8; save it as UTF-8"
        ) from None
    except _TooLong:
        raise InputError(
            f"{file}, row {row + 1}: is longer than {_LONGEST_ROW >> 20} MB; this is not a question"
        ) from None
    except RecursionError:
        raise InputError(f"{file}, row {row + 1}: not valid JSON: nested too deeply") from None
    except (json.JSONDecodeError, csv.Error) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise InputError(
            f"{file}, row {row + 1}: not valid {file.suffix[1:].upper()}: {reason}; "
            "the file is truncated or corrupt, fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Opens a file and skips its byte order mark, if any."""
    with open(file, "rb") as raw:
        start = raw.read(3)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{file}, row 1: byte 0 starts a UTF-16 file; save it as UTF-8")
        raw.seek(3 if start == codecs.BOM_UTF8 else 0)
        yield raw


def _lines(file: Path) -> Iterator[str]:
    with _opened(file) as raw:
        offset = raw.tell()
        while line := raw.readline(_LONGEST_ROW + 1):
            if len(line) > _LONGEST_ROW:
                raise _TooLong
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise _NotUtf8(offset + error.start) from None
            offset += len(line)


def _jsonl(file: Path) -> Iterator[Record]:
    for row, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError:
            yield Record(row, None, BadRow("not valid JSON", "nested too deeply"))
        except ValueError as error:  # also raised for a number with thousands of digits
            yield Record(row, None, BadRow("not valid JSON", str(error)))
        else:
            yield Record(row, value)


def _tsv(file: Path) -> Iterator[Record]:
    return _table(line.rstrip("\r\n").split("\t") for line in _lines(file))


def _csv(file: Path) -> Iterator[Record]:
    """A row may span several lines."""
    csv.field_size_limit(_LONGEST_ROW)
    length = 0

    def lines() -> Iterator[str]:
        nonlocal length
        for line in _lines(file):
            length += len(line)
            if length > _LONGEST_ROW:
                raise _TooLong
            yield line

    def rows() -> Iterator[list[str]]:
        nonlocal length
        for cells in csv.reader(lines(), strict=True):
            yield cells
            length = 0

    return _table(rows())


def _table(rows: Iterator[list[str]]) -> Iterator[Record]:
    """Turns rows of cells into records; the first row holds the field names."""
    header = next(rows, [])
    notes: tuple[str, ...] = ()
    if (repaired := _BROKEN_HEADERS.get(tuple(header))) is not None:
        header, notes = repaired, ("the header had a tab inside a column name",)
    for row, cells in enumerate(rows, start=1):
        if cells in ([], [""]):
            continue
        if len(cells) != len(header):
            reason = "the number of cells differs from the header"
            yield Record(row, None, BadRow(reason, f"{len(cells)}, not {len(header)}"), notes)
        else:
            yield Record(row, dict(zip(header, cells, strict=True)), notes=notes)
        notes = ()


def _json(file: Path) -> Iterator[Record]:
    """Yields the elements of a JSON list. A file that starts with an object is JSON Lines, often named .json too."""
    text = _JsonText(file)
    if text.peek() == "{":
        yield from _jsonl(file)
        return
    if text.peek() not in ("[", ""):
        raise InputError(f"{file}: is neither a JSON list of records nor JSON Lines")
    if text.take() == "" or text.peek() == "]":
        return
    row, after = 0, ","
    while after == ",":
        row += 1
        yield Record(row, text.value())
        after = text.take()
    if after != "]" or text.peek():
        raise json.JSONDecodeError("unclosed list" if not after else "expected a comma", "", 0)


class _JsonText:
    """Decodes a JSON file value by value; holds one chunk and the value being decoded."""

    def __init__(self, file: Path) -> None:
        self._chunks = _chunks(file)
        self._text, self._at = "", 0

    def _more(self) -> bool:
        chunk = next(self._chunks, "")
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next non-space character, not consumed; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        char = self.peek()
        self._at += len(char)
        return char

    def value(self) -> Any:
        """The next value; one that reaches the end of the buffer may continue in the next chunk."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated")
                if is_cut and len(self._text) - self._at > _LONGEST_ROW:
                    raise _TooLong from None
                if is_cut and self._more():
                    continue
                raise
            except ValueError as error:  # a number with thousands of digits
                raise json.JSONDecodeError(str(error), "", 0) from None
            length = end - self._at
            if end < len(self._text) or not self._more():
                self._at += length
                return value


def _chunks(file: Path) -> Iterator[str]:
    """Yields the text of a file in non-empty pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(file) as raw:
        while True:
            start = raw.tell() - len(decoder.getstate()[0])
            data = raw.read(_CHUNK)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _NotUtf8(start + error.start) from None
            if text:
                yield text
            if not data:
                return


def _parquet(file: Path) -> Iterator[Record]:
    row = 0
    # Not only ArrowException: names and texts may not be UTF-8, dates may be invalid, memory may run out.
    with as_input_error(f"{file}: cannot be read as Parquet"), pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=BATCH):
            for value in batch.to_pylist(maps_as_pydicts="strict"):
                row += 1
                yield Record(row, value)
        if row != parquet.metadata.num_rows:
            raise ValueError(f"it has {row} rows, but declares {parquet.metadata.num_rows}")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
