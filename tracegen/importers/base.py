"""What a format of published traces is, and what an import reports.

A format is one module here with a `Format`; `tracegen.importers.formats` lists them. Its `read` turns a source into
batches, frames of any height in the file's order, with the columns

| column | type | |
|---|---|---|
| `_line` | Int64 | where the row stands: its line, from 1, or in Parquet its row, from 0 |
| `_text` | String | the row as it was read, for messages; null: where it is usable |
| `_said` | String | its time as it was written |
| `_why` | String | why the row cannot be used; null: it can |
| `_time_ns` | Int64 | its time, from any origin |
| `input_tokens`, `output_tokens` | UInt32 | 1 at least, where `_why` is null |

and whatever else the trace keeps (columns of `tracegen.schema`, or the format's own). What is the same for all formats
(order, bad rows, ids, the origin of time, metadata, writing) is done by `tracegen.importers.run`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.sources import Source

PARQUET = b"PAR1"  # what a Parquet file begins with
Batches = Iterator[pl.DataFrame]
BATCH = pl.Schema(
    {
        "_line": pl.Int64(),
        "_text": pl.String(),
        "_said": pl.String(),
        "_why": pl.String(),
        "_time_ns": pl.Int64(),
        "input_tokens": pl.UInt32(),
        "output_tokens": pl.UInt32(),
    }
)
OWN = tuple(name for name in BATCH if name.startswith("_"))  # a batch's columns that no trace has


@dataclass(frozen=True)
class Options:
    """What an import is asked for beyond source and output; a format uses what it knows.

    `map` names a table's columns (`arrival`, `input`, `output`, ...) and `time_unit` what its times count; `seed` is
    that of `dequantize` and of made arrivals, at `rate_rps`. `tokenizer` is a folder, for formats of texts.
    """

    label: str | None = None
    skip_bad: bool = False
    limit: int | None = None
    sort: bool = False
    dequantize: bool = False
    seed: int = 1
    map: Mapping[str, str] = field(default_factory=dict)
    time_unit: str | None = None
    rate_rps: float | None = None
    tokenizer: str | None = None


@dataclass
class Report:
    """What an import did: rows read, dropped by reason, and written; remarks; and the trace's metadata.

    `rows_sorted` are those that stood behind a later one; `first_arrival` is the first time as it was written;
    `span_ns` is the last arrival, `input_tokens` and `output_tokens` are sums over the rows written.
    """

    format: str
    output: Path
    rows_read: int = 0
    rows_dropped: int = 0
    rows_sorted: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    span_ns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    first_arrival: str | None = None
    remarks: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Requests, span, rate and mean lengths, under the names of `tracegen.describe.describe`."""
        span_s = self.span_ns / NS_PER_S
        return {
            "requests": self.rows,
            "span_s": span_s,
            "rate_rps": (self.rows - 1) / span_s if span_s else None,
            "input_tokens": {"mean": self.input_tokens / self.rows},
            "output_tokens": {"mean": self.output_tokens / self.rows},
        }

    def drop(self, why: pl.Series) -> None:
        """Count the rows dropped for the reasons `why`."""
        self.rows_dropped += len(why)
        for reason, count in why.value_counts(sort=True).iter_rows():
            self.dropped[reason] = self.dropped.get(reason, 0) + count


# What a format does to its batches once they are whole, in order and numbered (`request_id`), such as to link turns.
Stage = Callable[[Batches, Options, Source, Report], Batches]


@dataclass(frozen=True)
class Format:
    """One format of published traces.

    `recognises` tells it by a file's first 64 KiB. Rows that fail for a reason in `expected` are dropped and counted
    without being asked. Where `in_order` holds, a row that is earlier than one before it is bad; else rows are
    sorted. `metadata` go into the trace's own.
    """

    name: str
    title: str
    recognises: Callable[[bytes], bool]
    read: Callable[[Source, Options], Batches]
    in_order: bool = True
    expected: frozenset[str] = frozenset()
    stage: Stage | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def bad_row(source: Source, line: int, why: str, text: str) -> TraceError:
    """The error that names a row that cannot be used."""
    where = "row" if source.start.startswith(PARQUET) else "line"
    return TraceError(
        f"{source.location}: {where} {line}: {why}: {text[:80]!r}; mend the file, or drop such rows with --skip-bad"
    )


def columns_of(source: Source, *headers: str) -> list[str]:
    """The columns of a CSV whose first line is one of `headers`. Raises `TraceError` where it is another."""
    header = first_line(source.start)
    if header not in headers:
        known = " or ".join(f"'{known}'" for known in headers)
        raise TraceError(
            f"{source.location}: line 1: the header is {header[:80]!r}, not {known}; "
            "'tracegen import auto' recognises other formats"
        )
    return header.split(",")


def first_line(start: bytes) -> str:
    """The first line of a file that begins with `start`, without its end."""
    return start.partition(b"\n")[0].rstrip(b"\r").decode("utf-8", "replace")
