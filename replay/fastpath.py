"""The fast path of a load worker: plain HTTP/1.1, one epoll loop, nothing between two requests but this code.

Requests are made and connections opened while there is time; a request leaves by one `send` when its timerfd says so,
and the answers' bytes carry the kernel's own time of arrival.
"""

import os
import select
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from replay.connections import Connection, Pool, Server
from replay.http1 import HttpError
from replay.reqlog import RequestLog
from replay.shards import read_rows
from replay.stamps import ANCILLARY_BYTES, ArrivalClock
from replay.stream import LongLineError, Record, network_error, shorten, take_whole
from replay.tally import Tally
from replay.timerfd import NS_PER_MS, NS_PER_S, TimerFd, now_ns
from replay.workload import FOREVER_NS, Config, Job, RateLimit, Workload

_READ_BYTES = 1 << 14
_EVENTS = 256  # read before what is late is sent
_SENT_AT_ONCE = 32
_LATE_NS = 5 * NS_PER_MS  # what is later than that finds a client that cannot keep up: then answers are read first
_THICK_NS = 2 * NS_PER_MS  # packets that come closer together than that come thick
_EARLY_NS = 50_000  # a sleeper wakes so late; the rest is waited for awake
_DOZE_S = 0.001  # what epoll's clock can do least
_HOUSE_NS = 250 * NS_PER_MS  # between two messages; the log is written as often
_TIMEOUTS_NS = 10 * NS_PER_MS  # requests that time out are looked for not more often
_SPARE_NS = 300_000  # before a request is due, nothing is made ahead: it could take as long
_OPEN_AHEAD_NS = NS_PER_S // 4
_OLDEST_NS = 10 * NS_PER_S  # an arrival longer ago than that is none: somebody stepped the wall clock
_BODY_LIMIT = 1 << 26  # bytes of an answer that is no stream


