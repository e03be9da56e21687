"""Turns of a session, linked to the turn before them."""

import polars as pl

from tracegen.importers.base import Batches, Options, Report
from tracegen.sources import Source


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
