"""Any table of requests, CSV, JSON Lines or Parquet, by a map of its columns.

The map's keys are in `KEYS`; `arrival`, `input` and `output` must be there. A key of JSON may be a path with dots
(`usage.prompt_tokens`). CSV may have comma, semicolon or tab between its fields, and quotes around them.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tracegen.errors import TraceError
from tracegen.importers.base import PARQUET, Batches, Format, Options, first_line
from tracegen.importers.columns import ID, ISO, NS_PER_UNIT, TEXT, TOKENS, Column, Kind, clock, parsed
from tracegen.importers.textfiles import csv_rows, json_rows, nothing
from tracegen.sources import Source

UNITS = (*NS_PER_UNIT, "iso")
_KINDS = {
    "arrival": None,  # by the unit
    "input": TOKENS,
    "output": TOKENS,
    "client": ID,
    "session": ID,
    "model": TEXT,
    "label": TEXT,
}
_NAMES = {
    "arrival": "_time_ns",
    "input": "input_tokens",
    "output": "output_tokens",
    "client": "client_id",
    "session": "session_id",
}
KEYS = tuple(_KINDS)
NEEDED = ("arrival", "input", "output")
_BATCH_ROWS = 1 << 17


def parse_map(text: str) -> dict[str, str]:
    """The map that `arrival=ts,input=prompt_tokens,output=completion_tokens` says, checked."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {key.strip(): column.strip() for key, _, column in pairs}
    for key, column in found.items():
        if key not in KEYS or not column:
            raise TraceError(f"--map {text}: '{key}={column}' is no KEY=COLUMN; the keys are {', '.join(KEYS)}")
    if len(found) < len(pairs):
        raise TraceError(f"--map {text}: a key occurs twice; name each column once")
    if missing := [key for key in NEEDED if key not in found]:
        raise TraceError(f"--map {text}: {missing[0]}=COLUMN is missing; a trace needs {', '.join(NEEDED)}")
    return found


def _read(source: Source, options: Options) -> Batches:
    wanted = dict(options.map)
    if not wanted:
        raise TraceError(f"{source.location}: which columns? say --map arrival=COLUMN,input=COLUMN,output=COLUMN")
    columns: list[Column] = []
    separator, found = _rows(source, sorted(set(wanted.values())))
    for rows in found:
        said = rows[wanted["arrival"]]
        if not columns:
            time = _time_kind(source, options, said)
            columns = [
                Column(column, _NAMES.get(key, key), _KINDS[key] or time, optional=key not in NEEDED)
                for key, column in wanted.items()
            ]
        yield parsed(rows, columns, separator=separator).with_columns(said.alias("_said"))


def _rows(source: Source, names: list[str]) -> tuple[str, Iterator[pl.DataFrame]]:
    """What stands between fields, and the columns `names` as text, by what the file is."""
    if source.start.startswith(PARQUET):
        return ", ", _parquet_rows(source, names)
    if source.start.lstrip()[:1] == b"{":
        return ", ", _json_rows(source, names)
    return _csv_rows(source, names)


def _time_kind(source: Source, options: Options, said: pl.Series) -> Kind:
    """How the arrivals are read: as asked, or as dates where the first one is no number."""
    if options.time_unit == "iso":
        return ISO
    if options.time_unit is not None:
        if options.time_unit not in NS_PER_UNIT:
            raise TraceError(f"--time-unit {options.time_unit}: is none of {', '.join(UNITS)}")
        return clock(options.time_unit)
    first = next((text for text in said if text), "")
    if first.replace(".", "", 1).isdigit():
        raise TraceError(
            f"{source.location}: arrivals such as {first} are numbers of what? say --time-unit s, ms, us or ns"
        )
    return ISO


def _missing(source: Source, name: str, have: list[str]) -> TraceError:
    return TraceError(f"{source.location}: there is no column '{name}'; the file has {', '.join(have)[:200]}")


def _csv_rows(source: Source, names: list[str]) -> tuple[str, Iterator[pl.DataFrame]]:
    header = first_line(source.start)
    ways = [_split(header, separator) for separator in ",;\t"]
    have = max(ways, key=lambda way: (sum(name in way for name in names), len(way)))
    for name in names:
        if have.count(name) != 1:
            if name in have:
                raise TraceError(f"{source.location}: line 1: column '{name}' occurs twice; rename one")
            raise _missing(source, name, have)
    # What is not asked for has a name of its own, so that only what is must be unique.
    unique = [name if name in names else f"_{k}" for k, name in enumerate(have)]
    separator = ",;\t"[ways.index(have)]
    return separator, csv_rows(source, unique, separator=separator, quoted=True)


def _split(header: str, separator: str) -> list[str]:
    """The names in a header; quotes around them are none of theirs."""
    import csv

    return [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]


def _json_rows(source: Source, names: list[str]) -> Iterator[pl.DataFrame]:
    decoder = msgspec.json.Decoder(dict[str, Any], float_hook=lambda text: format(Decimal(text), "f"))
    seen = False
    for rows in json_rows(source, decoder.decode):
        columns = {name: (pl.String(), lambda row, path=name: _text_at(row, path)) for name in names}
        frame = rows.frame(columns)
        if not seen:  # a key that no row of the first block has is a wrong name, not a thousand bad rows
            for name in names:
                if frame[name].null_count() == frame.height and (keys := next(filter(None, rows.found), None)):
                    raise _missing(source, name, list(keys))
            seen = True
        yield frame


def _text_at(row: dict[str, Any], path: str) -> str | None:
    """What stands in `row` at `path`, as text; None where there is nothing."""
    value: Any = row
    for key in [path] if path in row else path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _parquet_rows(source: Source, names: list[str]) -> Iterator[pl.DataFrame]:
    with source.as_file() as path:
        try:
            file = pq.ParquetFile(path)
            for name in names:
                if name not in file.schema_arrow.names:
                    raise _missing(source, name, file.schema_arrow.names)
            first = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                frame = pl.DataFrame(batch).select(_as_text(pl.DataFrame(batch)[name]) for name in names)
                yield frame.with_columns(
                    pl.int_range(first, first + frame.height, eager=True).alias("_line"),
                    pl.concat_str(pl.all(), separator=", ", ignore_nulls=True).alias("_text"),
                    nothing(frame.height).alias("_why"),
                )
                first += frame.height
        except (pa.ArrowException, OSError) as error:
            raise TraceError(f"{source.location}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _as_text(column: pl.Series) -> pl.Series:
    """A column of any type as text; dates and times as ISO 8601 in UTC, with all of their digits."""
    if isinstance(column.dtype, pl.Datetime):
        utc = column.dt.convert_time_zone("UTC") if column.dtype.time_zone else column
        return utc.dt.strftime("%Y-%m-%d %H:%M:%S%.9f")
    if column.dtype.is_nested():
        raise TraceError(f"column '{column.name}' is {column.dtype}; a map names columns of numbers, times or text")
    return column.cast(pl.String)


FORMAT = Format(
    name="table",
    title="any CSV, JSON Lines or Parquet, by --map arrival=COLUMN,input=COLUMN,output=COLUMN",
    recognises=lambda _: False,  # a map cannot be guessed
    read=_read,
    in_order=False,
)