class FastPath:
    """Sends a worker's requests and reads their answers, until all have ended or it is told to stop."""

    def __init__(
        self,
        config: Config,
        tell: Callable[[Mapping[str, Any]], None],
        *,
        stop_fd: int = 0,
        clock: ArrivalClock | None = None,
    ) -> None:
        """Find the servers, open the first connections and make the first requests.

        `stop_fd`: whose end ends the sending. Raises `OSError` when a server's host has no address.
        """
        self._config, self._tell, self._stop_fd = config, tell, stop_fd
        self.tally = Tally()
        self.clock = clock or ArrivalClock()
        self._log = RequestLog(config.path, config.worker, save_chunks=config.save_chunks)
        self._work = Workload(config, read_rows(config.path, config.worker))
        self._epoll = select.epoll()
        self._timer = TimerFd()
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        self._alarm = select.epoll()  # of the timer alone
        self._alarm.register(self._timer.fd, select.EPOLLIN)
        urls = [config.url(instance) for instance in range(len(config.base_urls))]
        self._pool = Pool(urls, config.headers, self._epoll)
        self._held: deque[Job] = deque()  # due, but a cap holds them back
        self._rate = RateLimit(config.max_rate_rps)
        self._timeout_ns = None if config.request_timeout_s is None else round(config.request_timeout_s * NS_PER_S)
        self._deadlines: OrderedDict[Job, tuple[int, Connection]] = OrderedDict()
        self._in_flight: dict[Job, Connection] = {}
        # Where an answer's end is what the next request waits for, it is read at once.
        self._patient = config.max_concurrency is None and not config.think_time
        self._served_ns = 0
        self._next_ns = self._house_ns = FOREVER_NS
        self._stopped = False
        self._sound = True  # whether the kernel's stamps can be used
        self._more = True  # whether something may be left to make ahead
        while self._work.make_ahead():
            pass
        self._pool.look_ahead(self._work.due_by(_OPEN_AHEAD_NS))
        while self._pool.open_ahead():
            pass

    def run(self, epoch_ns: int) -> None:
        """Send from `epoch_ns` on; afterwards every request that was due has its record in the log.

        Raises `OSError` when the log cannot be written.
        """
        self._work.begin(epoch_ns)
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._house_ns = now_ns() + _HOUSE_NS
        self._arm()
        t_ns = now_ns()
        while not self._stopped and not self._finished():
            while self._next_ns - _EARLY_NS <= t_ns < self._next_ns:
                t_ns = now_ns()
            if t_ns >= self._next_ns:
                self._send_due(t_ns)
            if t_ns >= self._house_ns:
                self._keep_house(t_ns)
            self._busy_since(t_ns)
            more = self._more and self._prepare(t_ns)
            ready = self._epoll.poll(0.0 if more else max(0.0, (self._house_ns - t_ns) / NS_PER_S), _EVENTS)
            t_ns = now_ns()
            if ready:
                self._serve(ready, t_ns)
                self._doze(t_ns)
                t_ns = now_ns()
        self._end()
        self.close()

    def _serve(self, ready: list[tuple[int, int]], t_ns: int) -> None:
        """Read what has come, and send what falls due meanwhile."""
        begun_ns, connections = t_ns, self._pool.connections
        self._sound = self.clock.sound(t_ns)
        for fd, event in ready:
            connection = connections.get(fd)
            if connection is not None:
                if event == select.EPOLLIN:
                    t_ns = self._read(connection)
                else:
                    self._on_event(connection, event)
            elif fd == self._stop_fd:
                self._stopped = not os.read(fd, 4096)
            if 0 <= t_ns - self._next_ns < _LATE_NS:
                self._send_due(now_ns())
        self._busy_since(begun_ns)

    def _doze(self, served_ns: int) -> None:
        """Let some packets gather where they come thick: the kernel has stamped them, so that they can wait.

        One wake-up then serves many. A request that falls due ends it.
        """
        thick = served_ns - self._served_ns < _THICK_NS
        self._served_ns = served_ns
        if thick and self._patient and self.tally.unstamped == 0:
            self._alarm.poll(_DOZE_S)

    def _busy_since(self, t_ns: int) -> None:
        self.tally.stall_ns = max(self.tally.stall_ns, now_ns() - t_ns)

    def last_message(self) -> dict[str, Any]:
        """What there is to say at the end."""
        return self.tally.last_message(steps=self.clock.steps, stamp_error_ns=self.clock.error_ns)

    def _finished(self) -> bool:
        return self._next_ns == FOREVER_NS and not self._in_flight and not self._held

    def _end(self) -> None:
        """Write what is left: requests that have no end are `aborted`, which is what their records say already."""
        for job in self._in_flight:
            self.tally.end(job.record)
            self._log.add(job.record)
        for job in self._held:
            self._log.add(job.record)
        self.tally.unsent = len(self._held)
        self._log.write()
        self._log.close()

    def close(self) -> None:
        """Close every connection and timer."""
        for connection in list(self._pool.connections.values()):
            self._pool.close(connection)
        self._timer.close()
        self._alarm.close()
        self._epoll.close()

    def _arm(self) -> None:
        """Wake when the next request may leave."""
        next_ns = self._work.due_ns()
        if self._held and self._room():
            next_ns = min(next_ns, self._rate.next_ns)
        self._next_ns = next_ns
        self._timer.arm(next_ns - _EARLY_NS)

    def _room(self) -> bool:
        """Whether the cap on requests in flight lets another one go."""
        return self._config.max_concurrency is None or len(self._in_flight) < self._config.max_concurrency

    def _send_due(self, t_ns: int) -> None:
        """Send what is due, but not more at once than some: a client that cannot keep up must read, or it drowns."""
        most = _SENT_AT_ONCE
        capped = self._config.max_concurrency is not None or self._config.max_rate_rps is not None
        while most > 0 and self._work.due_ns() <= t_ns:
            most -= 1
            job = self._work.pop()
            self.tally.due += 1
            if capped:
                self._held.append(job)
            else:
                self._send(job)
        while self._held and self._room() and self._rate.next_ns <= t_ns:
            self._rate.take(t_ns)
            self._send(self._held.popleft())
        self._more = True
        self._arm()

    def _send(self, job: Job) -> None:
        record = job.record
        if record.instance < 0:
            record.instance = min(range(len(self._pool.servers)), key=lambda i: self._pool.servers[i].in_flight)
        server = self._pool.servers[record.instance]
        server.in_flight += 1
        connection = server.take()
        self._put(job, connection, server)
        self.tally.send(record)

    def _put(self, job: Job, connection: Connection | None, server: Server) -> None:
        """Send `job` on `connection`, or on a new one."""
        job.record.sent_ns = now_ns()
        if connection is None:
            try:
                connection = self._pool.open(server)
            except OSError as error:
                self._conclude(job, "connect_error", network_error(error, answered=server.answered))
                return
            connection.opened_for = job
        connection.ask(job, server.request(self._config.name(job.record.request_id), job.body))
        self._in_flight[job] = connection
        if self._timeout_ns is not None:
            self._deadlines.setdefault(job, (job.record.sent_ns + self._timeout_ns, connection))
            self._deadlines[job] = (self._deadlines[job][0], connection)
        if connection.ready:
            self._write(connection)
        else:  # it leaves as soon as the connection stands
            self._served_ns = 0

    def _write(self, connection: Connection) -> None:
        """Hand the kernel what it takes of the request."""
        pending, job = connection.pending, connection.job
        if pending is None or job is None:
            return
        begun_ns = now_ns()
        try:
            count = connection.sock.send(pending)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self._lose(connection, network_error(error, answered=connection.server.answered))
            return
        if job.body and len(pending) > len(job.body):  # its beginning: now it leaves
            job.record.sent_ns = begun_ns
            self.tally.sending.add(now_ns() - begun_ns)
        whole = count == len(pending)
        connection.pending = None if whole else pending[count:]
        if not whole:
            self._epoll.modify(connection.fd, select.EPOLLIN | select.EPOLLOUT)

    def _on_event(self, connection: Connection, event: int) -> None:
        """Something else than bytes to read alone."""
        if event & select.EPOLLOUT:
            if not connection.ready and not event & (select.EPOLLERR | select.EPOLLHUP):
                connection.ready = True
            if connection.ready:
                self._epoll.modify(connection.fd, select.EPOLLIN)
                self._write(connection)
        if event & ~select.EPOLLOUT and connection.fd in self._pool.connections:
            self._read(connection)

    def _read(self, connection: Connection) -> int:
        """Read what `connection` has; when that was."""
        try:
            data, ancillary, _, _ = connection.receive(_READ_BYTES, ANCILLARY_BYTES)
        except BlockingIOError:
            return now_ns()
        except OSError as error:
            self._lose(connection, network_error(error, answered=connection.server.answered))
            return now_ns()
        read_ns = at_ns = now_ns()
        if self._sound:
            arrival_ns = self.clock.arrival_ns(ancillary)
            if arrival_ns is not None and read_ns - _OLDEST_NS < arrival_ns <= read_ns:
                at_ns = arrival_ns
        if connection.job is None:  # nothing was asked: the server closes it, or is mad
            self._pool.close(connection)
        elif data:
            self._take(connection, connection.job.record, data, at_ns, read_ns)
        else:
            self._at_end(connection, at_ns)
        return read_ns

    def _take(self, connection: Connection, record: Record, data: bytes, at_ns: int, read_ns: int) -> None:
        """Take `data`, which came at `at_ns` and was read at `read_ns`."""
        response = connection.response
        try:
            body = response.feed(data)
        except HttpError as error:
            self._give_up(connection, "http_error" if record.headers_ns is None else "stream_error", str(error), at_ns)
            return
        if record.headers_ns is None and response.status is not None:
            record.headers_ns, record.http_status = at_ns, response.status
            connection.server.answered = True
            connection.sent_whole()
        if not body:
            pass
        elif record.http_status == 200 and self._config.stream:
            waits, before = record.first_token_ns is None, record.output_tokens
            try:
                connection.events.feed(body, at_ns)
            except LongLineError as error:
                self._give_up(connection, "stream_error", str(error), at_ns)
                return
            if record.output_tokens is not before:
                self.tally.tokens += (record.output_tokens or 0) - (before or 0)
            if waits and record.first_token_ns is not None:
                self.tally.first_token(record)
                self.tally.reading.add(read_ns - at_ns)
                self.tally.unstamped += at_ns == read_ns
                self.tally.shared += len(record.chunk_ns) > 1
        elif sum(map(len, connection.body)) < _BODY_LIMIT:
            connection.body.append(body)
        if response.done:
            self._complete(connection, at_ns)

    def _at_end(self, connection: Connection, at_ns: int) -> None:
        """The server closed the connection."""
        missing = connection.response.end()
        if missing is None:
            self._complete(connection, at_ns)
        else:
            self._lose(connection, f"the server closed the connection {missing}", at_ns)

    def _complete(self, connection: Connection, at_ns: int) -> None:
        """The answer has come to its end."""
        job = connection.job
        assert job is not None
        record = job.record
        if record.http_status != 200:
            self._settle(job, "http_error", shorten(b"".join(connection.body)), at_ns)
        elif not self._config.stream:
            take_whole(record, b"".join(connection.body), at_ns)
            self.tally.tokens += record.output_tokens or 0
            self._settle(job, record.status, record.error, at_ns)
        else:
            connection.events.judge()
            self._settle(job, record.status, record.error, at_ns)
        if connection.response.keep_alive and connection.pending is None:
            self._pool.servers[record.instance].keep(connection)
        else:
            self._pool.close(connection)

    def _lose(self, connection: Connection, why: str, at_ns: int | None = None) -> None:
        """The connection broke. A request that an idle one broke under is sent once more, on a new one."""
        job = connection.job
        if job is not None and connection.opened_for is not job and not connection.response.begun:
            self._pool.close(connection)
            self._put(job, None, self._pool.servers[job.record.instance])
        else:
            self._fail(connection, why, at_ns)

    def _fail(self, connection: Connection, why: str, at_ns: int | None = None) -> None:
        """The connection broke for good."""
        begun = connection.job is not None and connection.job.record.headers_ns is not None
        self._give_up(connection, "stream_error" if begun else "connect_error", why, at_ns)

    def _give_up(self, connection: Connection, status: str, why: str, at_ns: int | None) -> None:
        """Close the connection, and end the request on it."""
        self._pool.close(connection)
        if (job := connection.job) is not None:
            self._conclude(job, status, why, at_ns)

    def _conclude(self, job: Job, status: str, why: str, at_ns: int | None = None) -> None:
        self._settle(job, status, why, now_ns() if at_ns is None else at_ns)

    def _settle(self, job: Job, status: str, error: str | None, at_ns: int) -> None:
        """The request has ended: its record goes to the log."""
        record = job.record
        record.status, record.error, record.done_ns = status, error, at_ns
        self._pool.servers[record.instance].in_flight -= 1
        self._in_flight.pop(job, None)
        if self._timeout_ns is not None:
            self._deadlines.pop(job, None)
        self.tally.end(record)
        self._log.add(record)
        if self._config.think_time or self._held:
            self._work.ended(record, at_ns)
            self._arm()

    def _prepare(self, t_ns: int) -> bool:
        """Make a request or open a connection ahead, if there is time; whether there may be more to do."""
        if self._next_ns - t_ns <= _SPARE_NS:
            return False
        self._more = self._work.make_ahead() or self._pool.open_ahead()
        return self._more

    def _keep_house(self, t_ns: int) -> None:
        """What is done a few times a second."""
        self._house_ns = t_ns + _HOUSE_NS
        self._log.write()
        self._tell(self.tally.message(job.record for job in self._in_flight))
        self._pool.close_stale(t_ns)
        self._pool.look_ahead(self._work.due_by(t_ns + _OPEN_AHEAD_NS))
        self._more = True
        while self._deadlines:
            job, (deadline_ns, connection) = next(iter(self._deadlines.items()))
            if deadline_ns > t_ns:
                self._house_ns = min(self._house_ns, max(deadline_ns, t_ns + _TIMEOUTS_NS))
                break
            self._pool.close(connection)
            self._conclude(job, "timeout", f"no end within {self._config.request_timeout_s} s")
