"""A trace in batches: checked as `tracegen.schema.read_trace` checks it, but never in memory as a whole."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from replay.cut import Load, Peak, ramped
from tracegen.errors import ReplayError
from tracegen.prefixes import mixed
from tracegen.schema import read_metadata, read_trace, read_trace_parts
from tracegen.writer import TraceWriter

BATCH_ROWS = 1 << 16  # some 3 MiB of a trace without hashes
_IDS_AT_ONCE = 1 << 20  # 8 MiB


class Survey(NamedTuple):
    """What the run needs to know of the trace before it begins; of the requests that will be sent."""

    requests: int
    first_ns: int  # arrival
    last_ns: int
    output_tokens: int
    changed: int  # dropped or clipped for their length
    prioritized: bool  # whether any has a priority but 0
    longest_tokens: int = 0  # input and output
    turns: bool = False  # whether any comes so long after the end of another one
    load: Load = Load()
    input_lengths: tuple[tuple[int, int], ...] = ()  # each that occurs, in order, and how often

    def input_quantiles(self, shares: Sequence[float]) -> list[int]:
        """Quantiles of the input lengths, the nearest; 1 where there is no request."""
        upto = np.cumsum([count for _, count in self.input_lengths])
        places = [math.floor((self.requests - 1) * share + 0.5) for share in shares]
        found = np.searchsorted(upto, places, "right")
        return [self.input_lengths[at][0] if self.requests else 1 for at in found]


NOTHING = Survey(0, 0, 0, 0, 0, prioritized=False)


class _Sums:
    """A survey in the making."""

    def __init__(self) -> None:
        self.requests, self.rising = 0, True
        self._first_ns = self._last_ns = self._output_tokens = self._longest_tokens = 0
        self._prioritized = self._turns = False
        self._last_id = -1
        self._peak = Peak()
        self._lengths: Counter[int] = Counter()

    def add(self, rows: pl.DataFrame) -> None:
        """The next requests that will be sent."""
        if rows.is_empty():
            return
        ids, arrival_ns = rows["request_id"].to_numpy(), rows["arrival_ns"].to_numpy()
        self.rising &= int(ids[0]) > self._last_id and bool((ids[1:] > ids[:-1]).all())
        self._last_id = int(ids[-1])
        self._first_ns = self._first_ns if self.requests else int(arrival_ns[0])
        self._last_ns = int(arrival_ns[-1])
        self.requests += rows.height
        self._prioritized |= prioritized(rows)
        if {"parent_id", "think_ns"} <= set(rows.columns):
            self._turns |= rows.select(
                (pl.col("parent_id").is_not_null() & pl.col("think_ns").is_not_null()).any()
            ).item()
        inputs, outputs = (rows[name].to_numpy().astype(np.int64) for name in ("input_tokens", "output_tokens"))
        self._output_tokens += int(outputs.sum())
        self._longest_tokens = max(self._longest_tokens, int((inputs + outputs).max()))
        self._peak.add(arrival_ns, outputs)
        self._lengths.update(dict(zip(*(of.tolist() for of in np.unique(inputs, return_counts=True)), strict=True)))

    def survey(self, changed: int) -> Survey:
        """What was found; `changed`: how many were dropped or clipped."""
        return Survey(
            self.requests, self._first_ns, self._last_ns, self._output_tokens, changed, self._prioritized,
            self._longest_tokens, self._turns, self._peak.load, tuple(sorted(self._lengths.items())),
        )  # fmt: skip


@dataclass(frozen=True)
class TraceSource:
    """The requests of the trace at `path` that are to be replayed.

    Methods raise `TraceError` where the trace breaks a rule, and `ReplayError` where nothing of it can be replayed.
    """

    path: Path
    duration_ns: int | None = None  # only what arrives before
    num_prompts: int | None = None  # only so many
    max_model_len: int | None = None
    overlong: str = "refuse"  # what to do with requests beyond `max_model_len`
    batch_rows: int = BATCH_ROWS
    time_scale: float = 1.0  # times this much the trace's distances
    ramp_ns: int = 0  # from no load to the trace's own rate
    without: npt.NDArray[np.uint64] | None = None  # ids that are left out, in order

    @property
    def hashed(self) -> bool:
        """Whether the trace has prefix hashes."""
        return "prefix_hashes" in pq.read_schema(self.path).names

    def survey(self) -> Survey:
        """Read it once and check all of it; once more, for each million rows, where ids do not rise."""
        asked, changed = 0, 0
        first_too_long: dict[str, int] | None = None
        sums = _Sums()
        for batch in self._sliced():
            asked += batch.height
            too_long = batch.filter(self._too_long())
            if too_long.height and first_too_long is None:
                first_too_long = too_long.row(0, named=True)
            changed += too_long.height
            sums.add(self._fit(batch))
        if not asked:
            raise ReplayError(f"{self.path}: no request arrives within --duration; give a longer one")
        if first_too_long is not None and (self.overlong == "refuse" or not sums.requests):
            raise _too_long_error(first_too_long, changed, asked, self.max_model_len or 0, self.overlong)
        if not sums.rising:
            self._check_ids(asked)
        return sums.survey(changed)

    def _check_ids(self, rows: int) -> None:
        """Raise `TraceError` where an id occurs twice; a share of them is held at once."""
        shares = 1 + rows // _IDS_AT_ONCE
        for share in range(shares):
            every = (batch["request_id"].to_numpy() for batch in self._sliced())
            mine = np.concatenate([ids[mixed(ids) % shares == share] for ids in every])
            if np.unique(mine).size < mine.size:
                read_trace(self.path)  # names the row

    def batches(self) -> Iterator[pl.DataFrame]:
        """The requests, some rows at a time, none of the batches empty."""
        for batch in self._sliced():
            fitted = self._fit(batch)
            if fitted.height:
                yield fitted

    def write(self, path: Path) -> None:
        """Write the requests to `path`, with the trace's metadata. Raises `TraceError` where that cannot be done."""
        with TraceWriter(path, read_metadata(self.path)) as writer:
            for batch in self.batches():
                writer.write(batch)

    def prefixes(self) -> pl.Series | None:
        """The column `prefix_hashes` of all requests; None where the trace has none."""
        if not self.hashed:
            return None
        return pl.concat([batch.select("prefix_hashes") for batch in self.batches()]).to_series()

    def _too_long(self) -> pl.Expr:
        return pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens") > (self.max_model_len or 2**62)

    def _fit(self, batch: pl.DataFrame) -> pl.DataFrame:
        """What is sent of `batch`, and when."""
        if self.without is not None:
            batch = batch.filter(~np.isin(batch["request_id"].to_numpy(), self.without))
        if self.max_model_len is not None and self.overlong == "clip":
            batch = clipped(batch, self.max_model_len)
        else:
            batch = batch.filter(~self._too_long())
        arrival_ns = batch["arrival_ns"].to_numpy()
        if self.time_scale != 1:
            arrival_ns = (arrival_ns * self.time_scale).astype(np.int64)
        if self.ramp_ns:
            arrival_ns = ramped(arrival_ns, self.ramp_ns)
        return batch.with_columns(pl.Series("arrival_ns", arrival_ns))

    def _sliced(self) -> Iterator[pl.DataFrame]:
        """Batches up to `duration_ns` and `num_prompts`."""
        left = self.num_prompts
        for batch in read_trace_parts(self.path, self.batch_rows):
            cut = batch if left is None else batch.head(left)
            if self.duration_ns is not None:
                cut = cut.filter(pl.col("arrival_ns") < self.duration_ns)
            if cut.height:
                yield cut
            left = None if left is None else left - cut.height
            if cut.height < batch.height or left == 0:
                return


