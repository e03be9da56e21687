"""The run directory's tables, row group after row group: hidden until they are whole.

Columns come as numpy arrays. Sorted or growing whole numbers are written as differences (Parquet's
DELTA_BINARY_PACKED), repeated values through a dictionary: four times faster than the default encodings, and smaller.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.sim.compiled import compiled
from replay.sim.state import DECODE
from replay.sim.virtual import DONE, Output
from replay.steps import SIM_STEP
from replay.tables import STEPS
from tracegen.schema import file_metadata

Ints = npt.NDArray[np.int64]
RecordArray = npt.NDArray[np.void]
Columns = Mapping[str, Any]  # a numpy array, an arrow array, or one value for all rows

KINDS = ("prefill", "decode")  # by `replay.sim.core.PREFILL` and `DECODE`
STEPS_OF_SIM = pl.Schema({**STEPS, **SIM_STEP})
_GROWING = {
    "steps": ("step", "start_ns", "end_ns", "context_tokens", "prefill_tokens", "prefill_attention"),
    "segments": ("request_id", "first_step", "last_step", "context_start"),
    "arrivals": ("request_id", "arrival_ns"),
    "power": ("t_ns", "sensor_ns", "power_instant_mw", "power_average_mw", "energy_mj"),
    "requests": (
        "request_id", "scheduled_ns", "sent_ns", "headers_ns", "first_token_ns", "last_token_ns", "done_ns",
        "input_tokens", "output_tokens", "output_tokens_wanted", "cached_tokens",
    ),
}  # fmt: skip
_TEXT = pa.dictionary(pa.int32(), pa.string())
_TIMES = ("t_ns", "start_ns", "scheduled_ns", "arrival_ns")  # what a reader may pick row groups by
_SENT = {"request_id": np.uint64, "arrival_ns": np.int64, "input_tokens": np.uint32, "output_tokens": np.uint32}
_UNFINISHED = -1  # in place of a DONE row's number
_LEVEL = 1  # of zstd: higher ones take longer and save little on differences
_ROW_GROUP = 1 << 20


class TableWriter:
    """One table of a run directory, written under a hidden name until `commit`; a context manager.

    Left without `commit`, it removes what it wrote.
    """

    def __init__(self, run_dir: Path, table: str, schema: pl.Schema) -> None:
        """A table of `schema` in `run_dir`."""
        self._path = run_dir / f"{table}.parquet"
        self._partial = run_dir / f".{table}.parquet.partial"
        arrow = schema.to_frame().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        self._schema = pa.schema([f.with_type(_TEXT) if pa.types.is_large_string(f.type) else f for f in arrow])
        growing = [name for name in _GROWING[table] if name in schema]
        self._writer = pq.ParquetWriter(
            self._partial,
            self._schema,
            store_schema=False,  # a reader sees texts, not how they were given here
            compression="zstd",
            compression_level=_LEVEL,
            use_dictionary=[name for name in schema if name not in growing],
            column_encoding=dict.fromkeys(growing, "DELTA_BINARY_PACKED"),
            write_statistics=[name for name in schema if name in _TIMES],
            write_page_checksum=True,  # as in `tracegen.schema.write_parquet`: a flipped bit is an error
        )

    def __enter__(self) -> Self:
        """The open table."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not committed."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def append(self, columns: Columns, rows: int) -> None:
        """Write `rows` rows as row groups of their own."""
        if rows:
            arrays = [_arrow(columns[field.name], field.type, rows) for field in self._schema]
            table = pa.Table.from_arrays(arrays, schema=self._schema)
            self._writer.write_table(table, row_group_size=_ROW_GROUP)

    def commit(self) -> None:
        """The table is whole: let it be seen."""
        self._writer.close()
        self._partial.replace(self._path)


