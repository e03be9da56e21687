"""One trace of several, or of several times the same with fresh randomness."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tracegen.describe import rate_rps
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.streams import random_stream
from tracegen.transform.rates import refuse_more_than_fit, whole_circle_ns
from tracegen.transform.units import PART, join_copies, unit_numbers

Ints = NDArray[np.int64]
BLOCK_NS = 60 * NS_PER_S  # what stays together of the arrivals: bursts last seconds
NEAR = 5  # blocks to both sides that one is drawn from, so that the rate's course over more than that stays


def merge(frames: Sequence[pl.DataFrame], names: Sequence[str]) -> pl.DataFrame:
    """The requests of all `frames` on one clock, each from its own time 0; rows without a label get its name.

    Requests, sessions and clients get new ids, and traces after the first prefix hashes of their own: they share
    nothing. Raises `TraceError` for fewer than two traces.
    """
    if len(frames) < 2:
        raise TraceError("a merge takes two traces or more")
    refuse_more_than_fit(sum(frame.height for frame in frames), "merge fewer")
    labelled = [
        frame.with_columns(label=pl.col("label").fill_null(name) if "label" in frame.columns else pl.lit(name))
        for frame, name in zip(frames, names, strict=True)
    ]
    return join_copies(labelled, clients=True)


def repeat(frame: pl.DataFrame, times: int, seed: int) -> pl.DataFrame:
    """A trace `times` as long: `frame`, then others like it with fresh randomness.

    Sessions, or requests without one, arrive as in blocks of a minute, each drawn from those within `NEAR` minutes of
    the same place (a local block bootstrap: Paparoditis, Politis 2002), so that bursts and the rate's slow course stay.
    What arrives is the trace's sessions or requests in a new random order, each once before any comes again: lengths
    stay together with what belongs to them, but not with their time. Each time has prefix hashes of its own. Turns that
    would come after the end come behind `frame` instead, as those of sessions that began before: so the rate stays.
    Raises `TraceError` for fewer than 2 times, and a trace without a rate.
    """
    if times < 2:
        raise TraceError(f"{times} times is no repetition; use 2 or more")
    current_rps = rate_rps(frame)
    if current_rps is None:
        raise TraceError("a trace without two different arrival times has no rate to repeat")
    refuse_more_than_fit(frame.height * times, "use fewer times")
    circle_ns = whole_circle_ns(frame, current_rps)
    units = _Units.of(frame)
    first_ns = int(frame["arrival_ns"][0])
    copies = [frame]
    for k in range(1, times):
        stream = random_stream(seed, "repeat", k)
        starts_ns = _near_blocks(units.starts_ns - first_ns, circle_ns, stream)
        order = np.concatenate(
            [stream.permutation(units.sizes.size) for _ in range(starts_ns.size // units.sizes.size + 1)]
        )
        copies.append(units.at(starts_ns + first_ns + k * circle_ns, order[: starts_ns.size]))
    late = pl.col("arrival_ns") >= first_ns + times * circle_ns
    copies[1:] = [
        copy.with_columns(
            pl.when(late).then(pl.col("arrival_ns") - (times - 1) * circle_ns).otherwise("arrival_ns"),
            pl.when(late).then(-1 - pl.col(PART)).otherwise(PART).alias(PART),  # a session goes on there as another
        ).sort("arrival_ns", maintain_order=True)
        for copy in copies[1:]
    ]
    return join_copies(copies)


class _Units:
    """A trace's sessions, or requests alone, ready to be placed at other times."""

    def __init__(self, rows: pl.DataFrame, sizes: Ints, starts_ns: Ints) -> None:
        self._rows, self.sizes, self.starts_ns = rows, sizes, starts_ns
        self._firsts = np.cumsum(sizes) - sizes
        self._since_ns = rows["arrival_ns"].to_numpy() - np.repeat(starts_ns, sizes)

    @classmethod
    def of(cls, frame: pl.DataFrame) -> "_Units":
        unit = unit_numbers(frame)
        rows = frame[np.argsort(unit, kind="stable")]
        sizes = np.bincount(unit)
        return cls(rows, sizes, rows["arrival_ns"].to_numpy()[np.cumsum(sizes) - sizes])

    def at(self, starts_ns: Ints, numbers: Ints) -> pl.DataFrame:
        """The rows of units `numbers`, each from its one of `starts_ns` on."""
        sizes = self.sizes[numbers]
        which = np.repeat(np.arange(numbers.size), sizes)
        place = np.arange(which.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        index = self._firsts[numbers][which] + place
        # A unit that comes twice is two sessions: the part tells them apart.
        return self._rows[index].with_columns(
            arrival_ns=pl.Series(starts_ns[which] + self._since_ns[index]), **{PART: pl.Series(which)}
        )


def _near_blocks(starts_ns: Ints, circle_ns: int, stream: np.random.Generator) -> Ints:
    """Starts in [0, `circle_ns`): each block is one of those near it."""
    count = max(1, circle_ns // BLOCK_NS)
    edges = np.arange(count + 1) * circle_ns // count
    drawn = (np.arange(count) + stream.integers(-NEAR, NEAR + 1, count)) % count
    low, high = np.searchsorted(starts_ns, edges[drawn]), np.searchsorted(starts_ns, edges[drawn + 1])
    parts = [
        starts_ns[a:b] - edges[source] + edges[target]
        for target, (source, a, b) in enumerate(zip(drawn, low, high, strict=True))
    ]
    # Blocks differ by a nanosecond at most; what that puts over the end is put before it.
    return np.sort(np.minimum(np.concatenate(parts), circle_ns - 1))
