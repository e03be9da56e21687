"""Read a ServeGen client pool; its format is told in `tracegen.importers.servegen`."""

import csv
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegen.arrivals.points import CV_RANGE, gamma_points, poisson_points, weibull_points
from tracegen.durations import NS_PER_S
from tracegen.errors import TraceError
from tracegen.importers.columns import MAX_TOKENS
from tracegen.sources import Source

SIDES = ("input_tokens", "output_tokens")
Floats = NDArray[np.float64]
Points = Callable[[float, np.random.Generator, float], Floats]
FAMILIES: dict[str, Points] = {
    "Gamma": gamma_points,
    "Weibull": weibull_points,
    "Exponential": lambda length, stream, _: poisson_points(length, stream),
}
_FILE = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)")


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: each with the probability of it or less."""

    tokens: NDArray[np.uint32]
    cumulative: Floats

    def draw(self, count: int, stream: np.random.Generator) -> NDArray[np.uint32]:
        """`count` independent lengths."""
        at = np.searchsorted(self.cumulative, stream.random(count), side="right")
        return self.tokens[np.minimum(at, len(self.tokens) - 1)]


@dataclass(frozen=True)
class Stretch:
    """A client's requests for one stretch of time: mean rate, CV and family of gaps."""

    rate_rps: float
    cv: float
    family: str


@dataclass
class Client:
    """A client: its stretches by their number from the pool's start, and its lengths by start, in seconds."""

    stretches: dict[int, Stretch] = field(default_factory=dict)
    lengths: dict[int, tuple[Lengths, Lengths]] = field(default_factory=dict)

    def lengths_at(self, start_s: float) -> tuple[Lengths, Lengths]:
        """Those of the last six hours with any that begin at `start_s` or before; else of the first."""
        before = [begin_s for begin_s in self.lengths if begin_s <= start_s]
        return self.lengths[max(before) if before else min(self.lengths)]


@dataclass
class Pool:
    """Clients by number, the length of a stretch, how many there are, and what the files hold that is not used.

    `name` is that of its folder or archive, without suffixes; `said` is what metadata quote.
    """

    clients: dict[int, Client]
    step_s: float
    steps: int
    name: str
    said: str
    sha256: str | None
    ignored: set[str] = field(default_factory=set)

    @property
    def span_ns(self) -> int:
        """From the pool's start to its end."""
        return round(self.steps * self.step_s * NS_PER_S)

    def requests(self, start_ns: int, end_ns: int, clients: Mapping[int, Client] | None = None) -> float:
        """How many requests are expected between two times, of `clients` or all."""
        return sum(
            stretch.rate_rps * _overlap_s(step, self.step_s, start_ns, end_ns)
            for client in (self.clients if clients is None else clients).values()
            for step, stretch in client.stretches.items()
        )


def _overlap_s(step: int, step_s: float, start_ns: int, end_ns: int) -> float:
    """How much of a stretch lies between two times."""
    return max(0.0, min((step + 1) * step_s, end_ns / NS_PER_S) - max(step * step_s, start_ns / NS_PER_S))


def read_pool(location: str | Path, start_ns: int = 0, end_ns: int | None = None) -> Pool:
    """The client pool at `location`, with the lengths that are needed between two times.

    Raises `TraceError` for what is no pool, and for a damaged file, with its line.
    """
    during_s = (start_ns / NS_PER_S, math.inf if end_ns is None else end_ns / NS_PER_S)
    path = Path(location)
    if not path.is_dir():
        with Source(location) as source:
            try:
                pool = _read_files(_in_archive(source), str(location), during_s)
            except tarfile.TarError as error:
                raise TraceError(f"{location}: is neither a folder nor a tar archive of a pool ({error})") from None
            pool.name, pool.said, pool.sha256 = source.name.split(".")[0], source.said, source.sha256()
        return pool
    found = sorted((file for file in path.iterdir() if _FILE.fullmatch(file.name)), key=lambda file: file.name)
    contents = [(file.name, file.read_bytes()) for file in found]
    pool = _read_files(iter(contents), str(location), during_s)
    # Of the files' names and hashes, each on a line as sha256sum prints them: one number for a folder.
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents)
    pool.name = pool.said = path.resolve().name
    pool.sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return pool


class _Reader(io.RawIOBase):
    """What `chunks` give, as a file that is read once."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _in_archive(source: Source) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a pool's files in a tar archive."""
    with tarfile.open(fileobj=io.BufferedReader(_Reader(source.chunks())), mode="r|") as archive:
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and _FILE.fullmatch(name):
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                yield name, content.read()


