"""One row a request, with everything known of it: times, latencies, size bucket, label, energy."""

import polars as pl

from analysis.latency import latency_exprs
from replay.rundir import Run
from tracegen.buckets import INPUT_EDGES, OUTPUT_EDGES, bucket_expr

ENERGY_COLUMNS = ("energy_j", "prefill_j", "decode_j", "shared_j", "energy_se_j")


def request_table(run: Run, energy: pl.DataFrame | None = None) -> pl.DataFrame:
    """requests.parquet of `run` with latency columns, `bucket` and `label`, and the columns of `energy` (else null).

    A bucket goes by the trace's input tokens and the output tokens that the server counted; where the trace does not
    have the request, by the server's input count, and where nothing was served, by the output asked for.
    """
    frame = run.scan("requests").collect().sort("scheduled_ns", "request_id")
    frame = frame.join(_trace_columns(run), on="request_id", how="left", maintain_order="left")
    bucket = bucket_expr(
        pl.coalesce("trace_input_tokens", "input_tokens"),
        pl.coalesce("output_tokens", "output_tokens_wanted"),
        INPUT_EDGES,
        OUTPUT_EDGES,
    )
    frame = frame.with_columns(*latency_exprs(), bucket.alias("bucket")).drop("trace_input_tokens")
    if energy is None:
        return frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ENERGY_COLUMNS)
    return frame.join(energy.select("request_id", *ENERGY_COLUMNS), on="request_id", how="left", maintain_order="left")


def _trace_columns(run: Run) -> pl.DataFrame:
    """The trace's input length and label by request; no rows where the run has no trace."""
    schema = {"request_id": pl.UInt64(), "trace_input_tokens": pl.UInt32(), "label": pl.String()}
    if not run.has("trace"):
        return pl.DataFrame(schema=schema)
    trace = run.scan("trace")
    label = pl.col("label") if "label" in trace.collect_schema() else pl.lit(None)
    columns = (
        pl.col("request_id"),
        pl.col("input_tokens").alias("trace_input_tokens"),
        label.cast(pl.String).alias("label"),
    )
    return trace.select(columns).unique("request_id", keep="first", maintain_order=True).collect()
