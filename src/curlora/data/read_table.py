"""Read tables from local files and from the Hugging Face hub, and check them."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from curlora.data.errors import DataError, EncodingError

__all__ = ["TABLE_SUFFIXES", "Place", "Table", "read_table"]


class Place(BaseModel):
    """A table: a local ``.tsv``, ``.csv``, ``.jsonl``, ``.json`` or ``.parquet`` file, or a data set of the hub.

    ``quoted`` says whether a TSV or CSV file encloses fields in quotation marks (GLUE's files do not). ``columns``
    names the columns of a TSV or CSV file without a header.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = None
    columns: list[str] | None = None
    quoted: bool = True
    encoding: str = "utf-8-sig"  # with or without a byte-order mark
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError as error:
            raise ValueError(f"{value!r} is not an encoding of Python, such as utf-8, utf-16 or latin-1") from error
        return value

    @field_validator("columns")
    @classmethod
    def _distinct_columns(cls, value: list[str] | None) -> list[str] | None:
        twice = _twice(value or [])
        if twice is not None:
            raise ValueError(f"{twice!r} is listed twice")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Place:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path (a local file) or hub (a data set's id)")
        if self.hub is not None and self.split is None:
            raise ValueError("a data set of the hub needs split")
        if self.columns is not None and (self.path is None or self.path.suffix.lower() not in _SEPARATORS):
            raise ValueError("columns is only for a TSV or CSV file without a header")
        return self


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Args:
        columns: the columns' names. A row may lack some of them.
        rows: a list of mappings, or a data set of the library ``datasets``.
        lines: for each row the line of the file at which it begins, from 1; ``None`` if rows have no lines.
    """

    columns: Sequence[str]
    rows: Any
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def select(self, numbers: Sequence[int]) -> Table:
        """Return a table of the rows with these numbers, in this order."""
        rows = [self.rows[i] for i in numbers] if isinstance(self.rows, list) else self.rows.select(numbers)
        return Table(self.columns, rows, None if self.lines is None else [self.lines[i] for i in numbers])

    def number(self, row: int) -> str:
        """Return a row's number for error messages, with its line: ``3 (line 5)``."""
        return f"{row}" if self.lines is None else f"{row} (line {self.lines[row]})"

    def check_columns(self, columns: Iterable[str], where: str) -> None:
        """Check that the columns exist.

        Raises:
            DataError: naming the first missing column.
        """
        for column in columns:
            if column not in self.columns:
                raise DataError(f"{where}: there is no column {column!r} among {', '.join(self.columns)}")


def read_table(place: Place, where: str) -> Table:
    """Read a table.

    Every field of a TSV or CSV file is a string, exactly as written. Strings of JSON stay strings: they are not
    converted to dates or numbers.

    Args:
        place: the file or data set.
        where: how errors call it.

    Raises:
        DataError: if the file is missing, is of another type than its name says, or has no rows; if a line of a TSV or
            CSV file has more or fewer fields than the header; or if two columns have the same name.
    """
    if place.hub is not None:
        return _from_hub(place, where)
    assert place.path is not None
    if not place.path.is_file():
        raise DataError(f"{where}: {'is a folder, not a file' if place.path.is_dir() else 'there is no such file'}")
    suffix = place.path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{where}: the file type {suffix or '(none)'} is not supported; supported are {_listed()}")
    try:
        _check_signature(place.path, suffix, where)
        if suffix == ".parquet":
            table = _from_parquet(place.path)
        elif suffix in _SEPARATORS:
            table = _from_csv(place, _SEPARATORS[suffix], where)
        else:
            table = _from_json(place, where)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise EncodingError(
            f"{where}: {_undecodable(place, error)}", "If it is text in another encoding, set encoding to it"
        ) from error
    except UnicodeError as error:
        raise DataError(f"{where}: is not text in the encoding {place.encoding}: {error}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error.__cause__ or error
        raise DataError(f"{where}: cannot be read as {suffix[1:]}: {reason}") from error
    if not len(table):
        raise DataError(f"{where}: the file has no rows")
    return table


_SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
"""File types that are read as tables."""

_PARQUET = b"PAR1"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, such as an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an Excel workbook or another Office document",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    _PARQUET: "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}


def _undecodable(place: Place, error: UnicodeDecodeError) -> str:
    """Say where a file cannot be decoded. A reader's error counts bytes from the beginning of its buffer."""
    assert place.path is not None
    content = place.path.read_bytes()
    try:
        content.decode(place.encoding)
    except UnicodeDecodeError as whole:
        error = whole
    line = content[: error.start].decode(place.encoding, errors="ignore").count("\n") + 1
    return f"line {line} is not text in the encoding {place.encoding}: {error.reason} at byte {error.start} of the file"


def _listed() -> str:
    return ", ".join(TABLE_SUFFIXES)


def _check_signature(path: Path, suffix: str, where: str) -> None:
    """Reject a file of another type than its name says, before a reader misreads it."""
    with path.open("rb") as stream:
        start = stream.read(16)
    if not start:
        raise DataError(f"{where}: the file is empty")
    if suffix == ".parquet":
        if not start.startswith(_PARQUET):
            raise DataError(f"{where}: is not a Parquet file, although its name ends in .parquet")
        return
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature):
            raise DataError(
                f"{where}: is {kind}, but {suffix} files are text. Save it as {suffix}, or correct its file name"
            )


def _lines(place: Place, where: str, newline: str | None) -> Iterator[str]:
    """Yield the lines of a file, checking that it is a text file."""
    assert place.path is not None
    with place.path.open("rb") as raw:
        if raw.read(2) in _UTF16 and "16" not in place.encoding:
            raise EncodingError(f"{where}: is text in UTF-16", "Set encoding: utf-16")
    with place.path.open(encoding=place.encoding, newline=newline) as stream:
        for number, line in enumerate(stream, start=1):
            if "\0" in line:
                raise EncodingError(
                    f"{where}: line {number} holds a NUL character, so this is not a text file, or its text is in "
                    "another encoding",
                    "Set encoding to it",
                )
            yield line.removeprefix("\ufeff") if number == 1 else line


def _from_csv(place: Place, separator: str, where: str) -> Table:
    quoting: Any = csv.QUOTE_MINIMAL if place.quoted else csv.QUOTE_NONE
    # Without strict, a quotation mark that is not closed makes one field of all text up to the next quotation mark.
    reader = csv.reader(_lines(place, where, newline=""), delimiter=separator, quoting=quoting, strict=True)
    columns, named_by = place.columns, "columns names"
    rows: list[dict[str, str]] = []
    at_lines: list[int] = []
    limit = csv.field_size_limit(2**31 - 1)  # a global setting, whose default is too small for long texts
    line = 1
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():  # not a blank line
                if columns is None:
                    columns, named_by = _heading(fields, where), "the header has"
                elif len(fields) != len(columns):
                    raise DataError(
                        f"{where}: line {line} has {_count(len(fields), 'field')}, but {named_by} {len(columns)}"
                        + _advice(place, separator, len(fields) > len(columns))
                    )
                else:
                    rows.append(dict(zip(columns, fields, strict=True)))
                    at_lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{where}: line {line}: {error}. A field that starts with a quotation mark must end with one",
            "If the file does not enclose fields in quotation marks, set quoted: false",
        ) from error
    finally:
        csv.field_size_limit(limit)
    return Table([name for name in columns or [] if name], rows, at_lines)


