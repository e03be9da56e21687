"""What the rows of a run's tables add up to, batch by batch, for its verdicts: what is held does not grow with the run.

`add_up` shows sums the rows of a table, as often as they ask. How the rows are cut into batches changes no figure.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from replay import verdicts
from replay.clock import NS_PER_MS
from replay.counters import Window
from replay.rundir import RowGroup, read_group, row_groups
from replay.summary import ANSWERED
from replay.verdicts import FloatArray, IntArray, Verdict

Batches = Callable[[Sequence[str]], Iterable[pl.DataFrame]]  # the rows of a table, of the columns asked for

_DIGIT_BITS = 16  # of a number, in a pass: 65,536 counts
_MOST_TEXTS = 1000  # different words of a server that are counted at once
_JOINED_ROWS = 1 << 17  # requests that are looked up in other tables at once: some 10 MiB
_FAILED = ("http_error", "connect_error", "stream_error")


class Sum(Protocol):
    """What the rows of a table add up to, in one pass over them or in several."""

    @property
    def columns(self) -> Sequence[str]:
        """Which it looks at."""

    def add(self, rows: pl.DataFrame) -> None:
        """Take more rows, with `columns` at least."""

    def again(self) -> bool:
        """All rows were there: whether they are wanted once more."""


def add_up(sums: Sequence[Sum], batches: Batches) -> None:
    """Show the rows to all `sums`, and again to those that want them again."""
    while sums:
        for rows in batches(list(dict.fromkeys(name for each in sums for name in each.columns))):
            for each in sums:
                each.add(rows)
        sums = [each for each in sums if each.again()]


class Errors:
    """How requests ended, and what was said of why."""

    columns = ("status", "http_status", "error")

    def __init__(self) -> None:
        self._statuses: Counter[str] = Counter()
        self._said: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of requests.parquet. Of very many different words those said least are forgotten."""
        self._statuses.update(dict(rows.group_by("status", maintain_order=True).len().iter_rows()))
        code = pl.when(pl.col("http_status") != 200).then(pl.col("http_status").cast(pl.String))
        words = pl.concat_str(code, "error", separator=" ", ignore_nulls=True).str.head(verdicts.MOST_WORDS + 1)
        bad = rows.filter(pl.col("status") != "ok").group_by("status", words.alias("said"), maintain_order=True).len()
        for status, said, count in bad.filter(pl.col("said") != "").iter_rows():
            self._said[status][said] += count
        for status, texts in self._said.items():
            if len(texts) > _MOST_TEXTS:
                self._said[status] = Counter(dict(texts.most_common(_MOST_TEXTS // 2)))

    def again(self) -> bool:
        """One pass tells."""
        return False

    def verdict(self, planned: int) -> Verdict:
        """`error_rate` of as many requests as were `planned`."""
        bad = Counter({status: count for status, count in self._statuses.items() if status != "ok"})
        others = [self._of_status(status, count) for status, count in bad.most_common()]
        unsent = planned - self._statuses.total()
        return verdicts.errors(self._statuses["ok"], planned, others + [f"{unsent:,} not sent"] * (unsent > 0))

    def _of_status(self, status: str, count: int) -> str:
        """How many requests ended with one status, and what was said most often of why."""
        if not self._said[status]:
            return f"{count:,} {status}"
        ((said, _),) = self._said[status].most_common(1)
        short = said if len(said) <= verdicts.MOST_WORDS else f"{said[: verdicts.MOST_WORDS]}..."
        return f"{count:,} {status} ({short})"


class Quantiles:
    """Exact quantiles of whole numbers, digit by digit: each pass counts those that share the digits found so far.

    As with `numpy.quantile`, a quantile between two numbers lies between them.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        """`shares`: which quantiles."""
        self._shares, self.count, self.least, self.greatest = shares, 0, 0, 0
        self._shift: int | None = None  # of the digit that is looked for; None: in the first pass
        # By rank: its upper digits, and its rank among those that have them.
        self._found: dict[int, tuple[int, int]] = {}
        self._counts: dict[int, IntArray] = {}  # by upper digits, of their next one

    def add(self, numbers: IntArray) -> None:
        """More numbers."""
        if self._shift is None:
            if numbers.size:
                low, high = int(numbers.min()), int(numbers.max())
                self.least, self.greatest = (
                    (min(self.least, low), max(self.greatest, high)) if self.count else (low, high)
                )
            self.count += numbers.size
            return
        digits = (numbers - self.least) >> self._shift
        upper, digit = digits >> _DIGIT_BITS, digits & ((1 << _DIGIT_BITS) - 1)
        for known in self._counts:
            self._counts[known] += np.bincount(digit[upper == known], minlength=1 << _DIGIT_BITS)

    def again(self) -> bool:
        """A pass has ended: whether there are digits left to find."""
        if self._shift is None:
            places = [share * (self.count - 1) for share in self._shares] if self.count else []
            self._found = {rank: (0, rank) for place in places for rank in (math.floor(place), math.ceil(place))}
            self._shift = -(-(self.greatest - self.least).bit_length() // _DIGIT_BITS) * _DIGIT_BITS
        else:
            for rank, (upper, among) in self._found.items():
                upto = np.cumsum(self._counts[upper])
                digit = int(np.searchsorted(upto, among, "right"))
                below = int(upto[digit - 1]) if digit else 0
                self._found[rank] = (upper << _DIGIT_BITS) + digit, among - below
        self._shift -= _DIGIT_BITS
        self._counts = {upper: np.zeros(1 << _DIGIT_BITS, np.int64) for upper, _ in self._found.values()}
        return self._shift >= 0 and bool(self._found)

    def values(self) -> list[float]:
        """The quantiles; of nothing there are none."""
        if not self.count:
            return []
        places = [share * (self.count - 1) for share in self._shares]
        ends = [[self.least + self._found[rank][0] for rank in (math.floor(p), math.ceil(p))] for p in places]
        return [low + (high - low) * (p - math.floor(p)) for p, (low, high) in zip(places, ends, strict=True)]


class Lag:
    """How late requests left."""

    columns = ("scheduled_ns", "sent_ns")

    def __init__(self) -> None:
        self._lag_ns = Quantiles((0.5, 0.99))

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of requests.parquet."""
        self._lag_ns.add((rows["sent_ns"] - rows["scheduled_ns"]).drop_nulls().to_numpy())

    def again(self) -> bool:
        """Until the quantiles are found."""
        return self._lag_ns.again()

    def verdict(self) -> Verdict:
        """`dispatch_lag`."""
        if not self._lag_ns.count:
            return verdicts.lag(None)
        p50, p99 = self._lag_ns.values()
        return verdicts.lag((p50 / NS_PER_MS, p99 / NS_PER_MS, self._lag_ns.greatest / NS_PER_MS))


class Waiting:
    """How many requests wait for their first token at each moment of a grid."""

    def __init__(self, at_ns: FloatArray) -> None:
        """`at_ns`: the grid, in order."""
        self.at_ns = at_ns
        self.count: IntArray = np.zeros(at_ns.size, np.int64)

    def add(self, sent_ns: IntArray, begun_ns: IntArray) -> None:
        """Requests that were sent and answers that have begun, in any order."""
        for times_ns, sign in ((sent_ns, 1), (begun_ns, -1)):
            self.count += sign * np.searchsorted(np.sort(times_ns), self.at_ns, "right")

    def stop(self, last_ns: int) -> None:
        """Take it that nothing is sent after `last_ns`."""
        before = self.at_ns <= last_ns
        self.at_ns, self.count = self.at_ns[before], self.count[before]


class Backlog:
    """Who waits for a first token, from the first send to the last; or whom a cap held back."""

    columns = ("scheduled_ns", "sent_ns", "first_token_ns", "done_ns", "status")

    def __init__(self, window: Window | None = None, *, capped: bool = False) -> None:
        """`window`: only requests that were sent in it; None: all."""
        self._window, self._capped = window, capped
        self._held, self._latest_ns = 0, -1
        self._rows = self._untimed = self._sent = 0
        self._first_ns, self._last_ns = 2**63 - 1, -(2**63)
        self._waiting: Waiting | None = None  # in the second pass

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of requests.parquet."""
        if self._window is not None:
            rows = rows.filter(pl.col("sent_ns").is_between(*self._window))
        if self._capped:
            if self._waiting is None:
                self._latest_ns = max(self._latest_ns, rows["scheduled_ns"].drop_nulls().to_numpy().max(initial=-1))
            else:
                late = pl.col("sent_ns").is_null() | (pl.col("sent_ns") > self._latest_ns)
                self._held += rows.filter(late).height
            return
        # A request that failed before its first token waits no longer, nor does one that was answered without a token.
        none = pl.col("first_token_ns").is_null()
        rows = rows.filter(~(none & pl.col("status").is_in(_FAILED)))
        answered = none & pl.col("status").is_in(ANSWERED)
        sent_ns = rows["sent_ns"].drop_nulls().to_numpy()
        if self._waiting is None:
            self._rows += rows.height
            self._untimed += rows.filter(answered).height
            self._sent += sent_ns.size
            self._first_ns = int(sent_ns.min(initial=self._first_ns))
            self._last_ns = int(sent_ns.max(initial=self._last_ns))
            return
        begun = rows.select(pl.when(answered).then("done_ns").otherwise("first_token_ns")).to_series()
        self._waiting.add(sent_ns, begun.drop_nulls().to_numpy())

    def again(self) -> bool:
        """Twice: when the grid is to be laid is known after the first time."""
        if self._waiting is not None:
            return False
        grid = verdicts.backlog_grid_ns(self._first_ns, self._last_ns) if self._sent else np.zeros(1)
        self._waiting = Waiting(grid)
        return True

    def verdict(self) -> Verdict:
        """`saturated`."""
        assert self._waiting is not None
        if self._capped:
            return verdicts.held_back(self._held)
        if self._rows and self._untimed == self._rows:
            return verdicts.untimed()
        return verdicts.saturation(self._sent, self._waiting.at_ns, self._waiting.count)


class Steps:
    """The steps on record, by instance."""

    columns = ("instance", "step")

    def __init__(self) -> None:
        self.count = 0
        self._ends: dict[int, Window] = {}

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of steps.parquet."""
        ends = rows.group_by("instance").agg(low=pl.col("step").min(), high=pl.col("step").max())
        for instance, low, high in ends.iter_rows():
            least, greatest = self._ends.get(instance, (low, high))
            self._ends[instance] = min(least, low), max(greatest, high)
        self.count += rows.height

    def again(self) -> bool:
        """One pass tells."""
        return False

    @property
    def missing(self) -> int:
        """How many between the first and the last are not there."""
        return sum(high - low + 1 for low, high in self._ends.values()) - self.count


class Tokens:
    """Each request's tokens: as the trace asks for them, as the server counted them, as the engine's steps had them."""

    columns = (
        "request_id", "input_tokens", "output_tokens", "output_tokens_wanted", "cached_tokens", "status"
    )  # fmt: skip

    def __init__(self, trace: "Lookup", segments: "Lookup | None") -> None:
        """`trace` and `segments`: the tables that are looked into; `segments` None: no steps are on record."""
        self._trace, self._segments = trace, segments
        self._held: list[pl.DataFrame] = []
        self.counted = self.compared = self.wrong = self.ok = self.short = 0

    def add(self, rows: pl.DataFrame) -> None:
        """Rows of requests.parquet."""
        rows = rows.select(self.columns).filter(pl.col("status").is_in(ANSWERED))
        self._held.append(rows.with_columns(ok=pl.col("status") == "ok").drop("status"))
        if sum(frame.height for frame in self._held) >= _JOINED_ROWS:
            self._join()

    def again(self) -> bool:
        """One pass tells."""
        self._join()
        return False

    def _join(self) -> None:
        """Look up the requests that are held, and let go of them."""
        rows, self._held = pl.concat(self._held) if self._held else pl.DataFrame(), []
        if rows.is_empty():
            return
        ids, place = np.unique(rows["request_id"].to_numpy(), return_inverse=True)
        wanted = np.full(ids.size, -1, np.int64)
        for found in self._trace.about(ids):
            wanted[np.searchsorted(ids, found["request_id"].to_numpy())] = found["input_tokens"].to_numpy()
        rows = rows.with_columns(pl.Series("asked", wanted[place]))
        compared = rows.filter(pl.col("output_tokens").is_not_null(), pl.col("asked") >= 0)
        exact = pl.col("output_tokens") == pl.col("output_tokens_wanted"), pl.col("input_tokens") == pl.col("asked")
        self.counted += rows["output_tokens"].count()
        self.compared += compared.height
        self.wrong += compared.filter(~exact[0] | ~exact[1]).height
        if self._segments is None:
            return
        tokens = np.zeros(ids.size, np.int64)
        for found in self._segments.about(ids):
            steps = (pl.col("last_step") - pl.col("first_step") + 1).cast(pl.Int64)
            mine = found.select("request_id", steps * pl.col("tokens_per_step"))
            np.add.at(tokens, np.searchsorted(ids, mine["request_id"].to_numpy()), mine["last_step"].to_numpy())
        # A request's last output token is never scheduled: prompt + outputs - 1 tokens pass through the engine,
        # less what the prefix cache held, and more if a preemption made it compute again.
        cached = pl.col("cached_tokens").fill_null(0)
        need = pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens") - 1 - cached
        known = rows.with_columns(pl.Series("tokens", tokens[place])).filter("ok", pl.col("input_tokens").is_not_null())
        self.ok += known.height
        self.short += known.filter(pl.col("tokens") < need).height

    def lengths(self) -> Verdict:
        """`lengths_exact`."""
        return verdicts.lengths(self.wrong, self.compared) if self.counted else verdicts.no_usage()


class Lookup:
    """A table in which some requests are looked up, reading only the row groups that can have them."""

    def __init__(self, run_dir: Path, table: str, columns: Sequence[str]) -> None:
        """`columns`: what is wanted, `request_id` among them."""
        self._table, self._columns = table, columns
        self._groups: list[RowGroup] = row_groups(run_dir, table, "request_id")

    def about(self, ids: Any) -> Iterator[pl.DataFrame]:
        """The rows of these requests, some at a time; `ids` are in order."""
        wanted = pl.Series(ids).implode()
        for group in self._groups:
            if group.low is None or group.high is None or (group.low <= ids[-1] and group.high >= ids[0]):
                yield read_group(group, self._table, self._columns).filter(pl.col("request_id").is_in(wanted))