def _arrow(values: Any, kind: pa.DataType, rows: int) -> pa.Array:
    """A column of `rows` rows; one value stands for all."""
    if isinstance(values, np.ndarray):
        return pa.array(np.ascontiguousarray(values)).cast(kind, safe=False)
    if isinstance(values, pa.Array):
        return values.cast(kind)
    if values is None:
        return pa.nulls(rows, kind)
    if kind == _TEXT:
        return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [values])
    return pa.repeat(pa.scalar(values, kind), rows)


def step_columns(steps: RecordArray, zero_ns: int, lock_mhz: float) -> Columns:
    """STEP rows as columns of steps.parquet; their times count from `zero_ns`, their clocks were locked to `lock_mhz`.

    As in wall time, `clock_mhz` is the lock: what the truth of a step is computed from.
    """
    same = ("instance", "step", "prefill_tokens", "decode_tokens", "context_tokens", "requests", "waiting", "kv_usage")
    return {
        **{name: steps[name] for name in same},
        "start_ns": steps["start_ns"] + zero_ns,
        "end_ns": steps["end_ns"] + zero_ns,
        "prefill_attention": steps["attention_twice"] // 2,  # halves are beyond the table's resolution
        "clock_mhz": lock_mhz,
        "heat": steps["heat"],
    }


def segment_columns(segments: RecordArray, request_ids: npt.NDArray[np.uint64]) -> Columns:
    """SEGMENT rows as columns of segments.parquet; `request_ids` [rows] are their requests'."""
    same = ("instance", "first_step", "last_step", "tokens_per_step", "context_start")
    kinds = pa.DictionaryArray.from_arrays(np.ascontiguousarray(segments["kind"]), KINDS)
    return {**{name: segments[name] for name in same}, "request_id": request_ids, "kind": kinds}


class Window:
    """The requests that have been sent but not yet written: those from the earliest unfinished one on."""

    def __init__(self, zero_ns: int) -> None:
        """`zero_ns`: the time of the trace's zero."""
        self._zero_ns, self._base = zero_ns, 0
        self._sent = {name: np.zeros(0, kind) for name, kind in _SENT.items()}
        self._done = np.zeros(0, DONE)
        self._scheduled = np.zeros(0, np.int64)  # tokens that went through the engine

    def admit(self, trace: pl.DataFrame) -> None:
        """The rows of `trace` come after those admitted before."""
        self._sent = {name: np.concatenate([kept, trace[name].to_numpy()]) for name, kept in self._sent.items()}
        waiting = np.zeros(trace.height, DONE)
        waiting["number"] = _UNFINISHED
        self._done = np.concatenate([self._done, waiting])
        self._scheduled = np.concatenate([self._scheduled, np.zeros(trace.height, np.int64)])

    def add(self, output: Output) -> npt.NDArray[np.uint64]:
        """Take what the engines did; the `request_id` of each of its segments."""
        segments, done = output.segments, output.done
        at = segments["number"] - self._base
        tokens = (segments["last_step"] - segments["first_step"] + 1) * segments["tokens_per_step"]
        self._scheduled += np.bincount(at, tokens, self._scheduled.size).astype(np.int64)
        self._done[done["number"] - self._base] = done
        found: npt.NDArray[np.uint64] = self._sent["request_id"][at]
        return found

    def take(self) -> tuple[Columns, int]:
        """Columns of requests.parquet for the next requests that have all ended, in the trace's order; how many.

        Beside them `scheduled_tokens`: how many of its tokens went through the engine, again and again if need be.
        """
        unfinished = self._done["number"] == _UNFINISHED
        rows = int(np.argmax(unfinished)) if unfinished.any() else unfinished.size
        sent, done = {name: values[:rows] for name, values in self._sent.items()}, self._done[:rows]
        columns = {**self._columns(sent, done), "scheduled_tokens": self._scheduled[:rows]}
        self._sent = {name: values[rows:] for name, values in self._sent.items()}
        self._done, self._base = self._done[rows:], self._base + rows
        self._scheduled = self._scheduled[rows:]
        return columns, rows

    def _columns(self, sent: Mapping[str, npt.NDArray[Any]], done: RecordArray) -> Columns:
        """As a client without latency of its own sees them; there is no HTTP, so no status of it."""
        begin_ns, end_ns = sent["arrival_ns"] + self._zero_ns, done["last_token_ns"] + self._zero_ns
        return {
            "request_id": sent["request_id"],
            "instance": done["instance"],
            **dict.fromkeys(("scheduled_ns", "sent_ns", "headers_ns"), begin_ns),
            "first_token_ns": done["first_token_ns"] + self._zero_ns,
            **dict.fromkeys(("last_token_ns", "done_ns"), end_ns),
            "input_tokens": sent["input_tokens"],
            **dict.fromkeys(("output_tokens", "output_tokens_wanted"), sent["output_tokens"]),
            "cached_tokens": done["cached_tokens"],
            "status": "ok",
            "http_status": None,
            "error": None,
            "worker": 0,
        }


