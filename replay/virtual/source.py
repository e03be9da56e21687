"""A trace in batches: checked as `tracegen.schema.read_trace` checks it, but never in memory as a whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from replay.plan import fit_lengths, prioritized, too_long_error
from tracegen.errors import ReplayError, TraceError
from tracegen.schema import SCHEMA_VERSION, check_blocks, check_trace, read_metadata, read_trace

BATCH_ROWS = 1 << 16


class Survey(NamedTuple):
    """What the run needs to know of the trace before it begins; of the requests that will be sent."""

    requests: int
    first_ns: int  # arrival
    last_ns: int
    output_tokens: int
    changed: int  # dropped or clipped for their length
    prioritized: bool  # whether any has a priority but 0


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

    def survey(self) -> Survey:
        """Read it once and check all of it."""
        asked, kept, output_tokens, changed = 0, 0, 0, 0
        first_ns = last_ns = 0
        priorities = False
        first_too_long: dict[str, int] | None = None
        ids: list[npt.NDArray[np.uint64]] = []
        for batch in self._sliced():
            asked += batch.height
            too_long = batch.filter(self._too_long())
            if too_long.height and first_too_long is None:
                first_too_long = too_long.row(0, named=True)
            changed += too_long.height
            fitted = self._fit(batch)
            ids.append(fitted["request_id"].to_numpy())
            if fitted.height:
                first_ns = first_ns if kept else int(fitted["arrival_ns"][0])
                last_ns = int(fitted["arrival_ns"][-1])
            kept += fitted.height
            priorities |= prioritized(fitted)
            output_tokens += int(fitted["output_tokens"].sum())
        if not asked:
            raise ReplayError(f"{self.path}: no request arrives within --duration; give a longer one")
        if first_too_long is not None and (self.overlong == "refuse" or not kept):
            raise too_long_error(first_too_long, changed, asked, self.max_model_len or 0, self.overlong)
        every = np.concatenate(ids)
        if not (every[1:] > every[:-1]).all() and np.unique(every).size < every.size:
            read_trace(self.path)  # names the row
        return Survey(kept, first_ns, last_ns, output_tokens, changed, priorities)

    def batches(self) -> Iterator[pl.DataFrame]:
        """The requests, some rows at a time, none of the batches empty."""
        for batch in self._sliced():
            fitted = self._fit(batch)
            if fitted.height:
                yield fitted

    def prefixes(self) -> pl.Series | None:
        """The column `prefix_hashes` of all requests; None where the trace has none."""
        if "prefix_hashes" not in pq.read_schema(self.path).names:
            return None
        return pl.concat([batch.select("prefix_hashes") for batch in self.batches()]).to_series()

    def _too_long(self) -> pl.Expr:
        return pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens") > (self.max_model_len or 2**62)

    def _fit(self, batch: pl.DataFrame) -> pl.DataFrame:
        if self.overlong == "clip":
            return fit_lengths(batch, self.max_model_len, "clip")[0]
        return batch.filter(~self._too_long())

    def _sliced(self) -> Iterator[pl.DataFrame]:
        """Batches up to `duration_ns` and `num_prompts`."""
        left = self.num_prompts
        for batch in self._checked():
            cut = batch if left is None else batch.head(left)
            if self.duration_ns is not None:
                cut = cut.filter(pl.col("arrival_ns") < self.duration_ns)
            if cut.height:
                yield cut
            left = None if left is None else left - cut.height
            if cut.height < batch.height or left == 0:
                return

    def _checked(self) -> Iterator[pl.DataFrame]:
        """Batches of the file, each checked, and in order."""
        last_ns = 0
        try:
            metadata = read_metadata(self.path)
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                self._check_head(metadata, file)
                for rows in file.iter_batches(self.batch_rows):
                    table = pa.Table.from_batches([rows])
                    frame = pl.DataFrame(dict(zip(table.column_names, table.columns, strict=True)))
                    batch = check_trace(frame, str(self.path))
                    self._check(batch["arrival_ns"][0] >= last_ns, "is not in order of arrival_ns")
                    last_ns = batch["arrival_ns"][-1]
                    yield batch
        except (TraceError, pa.ArrowException, pl.exceptions.PolarsError, OSError, ValueError):
            read_trace(self.path)  # says what is wrong and names the row
            raise

    def _check_head(self, metadata: Mapping[str, Any], file: pq.ParquetFile) -> None:
        """Raise `TraceError` for a file of which no batch can be read."""
        version = str(metadata.get("schema_version", SCHEMA_VERSION))
        self._check(version.partition(".")[0] == SCHEMA_VERSION.partition(".")[0], f"has schema_version {version}")
        self._check(file.metadata.num_rows > 0, "has no rows")
        check_blocks(file.schema_arrow.names, metadata, self.path)

    def _check(self, sound: bool, what: str) -> None:
        if not sound:
            raise TraceError(f"{self.path}: {what}")
