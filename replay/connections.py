"""Connections to one server: kept alive, opened before they are needed, and given up before the server does."""

import contextlib
import select
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from replay.http1 import Response
from replay.stamps import ask_for_stamps
from replay.stream import EventStream
from replay.timerfd import NS_PER_S, now_ns
from replay.workload import Job

# uvicorn, which serves vLLM, closes connections that were idle for 5 s: a request sent into that moment would fail for
# no fault of the server.
_KEEP_NS = 4 * NS_PER_S
_SPARE = 64  # idle connections opened ahead for one server, at most
_CONNECT_S = 5.0  # to find out which of a name's addresses answers


class Connection:
    """One connection and the request on it."""

    __slots__ = (
        "body", "events", "fd", "idle_ns", "job", "opened_for", "pending", "ready", "receive", "response", "server",
        "sock",
    )  # fmt: skip

    job: Job | None  # None: idle
    response: Response  # these three of the request that it had last
    events: EventStream
    body: list[bytes]  # of an answer that is no stream

    def __init__(self, sock: socket.socket, server: "Server", *, ready: bool) -> None:
        self.server = server
        self.sock, self.fd, self.receive = sock, sock.fileno(), sock.recvmsg
        self.ready = ready  # connected
        self.idle_ns = now_ns()
        self.opened_for: Job | None = None  # the request that it was opened for; others get a second try
        self.job = None
        self.pending: memoryview | None = None  # of the request, not yet taken by the kernel

    def ask(self, job: Job, request: bytes) -> None:
        """Take `job`, whose request is to be sent."""
        self.job, self.pending = job, memoryview(request)
        self.response, self.events, self.body = Response(), EventStream(job.record), []

    def sent_whole(self) -> None:
        """An answer has begun: the request will not be sent again."""
        if self.job is not None:
            self.job.body = b""


class Server:
    """One instance's address, its idle connections and what goes in front of each request."""

    def __init__(self, url: str, headers: dict[str, str], epoll: select.epoll) -> None:
        """`url`: where requests are posted. Raises `OSError` when its host has no address."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.in_flight = 0
        self.answered = False  # whether anything has come from it
        self._epoll = epoll
        self._idle: list[Connection] = []  # the longest idle first
        self._stamps = True
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        self._family, self._address = _that_answers([(entry[0], entry[4]) for entry in found])
        lines = [f"POST {parts.path or '/'} HTTP/1.1", f"Host: {parts.netloc}", "Accept: */*"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._head = "".join(f"{line}\r\n" for line in lines).encode() + b"X-Request-Id: "

    def request(self, name: str, body: bytes) -> bytes:
        """The bytes of a request called `name`."""
        return b"%b%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, name.encode(), len(body), body)

    @property
    def idle(self) -> int:
        """How many connections wait for a request."""
        return len(self._idle)

    def open(self) -> Connection:
        """A new connection, perhaps still on its way. Raises `OSError` when it cannot be opened."""
        sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stamps = self._stamps and ask_for_stamps(sock)
            ready = True
            try:
                sock.connect(self._address)
            except BlockingIOError:  # it is on its way
                ready = False
            self._epoll.register(sock, select.EPOLLIN | (0 if ready else select.EPOLLOUT))
        except BaseException:
            sock.close()
            raise
        return Connection(sock, self, ready=ready)

    def take(self) -> Connection | None:
        """An idle connection, the one used last of those that stand already; None where there is none."""
        for place in range(len(self._idle) - 1, -1, -1):
            if self._idle[place].ready:
                return self._idle.pop(place)
        return self._idle.pop() if self._idle else None

    def keep(self, connection: Connection) -> None:
        """Keep `connection` for the next request."""
        connection.job = connection.opened_for = None
        connection.idle_ns = now_ns()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """`connection` has been closed."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def stale(self, t_ns: int) -> list[Connection]:
        """Idle connections that the server may be about to close; they are kept no more."""
        old = 0
        while old < len(self._idle) and self._idle[old].idle_ns < t_ns - _KEEP_NS:
            old += 1
        gone, self._idle = self._idle[:old], self._idle[old:]
        return gone


class Pool:
    """The connections to all instances."""

    def __init__(self, urls: Sequence[str], headers: dict[str, str], epoll: select.epoll) -> None:
        """`urls`: one of each instance. Raises `OSError` when one's host has no address."""
        self.servers = [Server(url, headers, epoll) for url in urls]
        self.connections: dict[int, Connection] = {}  # by file descriptor
        self._wanted = [0] * len(urls)  # idle ones, for requests that are due soon

    def open(self, server: Server) -> Connection:
        """A new connection. Raises `OSError` when it cannot be opened."""
        connection = server.open()
        self.connections[connection.fd] = connection
        return connection

    def close(self, connection: Connection) -> None:
        """Close `connection`, if that has not been done."""
        if self.connections.pop(connection.fd, None) is not None:
            for server in self.servers:
                server.forget(connection)
            connection.sock.close()  # epoll forgets it too

    def look_ahead(self, jobs: Iterable[Job]) -> None:
        """Take note of the requests that are due soon."""
        wanted = [0] * len(self.servers)
        for job in jobs:
            for instance in range(len(wanted)) if job.row.instance < 0 else (job.row.instance,):
                wanted[instance] += 1
        self._wanted = [min(count, _SPARE) for count in wanted]

    def open_ahead(self) -> bool:
        """Open a connection that requests soon will need; whether there was one to open."""
        for instance, server in enumerate(self.servers):
            if server.idle < self._wanted[instance]:
                try:
                    server.keep(self.open(server))
                except OSError:  # the request that needs it will say so
                    self._wanted[instance] = 0
                    return False
                return True
        return False

    def close_stale(self, t_ns: int) -> None:
        """Close what has been idle for long."""
        for server in self.servers:
            for connection in server.stale(t_ns):
                self.close(connection)


def _that_answers(found: list[tuple[int, tuple[object, ...]]]) -> tuple[int, tuple[object, ...]]:
    """The first of a name's addresses that answers; the first of all where none does."""
    for family, address in found[:-1] if len(found) > 1 else ():
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(_CONNECT_S)
            sock.connect(address)
            return family, address
    return found[-1] if len(found) > 1 else found[0]
