"""Files of lines: CSV in columns of text, JSON Lines in Python objects, block by block.

A line's own faults (columns too few or too many, JSON that is none) are told in `why`, and a stray byte that is no
UTF-8 spoils its row alone.
"""

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from tracegen.sources import Source

QUOTE = b'"'
_CSV_ROWS = 100_000  # to a batch, where fields are quoted
_QUOTED_BYTES = 200  # of a line of JSON, for messages
_NUMBERED = re.compile(r" \(byte \d+\)|(?<=\[)\d+(?=\])")  # what would make a reason of its own of each row


def csv_rows(
    source: Source, names: Sequence[str], *, separator: str = ",", quoted: bool = False
) -> Iterator[pl.DataFrame]:
    """The rows below the header, as frames of `_line`, `_text`, `_why` and a column of text for each of `names`.

    From the first quote on fields may be `quoted`, as RFC 4180 says, with line ends inside; else a quote is a letter.
    """
    blocks = _without_header(source.blocks())
    line = 2
    for block in blocks:
        if quoted and QUOTE in block:
            yield from _quoted_rows(chain([block], blocks), names, separator, line)
            return
        rows = _clean_rows(block, names, separator)
        if rows is None:
            rows = _any_rows(block, names, separator)
        yield rows.with_columns(pl.int_range(line, line + rows.height, eager=True).alias("_line"))
        line += rows.height


def _clean_rows(block: bytes, names: Sequence[str], separator: str) -> pl.DataFrame | None:
    """The rows of a block in which each line has all of its columns, blank or not; None for any other block.

    Without their text: it is their fields, joined.
    """
    block = block.replace(b"\r\n", b"\n")
    if b"\r" in block:  # polars takes one for a line's end, or for nothing
        return None
    schema = dict.fromkeys(names, pl.String())
    try:
        rows = pl.read_csv(block, has_header=False, separator=separator, quote_char=None, schema=schema)
    except pl.exceptions.PolarsError:
        return None
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if rows.height != lines or rows[names[-1]].null_count():  # a line that ends early has no last column
        return None
    return rows.fill_null("").with_columns(nothing(rows.height).alias("_text"), nothing(rows.height).alias("_why"))


def _any_rows(block: bytes, names: Sequence[str], separator: str) -> pl.DataFrame:
    """The rows of any block, with what is wrong with how many columns they have."""
    texts = lines_of(block)
    fields = texts.str.split_exact(separator, len(names)).struct.rename_fields([*names, "_text"])
    rows = fields.struct.unnest()
    why = _why_fields(rows[names[-1]], rows["_text"], texts)
    return rows.with_columns(texts.alias("_text"), why.alias("_why"))


def _without_header(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks without the first line."""
    rest = next(blocks, b"").partition(b"\n")[2]
    if rest:
        yield rest
    yield from blocks


def lines_of(block: bytes) -> pl.Series:
    """The lines of `block` as text without their ends; what is no UTF-8 becomes U+FFFD."""
    try:
        block.decode()
    except UnicodeDecodeError:
        block = block.decode("utf-8", "replace").encode()
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    if not block.endswith(b"\n"):
        block = block.removesuffix(b"\r") + b"\n"
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    array = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(block))
    return pl.Series("text", array).str.strip_suffix("\n")


def _why_fields(last: pl.Series, beyond: pl.Series, texts: pl.Series) -> pl.Series:
    """What is wrong with how many columns a line has, from its last column and the one behind it; or null."""
    return pl.select(
        pl.when(texts.str.strip_chars() == "")
        .then(pl.lit("is blank"))
        .when(last.is_null())
        .then(pl.lit("has too few columns"))
        .when(beyond.is_not_null())
        .then(pl.lit("has too many columns"))
    ).to_series()


def nothing(rows: int) -> pl.Series:
    """A column of text without any."""
    return pl.Series([None], dtype=pl.String).new_from_index(0, rows)


def _quoted_rows(blocks: Iterator[bytes], names: Sequence[str], separator: str, line: int) -> Iterator[pl.DataFrame]:
    """The same frames by Python's reader; `line` is the number of the first line."""
    reader = csv.reader(_lines(blocks), delimiter=separator, strict=True)
    fields: list[list[str]] = []
    numbers: list[int] = []
    whys: list[str | None] = []
    more = True
    while more:
        numbers.append(line + reader.line_num)
        why = None
        try:
            row = next(reader)
        except StopIteration:
            more = False
            numbers.pop()
        except csv.Error as error:
            fields.append([])
            whys.append(f"is not a row of CSV ({error})")
        else:
            if len(row) != len(names):
                why = f"has too {'few' if len(row) < len(names) else 'many'} columns" if row else "is blank"
            fields.append(row)
            whys.append(why)
        if len(fields) == _CSV_ROWS or (fields and not more):
            yield _frame(fields, numbers, whys, names, separator)
            fields, numbers, whys = [], [], []


def _lines(blocks: Iterator[bytes]) -> Iterator[str]:
    """The lines of `blocks` with their ends."""
    for block in blocks:
        for line in block.removesuffix(b"\n").split(b"\n"):
            yield line.decode("utf-8", "replace") + "\n"


def _frame(
    fields: list[list[str]], numbers: list[int], whys: list[str | None], names: Sequence[str], separator: str
) -> pl.DataFrame:
    """Rows of `fields` as a frame."""
    columns = {name: [row[k] if k < len(row) else None for row in fields] for k, name in enumerate(names)}
    return pl.DataFrame(columns, schema=dict.fromkeys(names, pl.String())).with_columns(
        _line=pl.Series(numbers, dtype=pl.Int64),
        _text=pl.Series([separator.join(row) for row in fields], dtype=pl.String),
        _why=pl.Series(whys, dtype=pl.String),
    )


@dataclass(frozen=True)
class JsonRows:
    """Lines of JSON: their numbers, beginnings, what each is (None where it is nothing), and why it is nothing."""

    numbers: list[int]
    texts: list[str]
    found: list[Any]
    whys: list[str | None]

    def frame(self, columns: Mapping[str, tuple[pl.DataType, Callable[[Any], Any]]]) -> pl.DataFrame:
        """A batch with `columns`, each of a type and from a row's object; null where there is none."""
        return pl.DataFrame(
            [
                pl.Series("_line", self.numbers, dtype=pl.Int64),
                pl.Series("_text", self.texts, dtype=pl.String),
                pl.Series("_why", self.whys, dtype=pl.String),
                *(
                    pl.Series(name, [None if row is None else take(row) for row in self.found], dtype=dtype)
                    for name, (dtype, take) in columns.items()
                ),
            ]
        )


def json_rows(source: Source, decode: Callable[[bytes], Any]) -> Iterator[JsonRows]:
    """The lines of `source`, block by block, by `decode`, which raises what msgspec raises."""
    line = 1
    for block in source.blocks():
        rows = json_rows_of(block, line, decode)
        yield rows
        line += len(rows.numbers)


def json_rows_of(block: bytes, line: int, decode: Callable[[bytes], Any]) -> JsonRows:
    """The lines of `block`, of which the first is number `line`."""
    rows = JsonRows([], [], [], [])
    for number, text in enumerate(block.removesuffix(b"\n").split(b"\n"), line):
        found, why = None, None
        try:
            found = decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            why = "is blank" if not text.strip() else f"is no such row ({_NUMBERED.sub('', str(error))})"
        rows.numbers.append(number)
        rows.texts.append(text[:_QUOTED_BYTES].decode("utf-8", "replace"))
        rows.found.append(found)
        rows.whys.append(why)
    return rows
