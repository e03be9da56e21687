"""The tables of a run directory: their columns and types, and what of another program's may be read as them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.errors import RunError
from tracegen.schema import TRACE, TRACE_OPTIONAL

REQUESTS = pl.Schema(
    {
        "request_id": pl.UInt64(),
        "instance": pl.UInt16(),
        "scheduled_ns": pl.Int64(),
        "sent_ns": pl.Int64(),
        "headers_ns": pl.Int64(),
        "first_token_ns": pl.Int64(),
        "last_token_ns": pl.Int64(),
        "done_ns": pl.Int64(),
        "input_tokens": pl.UInt32(),  # as the server counted
        "output_tokens": pl.UInt32(),  # as the server counted
        "output_tokens_wanted": pl.UInt32(),
        "cached_tokens": pl.UInt32(),
        "status": pl.String(),
        "http_status": pl.UInt16(),
        "error": pl.String(),
        "worker": pl.UInt16(),
    }
)
REQUESTS_OPTIONAL = pl.Schema({"chunk_ns": pl.List(pl.Int64()), "chunk_tokens": pl.List(pl.UInt16())})
STATUSES = ("ok", "http_error", "stream_error", "connect_error", "timeout", "aborted", "length_mismatch")

STEPS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "step": pl.UInt64(),
        "start_ns": pl.Int64(),
        "end_ns": pl.Int64(),
        "prefill_tokens": pl.UInt32(),
        "decode_tokens": pl.UInt32(),
        "context_tokens": pl.UInt64(),  # sum of the contexts that decode reads, without the step's own tokens
        "prefill_attention": pl.UInt64(),  # sum over prefill chunks of chunk x (tokens before it + chunk / 2)
        "requests": pl.UInt32(),
        "waiting": pl.UInt32(),
        "kv_usage": pl.Float32(),
    }
)
SEGMENTS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "request_id": pl.UInt64(),  # null: warm-up or not ours
        "first_step": pl.UInt64(),
        "last_step": pl.UInt64(),  # inclusive
        "kind": pl.String(),  # prefill | decode
        "tokens_per_step": pl.UInt32(),
        "context_start": pl.UInt32(),  # tokens before first_step
    }
)
ARRIVALS = pl.Schema(
    {
        "instance": pl.UInt16(),
        "request_id": pl.UInt64(),  # null: warm-up or not ours
        "arrival_ns": pl.Int64(),  # when the engine's scheduler got it
    }
)
POWER = pl.Schema(
    {
        "t_ns": pl.Int64(),  # polled
        "sensor_ns": pl.Int64(),  # when the sensor updated
        "host": pl.String(),
        "gpu": pl.UInt16(),  # NVML index
        "power_instant_mw": pl.UInt32(),
        "power_average_mw": pl.UInt32(),
        "energy_mj": pl.UInt64(),
        "sm_clock_mhz": pl.UInt32(),
        "mem_clock_mhz": pl.UInt32(),
        "temperature_c": pl.UInt16(),
        "utilization": pl.UInt8(),
        "throttle_reasons": pl.UInt64(),
    }
)
CPU_ENERGY = pl.Schema(
    {
        "t_ns": pl.Int64(),
        "host": pl.String(),
        "domain": pl.String(),  # package-0, dram-0, ...
        "energy_uj": pl.UInt64(),  # the counter, its wrap-arounds added up
    }
)
SERVER_METRICS = pl.Schema(
    {
        "t_ns": pl.Int64(),
        "instance": pl.UInt16(),
        "name": pl.String(),
        "labels": pl.String(),
        "value": pl.Float64(),
    }
)
TRUTH = pl.Schema(
    {
        "request_id": pl.UInt64(),
        "energy_j": pl.Float64(),
        "prefill_j": pl.Float64(),
        "decode_j": pl.Float64(),
    }
)

TABLES: dict[str, pl.Schema] = {
    "trace": TRACE,
    "requests": REQUESTS,
    "warmup": REQUESTS,  # those that were due within --warmup, which are sent and not measured
    "steps": STEPS,
    "segments": SEGMENTS,
    "arrivals": ARRIVALS,
    "power": POWER,
    "cpu_energy": CPU_ENERGY,
    "server_metrics": SERVER_METRICS,
    "truth": TRUTH,
}
_OPTIONAL: dict[str, pl.Schema] = {"trace": TRACE_OPTIONAL, "requests": REQUESTS_OPTIONAL, "warmup": REQUESTS_OPTIONAL}


def named(table: str) -> str:
    """`table` with its article, for messages."""
    return f"{'an' if table[0] in 'aeiou' else 'a'} {table} table"


def check_table(frame: pl.LazyFrame, table: str, source: Path, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """`frame` with the known columns of `table` in their types; unknown columns are kept.

    `columns`: those of the table that `frame` should have; None: all that a table must have.
    Raises `RunError` naming the file and the column that is missing or of another type.
    """
    have = frame.collect_schema()
    casts = []
    for name in TABLES[table] if columns is None else columns:
        if name not in have:
            raise RunError(f"{source}: column '{name}' is missing; {named(table)} has {', '.join(TABLES[table])}")
    known = {**TABLES[table], **_OPTIONAL.get(table, {})}
    for name, dtype in known.items():
        if name not in have or have[name] == dtype:
            continue
        if not _convertible(have[name], dtype):
            raise RunError(f"{source}: column '{name}' is {have[name]}, not {dtype}")
        casts.append(pl.col(name).cast(dtype))
    return frame.with_columns(casts) if casts else frame


def _convertible(have: pl.DataType, want: pl.DataType) -> bool:
    """Whether a column written by another program as `have` may be read as `want` without losing its meaning."""
    if isinstance(have, pl.List) and isinstance(want, pl.List):
        return _convertible(
            pl.DataType.from_python(int) if have.inner is None else _dtype(have.inner), _dtype(want.inner)
        )
    if have == pl.Null:
        return True
    if want == pl.String:
        return isinstance(have, (pl.Categorical, pl.Enum))
    return (have.is_integer() and want.is_numeric()) or (have.is_float() and want.is_float())


def _dtype(inner: Any) -> pl.DataType:
    """An inner type as an instance, whichever way it was written."""
    return inner if isinstance(inner, pl.DataType) else inner()
