"""Percentiles of the gaps between tokens (ITL, TBT), however many there are, in the memory of one histogram.

Each octave is cut into 512 cells by the leading bits of the number itself (Gil Tene's HdrHistogram), so a percentile is
off by 0.1 % at most. What counts as a gap is said in docs/latency.md.
"""

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.clock import NS_PER_MS

CHUNK_COLUMNS = ("chunk_ns", "chunk_tokens")
_SHIFT = 52 - 9  # of a double's 52 bits of mantissa 9 tell the cell
_LOWEST_NS, _HIGHEST_NS = 2.0**10, 2.0**47  # below a microsecond is no time between tokens; above 39 h none is awaited
_FIRST = int(np.float64(_LOWEST_NS).view(np.int64) >> _SHIFT)
_CELLS = int(np.float64(_HIGHEST_NS).view(np.int64) >> _SHIFT) - _FIRST + 1
_UNROLLED = 1 << 16  # chunks at once: a few MiB


class GapHistogram:
    """Counts gaps between tokens by their length."""

    def __init__(self) -> None:
        self._counts = np.zeros(_CELLS, np.int64)

    def add(self, requests: pl.DataFrame) -> None:
        """Count the gaps of rows of requests.parquet, which has `CHUNK_COLUMNS`.

        A chunk of n tokens ends n equal gaps, one without tokens none.
        """
        chunks = int(requests["chunk_ns"].list.len().sum()) or 1
        height = max(1, requests.height * _UNROLLED // chunks)
        for rows in requests.select(CHUNK_COLUMNS).with_row_index("row").iter_slices(height):
            flat = rows.filter(pl.col("chunk_ns").list.len() == pl.col("chunk_tokens").list.len())
            flat = flat.explode(CHUNK_COLUMNS, empty_as_null=False).filter(pl.col("chunk_tokens") > 0).drop_nulls()
            row, tokens = flat["row"].to_numpy(), flat["chunk_tokens"].to_numpy().astype(np.int64)
            same = row[1:] == row[:-1]
            gap_ns = np.diff(flat["chunk_ns"].to_numpy())[same] / tokens[1:][same]
            cells = (np.clip(gap_ns, _LOWEST_NS, _HIGHEST_NS).view(np.int64) >> _SHIFT) - _FIRST
            self._counts += np.bincount(cells, tokens[1:][same], _CELLS).astype(np.int64)

    def percentiles(self, percents: tuple[int, ...]) -> dict[str, float] | None:
        """`{"p50": ms, ...}`, None without a gap."""
        upto: npt.NDArray[np.int64] = np.cumsum(self._counts)
        if not upto[-1]:
            return None
        edges = ((np.arange(_CELLS + 1, dtype=np.int64) + _FIRST) << _SHIFT).view(np.float64)
        cells = np.searchsorted(upto, np.array(percents) / 100 * (upto[-1] - 1), "right")
        middle_ms = (edges[cells] + edges[cells + 1]) / 2 / NS_PER_MS
        return {f"p{percent}": float(ms) for percent, ms in zip(percents, middle_ms, strict=True)}