def _heading(names: Sequence[str], where: str) -> list[str]:
    twice = _twice([name for name in names if name])  # pandas writes its index as a column without a name
    if twice is not None:
        raise DataError(f"{where}: two columns have the name {twice!r}. Rename one of them")
    return list(names)


def _advice(place: Place, separator: str, more: bool) -> str:
    if not more:
        return ""
    name = "tab" if separator == "\t" else "comma"
    if place.quoted:
        return f". Enclose text that holds a {name} in quotation marks"
    return f". Enclose text that holds a {name} in quotation marks, and set quoted: true"


def _from_json(place: Place, where: str) -> Table:
    assert place.path is not None
    lines = list(_lines(place, where, newline=None))
    first = next((line.lstrip()[:1] for line in lines if line.strip()), "")
    rows: list[Any]
    at_lines: list[int] = []
    if first == "[" or (place.path.suffix.lower() == ".json" and not _is_json(next(filter(str.strip, lines), ""))):
        try:
            whole = json.loads("".join(lines))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not valid JSON: {error}") from error
        rows = whole if isinstance(whole, list) else [whole]
    else:
        rows = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                at_lines.append(number)
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    at = f"{error.msg}, column {error.colno}"
                    raise DataError(f"{where}: line {number} is not valid JSON: {at}") from error
                except RecursionError as error:
                    raise DataError(f"{where}: line {number} has too many values inside each other") from error
    table = Table([], rows, at_lines or None)
    columns: dict[str, None] = {}  # an ordered set
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: row {table.number(number)} is {_kind(row)}, but an object with a value for each column is "
                "expected"
            )
        columns.update(dict.fromkeys(row))
    if any("\\ud" in line or "\\uD" in line for line in lines):
        _check_surrogates(table, where)
    return replace(table, columns=list(columns))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _check_surrogates(table: Table, where: str) -> None:
    """Reject unpaired surrogates, which JSON allows but no tokenizer accepts."""
    for number, row in enumerate(table):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: row {table.number(number)} holds half of a character (an unpaired surrogate): {error.reason}"
            ) from error


def _from_parquet(path: Path) -> Table:
    import datasets
    from pyarrow import parquet

    rows = datasets.Dataset(parquet.read_table(path))
    return Table(rows.column_names, rows)


def _from_hub(place: Place, where: str) -> Table:
    import datasets

    if place.hub is not None and Path(place.hub).is_dir():
        # The reader of datasets moves the columns where a row has more fields than the header.
        separated = (path for suffix in _SEPARATORS for path in Path(place.hub).rglob(f"*{suffix}"))
        if (found := next(separated, None)) is not None:
            raise DataError(
                f"{where}: the folder holds {found.name}. Name that file under path instead of hub, so that its "
                "rows are checked"
            )
    try:
        rows = datasets.load_dataset(place.hub, place.subset, split=place.split, revision=place.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where}: cannot be loaded from the hub: {error}") from error
    if not len(rows):
        raise DataError(f"{where}: the split has no rows")
    return Table(rows.column_names, rows)


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
