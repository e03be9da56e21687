"""Latency of requests in ms, by the definitions that the field's benchmarks share (docs/latency.md has them in full).

- TTFT: first token-bearing chunk minus send.
- ITL (TBT): gap between token-bearing chunks over the tokens in the later one.
- TPOT: (E2EL - TTFT) / (output tokens - 1); null for an answer of one token.
- E2EL: last token minus send.
- `*_from_schedule`: the same from the time that the trace asked for, which a stalled client cannot hide. ITL and TPOT
  lie between tokens, so it is all the same to them where a request's time begins.

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
