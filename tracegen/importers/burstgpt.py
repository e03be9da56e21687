"""BurstGPT as published: CSV, version 1 and version 3 (release 2.0, with sessions).

Format (README of github.com/HPMLL/BurstGPT, Wang et al., arXiv:2401.17644): times in seconds, whole or with a decimal;
Total tokens is the sum of the two before it. A request that failed has no response tokens, mostly 0,0,0: such rows are
dropped and counted. Version 3 adds Session ID (a UUID) and Elapsed time (seconds until the answer was whole).
"""

import polars as pl

from tracegen.errors import TraceError
from tracegen.importers.base import Batches, Format, Options, Report, first_line
from tracegen.importers.columns import COUNT, ID, TEXT, Column, clock, parsed
from tracegen.importers.textfiles import csv_rows
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
    header = first_line(source.start)
    if header not in {HEADER, SESSION_HEADER}:
        raise TraceError(
            f"{source.location}: line 1: the header is {header[:80]!r}, not '{HEADER}' or '{SESSION_HEADER}'; "
            "'tracegen import auto' recognises other formats"
        )
    names = header.split(",")
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


def link_turns(batches: Batches, options: Options, source: Source, report: Report) -> Batches:
    """Add each turn's parent, the request before it in its session, and its think time.

    A turn that was sent before its parent's answer was whole has no think time. Memory: 24 bytes for each session.
    """
    last = pl.DataFrame(schema={"session_id": pl.UInt64, "parent_id": pl.UInt64, "parent_end_ns": pl.Int64})
    for batch in batches:
        if "session_id" not in batch.columns:
            yield batch
            continue
        end_ns = pl.col("_time_ns") + pl.col("elapsed_ns")
        alone = pl.col("session_id").is_null()
        turns = batch.join(last, on="session_id", how="left", maintain_order="left").with_columns(
            parent_id=pl.when(~alone).then(pl.coalesce(pl.col("request_id").shift(1).over("session_id"), "parent_id")),
            parent_end_ns=pl.when(~alone).then(pl.coalesce(end_ns.shift(1).over("session_id"), "parent_end_ns")),
        )
        think_ns = pl.col("_time_ns") - pl.col("parent_end_ns")
        yield turns.with_columns(think_ns=pl.when(think_ns >= 0).then(think_ns)).drop("parent_end_ns")
        newest = batch.select("session_id", parent_id="request_id", parent_end_ns=end_ns)
        last = pl.concat([last, newest.drop_nulls("session_id")]).unique("session_id", keep="last")


FORMAT = Format(
    name="burstgpt",
    title="BurstGPT, version 1 and version 3 with sessions (CSV)",
    recognises=_recognises,
    read=_read,
    in_order=False,
    expected=frozenset({FAILED, NO_RESPONSE}),
    stage=link_turns,
)
