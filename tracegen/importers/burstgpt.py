"""BurstGPT as published: CSV, version 1 and version 3 (release 2.0, with sessions).

Format (README of github.com/HPMLL/BurstGPT, Wang et al., arXiv:2401.17644): times in seconds, whole or with a decimal;
Total tokens is the sum of the two before it. A request that failed has no response tokens, mostly 0,0,0: such rows are
dropped and counted. Version 3 adds Session ID (a UUID) and Elapsed time (seconds until the answer was whole).
"""

import polars as pl

from tracegen.importers.base import Batches, Format, Options, columns_of, first_line
from tracegen.importers.columns import COUNT, ID, TEXT, Column, clock, parsed
from tracegen.importers.textfiles import csv_rows
from tracegen.importers.turns import link_turns
from tracegen.sources import Source

HEADER = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
SESSION_HEADER = HEADER.replace("Timestamp,", "Timestamp,Session ID,Elapsed time,")
FAILED = "a failed request (0,0,0)"
NO_RESPONSE = "a failed request (no response tokens)"
_COLUMNS = (
    Column("Timestamp", "_time_ns", clock("s")),
    Column("Session ID", "session_id", ID, optional=True),  # blank in API logs
    Column("Elapsed time", "elapsed_ns", clock("s")),
    Column("Model", "model", TEXT),
    Column("Request tokens", "input_tokens", COUNT),
    Column("Response tokens", "output_tokens", COUNT),
    Column("Total tokens", "total", COUNT),
    Column("Log Type", "log_type", TEXT),
)


def _recognises(start: bytes) -> bool:
    return first_line(start) in {HEADER, SESSION_HEADER}


def _read(source: Source, options: Options) -> Batches:
    names = columns_of(source, HEADER, SESSION_HEADER)
    columns = [column for column in _COLUMNS if column.source in names]
    for rows in csv_rows(source, names):
        batch = parsed(rows, columns, _wrong_tokens()).with_columns(rows["Timestamp"].alias("_said"))
        yield batch.drop("total")


def _wrong_tokens() -> pl.Expr:
    """What a row's three counts say that is wrong, or that the request failed."""
    total = pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens").cast(pl.Int64)
    return (
        pl.when(total != pl.col("total").cast(pl.Int64))
        .then(pl.lit("Total tokens is not Request tokens + Response tokens"))
        .when(pl.col("total") == 0)
        .then(pl.lit(FAILED))
        .when(pl.col("output_tokens") == 0)
        .then(pl.lit(NO_RESPONSE))
        .when(pl.col("input_tokens") == 0)
        .then(pl.lit("Request tokens is zero"))
    )


FORMAT = Format(
    name="burstgpt",
    title="BurstGPT, version 1 and version 3 with sessions (CSV)",
    recognises=_recognises,
    read=_read,
    in_order=False,
    expected=frozenset({FAILED, NO_RESPONSE}),
    stage=link_turns,
)
