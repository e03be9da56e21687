"""What one load worker sends: requests in the order they are due, made ahead of their time, and what to say of them."""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from replay.prompts import completion_body, prompt_json, prompt_text
from replay.shards import NONE, Row
from replay.stream import Record
from replay.timerfd import NS_PER_S

FOREVER_NS = 2**62
COMPLETIONS, CHAT = "completions", "chat"
PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}
_AHEAD = 256  # requests made before they are due
_AHEAD_BYTES = 8 << 20  # of them, at most: prompts may be long


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told, as a line of JSON on its standard input: keys are in no file and on no command line."""

    run_dir: str
    worker: int = 0
    fast: bool = True  # plain HTTP over epoll, else aiohttp
    base_urls: list[str]  # of the instances
    model: str
    salt: int
    block_tokens: int = 0
    exact: bool = True
    name_prefix: str = ""  # of requests' ids on a server whose steps are recorded; "": the bare request_id
    api_key: str | None = None
    endpoint: str = COMPLETIONS
    stream: bool = True
    request_timeout_s: float | None = None
    save_chunks: bool = True
    think_time: bool = False
    max_concurrency: int | None = None
    max_rate_rps: float | None = None

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.run_dir)

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {"Content-Type": "application/json", **key}

    def url(self, instance: int) -> str:
        """Where requests to `instance` go."""
        return self.base_urls[instance] + PATHS[self.endpoint]

    def name(self, request_id: int) -> str:
        """What a request is called on the server."""
        return f"{self.name_prefix}-{request_id}" if self.name_prefix else str(request_id)


class Begin(msgspec.Struct, frozen=True):
    """The second line: when the trace's time 0 is, on the clock of all workers."""

    epoch_ns: int


class Job:
    """A request to send, with its body when that has been made."""

    __slots__ = ("body", "record", "row")

    def __init__(self, row: Row, due_ns: int, worker: int) -> None:
        self.row = row
        self.record = Record(row.request_id, row.instance, due_ns, row.output_tokens, worker=worker)
        self.body = b""


class Workload:
    """A worker's requests as they fall due. Without think times its memory does not grow with the trace."""

    def __init__(self, config: Config, rows: Iterable[Row]) -> None:
        self._config = config
        self._rows: Iterator[Row] = iter(rows)
        self._ready: deque[Job] = deque()  # at their arrivals, with bodies
        self._bytes = 0
        self._waiting: dict[int, list[Row]] = {}  # turns, by the turn that they wait for
        self._turns: list[tuple[int, int, Job]] = []  # a heap of turns that are due after another one's end
        self._count = 0
        self._epoch_ns = 0
        self._next: Row | None = None
        if config.think_time:  # which turns wait for which must be known before the first one ends
            everything = list(self._rows)
            self._rows = iter([row for row in everything if row.think_ns == NONE])
            for row in everything:
                if row.think_ns != NONE:
                    self._waiting.setdefault(row.parent_id, []).append(row)
        self._pull()

    def begin(self, epoch_ns: int) -> None:
        """The trace's time 0 is at `epoch_ns`."""
        self._epoch_ns = epoch_ns
        for job in self._ready:
            job.record.scheduled_ns = epoch_ns + job.row.arrival_ns

    def due_ns(self) -> int:
        """When the next request is due; `FOREVER_NS` when none is, as far as is known now."""
        due_ns = self._turns[0][0] if self._turns else FOREVER_NS
        if self._ready:
            return min(due_ns, self._ready[0].record.scheduled_ns)
        return due_ns if self._next is None else min(due_ns, self._epoch_ns + self._next.arrival_ns)

    def due_by(self, t_ns: int) -> Iterator[Job]:
        """Those of the requests made ahead that are due by `t_ns`."""
        for job in self._ready:
            if job.record.scheduled_ns > t_ns:
                return
            yield job

    def make_ahead(self) -> bool:
        """Make one request before it is due; whether there was one to make."""
        if self._next is not None and len(self._ready) < _AHEAD and self._bytes < _AHEAD_BYTES:
            row = self._next
            self._pull()
            job = self._job(row, self._epoch_ns + row.arrival_ns)
            self._bytes += len(job.body)
            self._ready.append(job)
            return True
        return False

    def pop(self) -> Job:
        """The request that is due next."""
        if not self._ready:
            self.make_ahead()
        if self._turns and (not self._ready or self._turns[0][0] <= self._ready[0].record.scheduled_ns):
            return heapq.heappop(self._turns)[2]
        job = self._ready.popleft()
        self._bytes -= len(job.body)
        return job

    def ended(self, record: Record, t_ns: int) -> None:
        """A request has ended, at `t_ns`: the turns that waited for it are due after their think times."""
        for row in self._waiting.pop(record.request_id, ()) if self._waiting else ():
            due_ns = t_ns + row.think_ns
            self._count += 1
            heapq.heappush(self._turns, (due_ns, self._count, self._job(row, due_ns)))

    def _pull(self) -> None:
        self._next = next(self._rows, None)

    def _job(self, row: Row, due_ns: int) -> Job:
        config = self._config
        job = Job(row, due_ns, config.worker)
        make = prompt_text if config.endpoint == CHAT else prompt_json
        prompt = make(config.salt, row.request_id, row.input_tokens, row.hashes, config.block_tokens)
        job.body = completion_body(
            config.model, prompt, row.output_tokens, exact=config.exact, priority=row.priority, stream=config.stream
        )
        return job


class RateLimit:
    """Lets requests go `rps` a second apart at most, whatever was due; None: as they come."""

    def __init__(self, rps: float | None) -> None:
        self._gap_ns = 0 if rps is None else round(NS_PER_S / rps)
        self.next_ns = 0  # when the next may go

    def take(self, t_ns: int) -> None:
        """One goes at `t_ns`."""
        if self._gap_ns:
            self.next_ns = max(self.next_ns, t_ns) + self._gap_ns


def plain_http(base_url: str) -> bool:
    """Whether the fast path can speak to `base_url`."""
    parts = urlsplit(base_url)
    return parts.scheme == "http" and parts.username is None and parts.hostname is not None


def through_proxies(base_url: str) -> bool:
    """Whether requests to `base_url` go through the proxies that the environment names: those with TLS do.

    A server spoken to in plain HTTP is on this host or beside it, and a proxy in between would be measured too.
    """
    return base_url.startswith("https://")
