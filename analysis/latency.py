"""Latency of requests in ms, by the definitions that the field's benchmarks share.

- TTFT: first token-bearing chunk minus send.
- ITL (TBT): gap between token-bearing chunks over the tokens in the later one.
- TPOT: (E2EL - TTFT) / (output tokens - 1).
- E2EL: last token minus send.
- `*_from_schedule`: the same from the time that the trace asked for, which a stalled client cannot hide.

A latency is null where one of its times is null. Statistics are over the requests that were `answered`: one that
failed is not fast.
"""

import polars as pl

NS_PER_MS = 1e6
LATENCY_COLUMNS = ("ttft_ms", "tpot_ms", "e2el_ms", "ttft_from_schedule_ms", "e2el_from_schedule_ms", "dispatch_lag_ms")
ANSWERED = ("ok", "length_mismatch")  # the latter: in full, though longer or shorter than asked


def answered() -> pl.Expr:
    """Whether a request of requests.parquet got its answer."""
    return pl.col("status").is_in(ANSWERED).fill_null(value=False)


def _ms(end: str, start: str) -> pl.Expr:
    return (pl.col(end) - pl.col(start)) / NS_PER_MS


def latency_exprs() -> list[pl.Expr]:
    """`LATENCY_COLUMNS` from the columns of requests.parquet."""
    gaps = pl.col("output_tokens").cast(pl.Int64) - 1
    tpot = pl.when(gaps > 0).then(_ms("last_token_ns", "first_token_ns") / gaps)
    return [
        _ms("first_token_ns", "sent_ns").alias("ttft_ms"),
        tpot.alias("tpot_ms"),
        _ms("last_token_ns", "sent_ns").alias("e2el_ms"),
        _ms("first_token_ns", "scheduled_ns").alias("ttft_from_schedule_ms"),
        _ms("last_token_ns", "scheduled_ns").alias("e2el_from_schedule_ms"),
        _ms("sent_ns", "scheduled_ns").alias("dispatch_lag_ms"),
    ]


def has_chunks(requests: pl.DataFrame) -> bool:
    """Whether `requests` has the times of its chunks."""
    return {"chunk_ns", "chunk_tokens"} <= set(requests.columns) and requests["chunk_ns"].drop_nulls().len() > 0


def token_gaps(requests: pl.DataFrame) -> pl.DataFrame:
    """One row a token after the first: `request_id` and `itl_ms`, from `chunk_ns` and `chunk_tokens`."""
    chunks = (
        requests.select("request_id", "chunk_ns", "chunk_tokens")
        .drop_nulls()
        .filter(pl.col("chunk_ns").list.len() > 0, pl.col("chunk_ns").list.len() == pl.col("chunk_tokens").list.len())
        .explode("chunk_ns", "chunk_tokens", empty_as_null=False)
        .filter(pl.col("chunk_tokens") > 0)
    )
    gap_ms = pl.col("chunk_ns").diff().over("request_id") / NS_PER_MS / pl.col("chunk_tokens")
    return (
        chunks.with_columns(gap_ms.alias("itl_ms"))
        .drop_nulls("itl_ms")
        .select("request_id", pl.col("itl_ms").repeat_by("chunk_tokens"))
        .explode("itl_ms", empty_as_null=False)
    )