def _read_files(files: Iterator[tuple[str, bytes]], location: str, during_s: tuple[float, float]) -> Pool:
    """The pool in `files`; the length of a stretch is that of the first file, and all others must have it."""
    pool = Pool({}, 0.0, 0, "", "", None)
    for name, content in files:
        matched = _FILE.fullmatch(name)
        assert matched is not None  # chosen by it
        client = pool.clients.setdefault(int(matched[1]), Client())
        where = f"{location}: {name}"
        if matched[2] == "trace.csv":
            _read_rates(client, pool, content, where)
        else:
            _read_lengths(client, pool, content, where, during_s)
    if not pool.steps:
        raise TraceError(
            f"{location}: has no chunk-N-trace.csv; a ServeGen pool is a folder such as data/reason/deepseek-r1, or a "
            "tar of one"
        )
    return pool


def _read_rates(client: Client, pool: Pool, content: bytes, where: str) -> None:
    """Put a client's stretches into it."""
    rows = list(csv.reader(content.decode("utf-8", "replace").splitlines()))
    for line, row in enumerate(rows, start=1):
        if len(row) < 4:
            raise TraceError(f"{where}: line {line}: has {len(row)} columns, not time, rate, CV, family and two more")
    starts_s = [_number(row[0], where, line, "time") for line, row in enumerate(rows, start=1)]
    if not pool.step_s and len(starts_s) > 1:
        pool.step_s = starts_s[1] - starts_s[0]
    for line, (row, start_s) in enumerate(zip(rows, starts_s, strict=True), start=1):
        step, rest_s = divmod(start_s, pool.step_s) if pool.step_s > 0 else (0.0, 1.0)
        if rest_s or (line > 1 and start_s <= starts_s[line - 2]):
            raise TraceError(f"{where}: line {line}: time {row[0]} is not a later multiple of {pool.step_s:g} s")
        pool.steps = max(pool.steps, int(step) + 1)
        rate_rps, cv = (_number(text, where, line, what) for text, what in zip(row[1:3], ("rate", "CV"), strict=True))
        if not rate_rps:
            continue
        family = row[3].strip()
        if family not in FAMILIES:
            raise TraceError(f"{where}: line {line}: family '{family}' is none of {', '.join(FAMILIES)}")
        if not CV_RANGE[0] <= cv <= CV_RANGE[1]:
            raise TraceError(f"{where}: line {line}: CV {cv:g} is not within {CV_RANGE[0]:g} to {CV_RANGE[1]:g}")
        client.stretches[int(step)] = Stretch(rate_rps, cv, family)


def _number(text: str, where: str, line: int, what: str) -> float:
    """A number of zero or more, or an error that names the line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise TraceError(f"{where}: line {line}: {what} '{text[:40]}' is not a number of zero or more")
    return value


def _read_lengths(client: Client, pool: Pool, content: bytes, where: str, during_s: tuple[float, float]) -> None:
    """Put a client's distributions of lengths into it, those that `Client.lengths_at` asks for between two times.

    Stretches of time without requests have none. A pool of weeks has gigabytes of them, so the rest stays text.
    """
    try:
        document = json.loads(content)
        windows = {int(start): window for start, window in document.items()}
        ignored = {key for window in windows.values() for key, value in window.items() if value not in ("{}", {})}
    except (ValueError, AttributeError) as error:
        raise TraceError(f"{where}: is not JSON of lengths by start in seconds ({error})") from None
    pool.ignored |= ignored - set(SIDES)

    def read(start_s: int) -> bool:
        both = [_lengths(windows[start_s].get(side, "{}"), f"{where}: key {start_s}, {side}") for side in SIDES]
        if both[0] is not None and both[1] is not None:
            client.lengths[start_s] = (both[0], both[1])
        return start_s in client.lengths

    starts_s = sorted(windows)
    any(read(start_s) for start_s in reversed(starts_s) if start_s <= during_s[0])
    for start_s in starts_s:
        if during_s[0] < start_s < during_s[1]:
            read(start_s)
    if not client.lengths:
        any(read(start_s) for start_s in starts_s if start_s >= during_s[1])


def _lengths(found: Any, where: str) -> Lengths | None:
    """The distribution that a text such as `{45: 0.25, 46: 0.75}` (or a JSON object) says; null for an empty one.

    Probabilities are divided by their sum. A length of zero, which no request has, is left out.
    """
    if isinstance(found, str):
        pairs = [pair.partition(":")[::2] for pair in found.strip().strip("{}").split(",") if pair.strip()]
    else:
        pairs = list(found.items()) if isinstance(found, dict) else [(str(found), "")]
    try:
        tokens = np.array([float(length) for length, _ in pairs])
        shares = np.array([float(share) for _, share in pairs])
    except ValueError as error:
        raise TraceError(f"{where}: is not lengths with their probabilities ({error})") from None
    wrong = (tokens < 0) | (tokens > MAX_TOKENS) | (tokens != np.round(tokens)) | ~(shares >= 0) | (shares > 1)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise TraceError(f"{where}: {pairs[first][0]}: {pairs[first][1]} is no length with its probability")
    kept = (tokens > 0) & (shares > 0)
    if not kept.any():
        return None
    order = np.argsort(tokens[kept], kind="stable")
    cumulative = np.cumsum(shares[kept][order])
    return Lengths(tokens[kept][order].astype(np.uint32), cumulative / cumulative[-1])
