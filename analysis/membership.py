"""Who was in the engine when, rebuilt from client timestamps: for a server that keeps no step records.

Between two events (a request sent, its first token, its last) the set of requests is constant; that stretch is a
pseudo-step. A request does its prompt's prefill evenly between send and first token (queueing included: the client
cannot tell them apart) and its decoding at an even pace until its last token.
"""

import numpy as np
import polars as pl

from analysis.load import InstanceData, RunData
from analysis.steps import DECODE, PREFILL, Segments, Steps, sum_segments


def from_client(data: RunData, instance: InstanceData) -> tuple[Steps, Segments] | None:
    """Pseudo-steps and segments of `instance`; None where no request was sent in the window."""
    duration_s = data.duration_s
    table = (
        (data.requests if data.early is None else pl.concat([data.requests, data.early]))
        .with_row_index("request")
        .filter(pl.col("instance") == instance.instance, pl.col("sent_s").is_not_null())
        .with_columns(
            pl.coalesce("last_token_s", "done_s", pl.lit(duration_s)).alias("gone_s"),
            (pl.col("input_tokens").fill_null(0).cast(pl.Int64) - pl.col("cached_tokens").fill_null(0))
            .clip(0)
            .cast(pl.Float64)
            .alias("prompt"),
            (pl.col("output_tokens").fill_null(1).cast(pl.Float64) - 1).clip(0).alias("decoded"),
            pl.col("cached_tokens").fill_null(0).cast(pl.Float64).alias("cached"),
        )
        .with_columns(pl.coalesce("first_token_s", "gone_s").alias("turn_s"))
    )
    spans = pl.concat(
        [
            _spans(table, PREFILL, "sent_s", "turn_s", pl.col("prompt"), pl.col("cached")),
            _spans(table, DECODE, "turn_s", "gone_s", pl.col("decoded"), pl.col("prompt") + pl.col("cached") + 1),
        ]
    )
    if spans.is_empty():
        return None
    begin_s, finish_s = spans["begin_s"].to_numpy(), spans["finish_s"].to_numpy()
    edges_s = np.unique(np.concatenate([begin_s, finish_s]))
    start_s, end_s = edges_s[:-1], edges_s[1:]
    rate = spans["tokens"].to_numpy() / (finish_s - begin_s)
    segments = Segments(
        request=spans["request"].cast(pl.Int64).to_numpy(),
        first=np.searchsorted(edges_s, begin_s).astype(np.int64),
        last=np.searchsorted(edges_s, finish_s).astype(np.int64) - 1,
        kind=spans["kind"].cast(pl.Int64).to_numpy(),
        tokens=rate,
        reads=rate,
        context=spans["context"].to_numpy(),
        growth=rate,
        q_start=begin_s,
    )
    span_s, middle_s = end_s - start_s, (start_s + end_s) / 2
    count, work = sum_segments(segments, span_s, middle_s)
    count = np.round(count)
    busy = count > 0
    place = np.cumsum(busy) - 1  # stretches without a request are no steps
    segments = Segments(**{**vars(segments), "first": place[segments.first], "last": place[segments.last]})
    steps = Steps(
        start_s=start_s[busy],
        end_s=end_s[busy],
        measured_s=span_s[busy],
        g=span_s[busy],
        q=middle_s[busy],
        requests=count[busy],
        work=work[busy],
        unlisted=np.zeros(int(busy.sum())),
        unlisted_work=np.zeros((int(busy.sum()), 4)),
        timed=False,
    )
    return steps, segments


def _spans(table: pl.DataFrame, kind: int, begin: str, finish: str, tokens: pl.Expr, context: pl.Expr) -> pl.DataFrame:
    """One row a request that spent time in this phase."""
    return table.filter(pl.col(finish) > pl.col(begin)).select(
        "request",
        pl.lit(kind).alias("kind"),
        pl.col(begin).alias("begin_s"),
        pl.col(finish).alias("finish_s"),
        tokens.alias("tokens"),
        context.alias("context"),
    )