class TokenTimes:
    """When each token of a run came; everything is kept until `take`."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._ends_ns: dict[int, list[Ints]] = {}
        self._segments: list[RecordArray] = []

    def add(self, output: Output) -> None:
        """More of what the engines did."""
        for instance in np.unique(output.steps["instance"]).tolist():
            ends_ns = output.steps["end_ns"][output.steps["instance"] == instance]
            self._ends_ns.setdefault(instance, []).append(ends_ns)
        self._segments.append(output.segments)

    def take(self, prompts: npt.NDArray[np.uint32], outputs: npt.NDArray[np.uint32]) -> tuple[Ints, Ints]:
        """The tokens' times, ns, request after request, and [requests + 1] where each request's begin.

        `prompts` and `outputs` are the tokens of all requests, in the order that they were fed.
        """
        segments = np.concatenate(self._segments)
        segments = segments[np.lexsort((segments["first_step"], segments["number"]))]
        offsets = np.concatenate([[0], np.cumsum(outputs, dtype=np.int64)])
        times_ns = np.zeros(offsets[-1], np.int64)
        for instance, ends_ns in self._ends_ns.items():
            mine = np.ascontiguousarray(segments[segments["instance"] == instance])
            _token_times(mine, np.concatenate(ends_ns), prompts.astype(np.int64), offsets, times_ns)
        return times_ns, offsets


@compiled
def _token_times(segments: RecordArray, ends_ns: Ints, prompts: Ints, offsets: Ints, times_ns: Ints) -> None:
    """Fill in the times of the tokens of one instance's `segments`, sorted by request and step.

    A step of decoding makes a token. One of prefill makes one when it computes the last of what is known so far: the
    prompt and, after a preemption, the tokens generated before.
    """
    request, generated = np.int64(-1), 0
    for i in range(len(segments)):
        segment = segments[i]
        if segment.number != request:
            request, generated = segment.number, 0
        at = offsets[request]
        if segment.kind == DECODE:
            for step in range(segment.first_step, segment.last_step + 1):
                times_ns[at + generated] = ends_ns[step]
                generated += 1
            continue
        steps = segment.last_step - segment.first_step + 1
        if segment.context_start + steps * segment.tokens_per_step == prompts[request] + generated:
            times_ns[at + generated] = ends_ns[segment.last_step]
            generated += 1


class TraceWriter:
    """The slice of the trace that is replayed, written batch after batch under a hidden name until `commit`."""

    def __init__(self, run_dir: Path, metadata: Mapping[str, Any]) -> None:
        """`metadata`: the trace's own."""
        self._path, self._partial = run_dir / "trace.parquet", run_dir / ".trace.parquet.partial"
        self._metadata = file_metadata(metadata)
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        """The open table."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not committed."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def append(self, batch: pl.DataFrame) -> None:
        """Write the checked rows of `batch`."""
        table = batch.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).replace_schema_metadata(self._metadata)
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._partial, table.schema, compression="zstd", compression_level=_LEVEL, write_page_checksum=True
            )
        self._writer.write_table(table)

    def commit(self) -> None:
        """The table is whole: let it be seen."""
        self._close()
        self._partial.replace(self._path)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
