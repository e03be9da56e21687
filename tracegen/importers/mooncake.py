"""The Mooncake traces as published: JSON Lines with hash ids of 512-token blocks.

Format (FAST25-release/traces in github.com/kvcache-ai/Mooncake): `timestamp` in milliseconds from the trace's start,
`input_length`, `output_length`, and `hash_ids`, one for each block of the prompt; equal ids are equal prefixes. The
conversation trace's stamps are on a grid of 3 s; `--dequantize` spreads them.
"""

from typing import Annotated

import msgspec
import numpy as np
import polars as pl

from tracegen.errors import TraceError
from tracegen.importers.base import Batches, Format, Options, Report, first_line
from tracegen.importers.columns import MAX_TIME_NS, MAX_TOKENS
from tracegen.importers.structs import struct_rows
from tracegen.sources import Source
from tracegen.streams import random_stream

BLOCK_TOKENS = 512
GRID_NS = 3 * 10**9
OFF_GRID_NS = 3 * 10**6  # the furthest that any of the 12,031 stamps of the published conversation trace lies off it
_NS_PER_MS = 10**6

Tokens = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
Hash = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# Lengths and hashes as a trace has them.
_HASHED = (
    pl.col("input_length").cast(pl.UInt32).alias("input_tokens"),
    pl.col("output_length").cast(pl.UInt32).alias("output_tokens"),
    pl.col("hash_ids").cast(pl.List(pl.UInt64)).alias("prefix_hashes"),
)


class Row(msgspec.Struct):
    """A line of the file."""

    timestamp: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_NS // _NS_PER_MS)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[Hash]


def _recognises(start: bytes) -> bool:
    """By the keys of the first object; with chats it is another's."""
    try:
        keys = msgspec.json.decode(first_line(start))
    except msgspec.MsgspecError:
        return False
    return isinstance(keys, dict) and keys.keys() >= set(Row.__struct_fields__) and "chat_id" not in keys


def _read(source: Source, options: Options) -> Batches:
    return hashed_rows(source, Row, pl.col("timestamp") * _NS_PER_MS)


def hashed_rows(source: Source, row: type[msgspec.Struct], time_ns: pl.Expr, *others: str | pl.Expr) -> Batches:
    """Batches of lines that are each a `row` with the fields of `Row`; `others` are columns beside theirs."""
    for rows in struct_rows(source, row):
        said = pl.col("timestamp").cast(pl.String).alias("_said")
        yield rows.select("_line", "_text", "_why", said, time_ns.alias("_time_ns"), *_HASHED, *others)


def _spread(batches: Batches, options: Options, source: Source, report: Report) -> Batches:
    """Spread the requests of each point of the grid evenly over the 3 s that it stands for, in the file's order.

    The sorted draws of a point are given to its rows in order, so that what stands first is sent first.
    Raises `TraceError` for a row that is not on the grid.
    """
    if not options.dequantize:
        yield from batches
        return
    report.remarks.append(f"arrivals are spread evenly over the source's grid of 3 s, by seed {options.seed}")
    random = random_stream(options.seed, "dequantize")
    rest = None
    for batch in batches:
        whole = batch if rest is None else pl.concat([rest, batch])
        point = _points(whole, source)
        # The last point may go on in the next batch.
        known = int(np.searchsorted(point, point[-1]))
        rest = whole.slice(known)
        if known:
            yield _spread_points(whole.head(known), point[:known], random)
    if rest is not None:
        yield _spread_points(rest, _points(rest, source), random)


def _points(batch: pl.DataFrame, source: Source) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of each row's point on the grid, non-decreasing as the times are."""
    time_ns = batch["_time_ns"].to_numpy()
    point = (time_ns + GRID_NS // 2) // GRID_NS
    off = np.flatnonzero(np.abs(time_ns - point * GRID_NS) > OFF_GRID_NS)
    if len(off):
        line, said = batch.select("_line", "_said").row(int(off[0]))
        raise TraceError(
            f"{source.location}: line {line}: timestamp {said} is not on a grid of 3 s; import it without --dequantize"
        )
    return point


def _spread_points(
    batch: pl.DataFrame, point: np.ndarray[tuple[int], np.dtype[np.int64]], random: np.random.Generator
) -> pl.DataFrame:
    """`batch` with times drawn anew, for whole points of the grid."""
    drawn_ns = point * GRID_NS + random.integers(0, GRID_NS, len(point))
    return batch.with_columns(_time_ns=pl.Series(np.sort(drawn_ns)))


FORMAT = Format(
    name="mooncake",
    title="Mooncake traces with hash ids (JSON Lines)",
    recognises=_recognises,
    read=_read,
    stage=_spread,
    metadata={"block_tokens": BLOCK_TOKENS},
)