def prioritized(trace: pl.DataFrame) -> bool:
    """Whether `trace` has a priority that is not 0, the server's own default."""
    return "priority" in trace.columns and bool((trace["priority"] != 0).any())


def clipped(trace: pl.DataFrame, max_model_len: int) -> pl.DataFrame:
    """`trace` with every request inside the model's context: where one is not, its input is cut, then its output."""
    output = pl.min_horizontal(pl.col("output_tokens"), pl.lit(max_model_len - 1, pl.UInt32))
    input_ = pl.min_horizontal(pl.col("input_tokens"), (max_model_len - output).cast(pl.UInt32))
    return trace.with_columns(input_.alias("input_tokens"), output.alias("output_tokens"))


def _too_long_error(
    first: Mapping[str, int], count: int, requests: int, max_model_len: int, overlong: str
) -> ReplayError:
    """What to say where `count` of `requests` are beyond `max_model_len` tokens, the trace's row `first` before all."""
    if overlong == "drop":
        return ReplayError(f"every request is longer than the model's {max_model_len} tokens; nothing is left to send")
    return ReplayError(
        f"{count:,} of {requests:,} requests are longer than the model's {max_model_len} tokens (request_id "
        f"{first['request_id']}: {first['input_tokens']} + {first['output_tokens']}); use --overlong drop or clip"
    )
