"""Prefixes that requests share, as hash blocks: which blocks a prompt has, and how many a cache would know."""

from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

Ids = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that mixes well
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def block_hashes(owner: Ids, blocks: NDArray[np.int64], common: Ids, common_blocks: NDArray[np.int64]) -> pl.Series:
    """List(UInt64): `blocks` hashes a row, of which the first `common_blocks` belong to `common`, the rest to `owner`.

    A hash depends on whose block it is and on its place, so rows with the same owner share all blocks that both have.
    """
    offsets = np.concatenate(([0], np.cumsum(blocks)))
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], blocks)
    common, owner = (np.repeat(mixed(whose), blocks) for whose in (common, owner))
    hashes = mixed(np.where(place < np.repeat(common_blocks, blocks), common, owner) + place.astype(np.uint64))
    return pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(offsets, hashes)))


def mixed(values: Ids) -> Ids:
    """The 64 bits of each value, well mixed; different values stay different."""
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    return z ^ (z >> np.uint64(31))


def hit_rate(frame: pl.DataFrame, block_tokens: int) -> float:
    """The share of all input tokens that a cache without limit would know: leading blocks that came in earlier rows.

    `frame` is a trace with `prefix_hashes`; each block counts `block_tokens`.
    """
    return float(hit_blocks(frame).sum()) * block_tokens / float(frame["input_tokens"].cast(pl.UInt64).sum())


def hit_blocks(frame: pl.DataFrame) -> NDArray[np.int64]:
    """How many leading blocks of each row such a cache would know."""
    row = pl.col("row")
    blocks = frame.select(pl.col("prefix_hashes").alias("block")).with_row_index("row").explode("block").drop_nulls()
    again = blocks.with_columns(known=(row.min().over("block") < row).cast(pl.UInt8))
    known = again.select("row", pl.col("known").cum_min().over("row")).filter(pl.col("known") == 1)
    counts: NDArray[np.int64] = np.bincount(known["row"].to_numpy(), minlength=frame.height)
    return counts


def hit_shares(hits: NDArray[np.int64], inputs: NDArray[np.int64], block_tokens: int) -> NDArray[np.float64]:
    """The share of each input that is known, from its known blocks, the last of which may not be full."""
    shares: NDArray[np.float64] = np.minimum(hits * block_tokens, inputs) / inputs
    return shares


@dataclass
class HitTally:
    """The same, counted while rows are made, without keeping their blocks."""

    block_tokens: int
    hit_blocks: int = 0
    input_tokens: int = 0
    most: dict[int, int] = field(default_factory=dict)  # blocks of each system prompt that came so far

    def add(
        self, input_tokens: NDArray[np.int64], known: NDArray[np.int64], system: Ids, system_blocks: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Rows in order of arrival: blocks `known` from the turn before (-1: none), system prompt, its blocks.

        Returns how many blocks of each were known.
        """
        rows = pl.DataFrame({"system": system, "blocks": system_blocks})
        before = pl.col("blocks").cum_max().over("system").shift(1).over("system")
        earlier = pl.col("system").replace_strict(self.most, default=0, return_dtype=pl.Int64)
        seen = rows.select(pl.max_horizontal(before.fill_null(0), earlier)).to_series().to_numpy()
        alone = np.minimum(seen, system_blocks)
        hits: NDArray[np.int64] = np.maximum(known, alone)
        self.hit_blocks += int(hits.sum())
        self.input_tokens += int(input_tokens.sum())
        for number, blocks in rows.group_by("system").agg(pl.col("blocks").max()).iter_rows():
            self.most[number] = max(blocks, self.most.get(number, 0))
        return hits

    @property
    def rate(self) -> float:
        """The share of input tokens so far that were known."""
        return self.hit_blocks * self.block_tokens / self.input_tokens
