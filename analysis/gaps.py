"""Gaps between tokens (ITL, TBT) of long runs in bounded memory: counted in a histogram, a few requests at a time.

The histogram is Gil Tene's HdrHistogram: each octave of a gap's length is cut into the same number of cells, found by
the leading bits of the number itself. A percentile read from it is off by at most `RELATIVE_ERROR`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.checks import check_chunks
from analysis.requests import stored_columns
from replay.rundir import Run
from tracegen.errors import AnalysisError

CHUNK_COLUMNS = ("chunk_ns", "chunk_tokens")
MOST_GROUPS = 2000  # 0.3 GB of cells
_BITS = 9  # of the mantissa: 512 cells an octave
RELATIVE_ERROR = 2.0 ** -(_BITS + 1)  # half a cell at its octave's lower end: 0.1 %
_SHIFT = 52 - _BITS  # a double has 52 bits of mantissa
# Below a microsecond is no time at all between tokens, above 2^27 ms (37 h) none is waited for.
_LOWEST_MS, _HIGHEST_MS = 2.0**-10, 2.0**27
_FIRST = int(np.float64(_LOWEST_MS).view(np.int64) >> _SHIFT)
_CELLS = int(np.float64(_HIGHEST_MS).view(np.int64) >> _SHIFT) - _FIRST + 1
_ROWS = 1 << 14  # requests whose gaps are in memory at once

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TokenGaps:
    """The gaps of some requests: one entry a gap."""

    row: Ints  # of the request in the frame
    itl_ms: Floats  # per token
    tokens: Ints  # how many tokens came after it, so how many times it counts


def token_gaps(chunks: pl.DataFrame) -> TokenGaps:
    """The gaps of a frame with `chunk_ns` and `chunk_tokens`.

    A chunk of several tokens counts as so many equal gaps: gap / tokens each. Chunks without tokens are no end of a
    gap; a request whose two lists differ in length has none.
    """
    whole = chunks.select(CHUNK_COLUMNS).with_row_index("row")
    fits = pl.col("chunk_ns").list.len() == pl.col("chunk_tokens").list.len()
    whole = whole.filter(fits & (pl.col("chunk_ns").list.len() > 1))
    flat = whole.explode(CHUNK_COLUMNS, empty_as_null=False).filter(pl.col("chunk_tokens") > 0).drop_nulls()
    row, at_ns = flat["row"].to_numpy().astype(np.int64), flat["chunk_ns"].to_numpy()
    tokens = flat["chunk_tokens"].to_numpy().astype(np.int64)
    same = row[1:] == row[:-1]
    gap_ms = np.diff(at_ns)[same] / 1e6
    return TokenGaps(row[1:][same], gap_ms / tokens[1:][same], tokens[1:][same])


class GapHistogram:
    """Counts of gaps in each of some groups."""

    def __init__(self, groups: int) -> None:
        if groups > MOST_GROUPS:
            raise AnalysisError(f"{groups:,} groups are more than {MOST_GROUPS:,}; group more coarsely (--window)")
        self._counts = np.zeros((groups, _CELLS), np.int64)

    def add(self, group: Ints, itl_ms: Floats, tokens: Ints) -> None:
        """Count `tokens` gaps of `itl_ms` in their `group`s."""
        cells = np.clip(itl_ms, _LOWEST_MS, _HIGHEST_MS).view(np.int64) >> _SHIFT
        if not group.size:
            return
        low = int(group.min())  # requests come in order of time, so those added together are of few windows
        flat = (group - low) * _CELLS + (cells - _FIRST)
        rows = int(group.max()) - low + 1
        counts = np.bincount(flat, tokens, rows * _CELLS).astype(np.int64)
        self._counts[low : low + rows] += counts.reshape(rows, _CELLS)

    def any(self) -> bool:
        """Whether there was a gap at all."""
        return bool(self._counts.any())

    def quantiles(self, shares: Sequence[float]) -> list[list[float | None]]:
        """Quantiles of each group and last of all together: linear interpolation to `RELATIVE_ERROR`; None: no gaps."""
        return [_quantiles(row, shares) for row in (*self._counts, self._counts.sum(axis=0))]


def _quantiles(counts: Ints, shares: Sequence[float]) -> list[float | None]:
    """Quantiles of one row of counts."""
    upto = np.cumsum(counts)
    if not upto[-1]:
        return [None] * len(shares)
    edges = ((np.arange(_CELLS + 1, dtype=np.int64) + _FIRST) << _SHIFT).view(np.float64)
    middle_ms = (edges[:-1] + edges[1:]) / 2
    middle_ms[0] = 0.0
    rank = np.asarray(shares) * (upto[-1] - 1)
    below, above = (middle_ms[np.searchsorted(upto, r, "right")] for r in (np.floor(rank), np.ceil(rank)))
    return [float(value) for value in below + (above - below) * (rank - np.floor(rank))]


def chunk_batches(run: Run) -> Iterator[pl.DataFrame]:
    """`request_id` and the chunk columns of `run`, some requests at a time; nothing where it has none.

    Raises `RunError` where they cannot be.
    """
    if set(CHUNK_COLUMNS) <= stored_columns(run, "requests"):
        for batch in run.batches("requests", ["request_id", *CHUNK_COLUMNS]):
            for rows in batch.iter_slices(_ROWS):
                check_chunks(run, rows)
                yield rows
