"""One row a request, with everything known of it: times, latencies, size bucket, label, energy."""

from collections.abc import Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.latency import latency_exprs
from analysis.manifest import worker_offsets_ns
from replay.rundir import Run
from tracegen.buckets import BUCKETS, INPUT_EDGES, OUTPUT_EDGES, bucket_expr
from tracegen.errors import AnalysisError, RunError

ENERGY_COLUMNS = ("energy_j", "prefill_j", "decode_j", "shared_j", "energy_se_j")
CORE_ENERGY = ENERGY_COLUMNS[:3]
# What latencies, buckets and labels are made of: all that most questions need, and a fraction of the table's bytes.
CORE = (
    "request_id",
    "scheduled_ns",
    "sent_ns",
    "first_token_ns",
    "last_token_ns",
    "input_tokens",
    "output_tokens",
    "output_tokens_wanted",
    "status",
    "worker",
)


def request_table(run: Run, energy: pl.DataFrame | None = None, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """requests.parquet of `run` with latency columns, `bucket` and `label`, and the columns of `energy` (else null).

    Rows are in order of the scheduled time. `columns`: read these of requests.parquet alone, `CORE` among them, the
    joules of `CORE_ENERGY`, and texts as categories, for half the memory; None: all, the times of chunks too.
    A bucket goes by the trace's input tokens and the output tokens that the server counted; where the trace does not
    have the request, by the server's input count, and where nothing was served, by the output asked for.
    Raises `AnalysisError` where no request has ended yet, `RunError` for a table that is wrong.
    """
    frame = read_requests(run, columns)
    frame = frame.hstack(beside(frame["request_id"], _trace_columns(run)))
    bucket = bucket_expr(
        pl.coalesce("trace_input_tokens", "input_tokens"),
        pl.coalesce("output_tokens", "output_tokens_wanted"),
        INPUT_EDGES,
        OUTPUT_EDGES,
    ).alias("bucket")
    label = pl.col("label").cast(pl.String)
    texts = (label, bucket) if columns is None else (bucket.cast(pl.Enum(BUCKETS)),)
    frame = frame.with_columns(*latency_exprs(), *texts).drop("trace_input_tokens")
    joules = ENERGY_COLUMNS if columns is None else CORE_ENERGY
    if energy is None:
        return frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in joules)
    return frame.hstack(beside(frame["request_id"], energy.select("request_id", *joules)))


def read_requests(run: Run, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """requests.parquet, all of it, or `columns` with `status` as categories, in order of the scheduled time."""
    if not run.has("requests"):
        state = run.manifest.get("state")
        raise AnalysisError(
            f"{run.path}: no request had ended when this run was last written (state: {state}), so it has no "
            "requests.parquet; wait for it if it still runs, else replay it again"
        )
    frame = run.scan("requests").collect() if columns is None else _narrow(run, "requests", columns, "status")
    for name in ("request_id", "scheduled_ns"):
        if frame[name].null_count():
            row = frame[name].is_null().arg_max()
            raise RunError(f"{run.path / 'requests.parquet'}: column '{name}' has a null in row {row}")
    return frame if frame["scheduled_ns"].is_sorted() else frame.sort("scheduled_ns", "request_id")


def _narrow(run: Run, table: str, columns: Sequence[str], text: str) -> pl.DataFrame:
    """`columns` of a table, its `text` as categories, read some rows at a time: never are all texts in memory."""
    category = pl.col(text).cast(pl.Categorical)
    parts = [batch.with_columns(category) for batch in run.batches(table, columns)]
    if not parts:
        return run.scan(table, columns).with_columns(category).collect()
    frame = pl.concat(parts, rechunk=True)
    parts.clear()
    pa.default_memory_pool().release_unused()  # or what the file was read into stays beside it
    return frame


def worker_offset_ns(run: Run) -> pl.Expr:
    """What to take off a time in requests.parquet to bring it onto the replayer's clock: its worker's host's offset."""
    offsets = worker_offsets_ns(run)
    if not any(offsets.values()):
        return pl.lit(0, pl.Int64)
    return pl.col("worker").replace_strict(offsets, default=0, return_dtype=pl.Int64)


def stored_columns(run: Run, table: str) -> set[str]:
    """The columns of `table`; of one that is still in parts those that each part has."""
    return set.intersection(*(set(pq.read_schema(part).names) for part in run.files(table)))


def beside(request_id: pl.Series, other: pl.DataFrame) -> pl.DataFrame:
    """The columns of `other` but its `request_id`, one row for each of `request_id`; null where it has no such row.

    Of an id that `other` has twice the first row counts. Tables of one run are mostly in the same order; then nothing
    is looked up.
    """
    if len(request_id) == other.height and request_id.equals(other["request_id"]):
        return other.drop("request_id")
    once = other.unique("request_id", keep="first", maintain_order=True)
    return (
        request_id.to_frame("request_id")
        .join(once, on="request_id", how="left", maintain_order="left")
        .drop("request_id")
    )


def _trace_columns(run: Run) -> pl.DataFrame:
    """The trace's input length and label (categories) by request; no rows where the run has no trace."""
    schema = {"request_id": pl.UInt64(), "trace_input_tokens": pl.UInt32(), "label": pl.Categorical()}
    if not run.has("trace"):
        return pl.DataFrame(schema=schema)
    columns = ["request_id", "input_tokens"]
    if "label" in stored_columns(run, "trace"):
        trace = _narrow(run, "trace", [*columns, "label"], "label")
    else:
        trace = run.scan("trace", columns).with_columns(pl.lit(None, pl.Categorical).alias("label")).collect()
    return trace.rename({"input_tokens": "trace_input_tokens"})
