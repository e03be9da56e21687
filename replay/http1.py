"""One HTTP/1.1 response as it comes, cut anywhere."""

from typing import Literal

_HEAD_LIMIT = 1 << 16  # bytes; a longer head is no answer
_LINE_LIMIT = 1 << 12  # of a chunk's size and its extensions
_Place = Literal["head", "size", "chunk", "trailer", "length", "close"]


_SHOWN_BYTES = 40  # of what came instead of HTTP: a protocol says who it is in its first words


class HttpError(Exception):
    """Bytes that are no HTTP/1.1 response."""


def not_http(data: bytes) -> str:
    """What to say of an answer that begins with `data` and is no HTTP."""
    first = data.splitlines()[0] if data.strip() else data
    return f"not HTTP: {first[:_SHOWN_BYTES]!r}"


class Response:
    """Takes a response's bytes and gives its body's."""

    __slots__ = ("_left", "_place", "_rest", "done", "keep_alive", "status")

    def __init__(self) -> None:
        self.status: int | None = None  # None until the head has come
        self.done = False
        self.keep_alive = True  # whether the connection may be used again after this
        self._place: _Place = "head"
        self._left = 0  # bytes of the chunk with the line end behind it, or of the body
        self._rest = b""

    @property
    def begun(self) -> bool:
        """Whether anything has come."""
        return self.status is not None or bool(self._rest)

    def feed(self, data: bytes) -> bytes:
        """Take `data`; the bytes of the body that it brings. Raises `HttpError` for what is no response."""
        if self._place == "size" and not self._rest:
            # One whole chunk is what servers send at a time.
            end = data.find(b"\r\n", 1, 8)
            try:
                if int(data[:end], 16) == len(data) - end - 4 > 0 and data.endswith(b"\r\n"):
                    return data[end + 2 : -2]
            except ValueError:  # what it is the long way says
                pass
        if self._rest:
            data, self._rest = self._rest + data, b""
        body: list[bytes] = []
        while data and not self.done:
            data = self._step(data, body)
        if data:  # more than was asked for
            self.keep_alive = False
        return body[0] if len(body) == 1 else b"".join(body)

    def end(self) -> str | None:
        """The connection has ended: what is missing of the response, None when it is whole."""
        if self._place == "close":
            self.done = True
        self.keep_alive = False
        if self.done:
            return None
        return "before an answer" if self.status is None else "in the middle of the answer"

    def _step(self, data: bytes, body: list[bytes]) -> bytes:
        """Take one element from the front of `data`; what is left of it."""
        place = self._place
        if place == "close":
            body.append(data)
            return b""
        if place == "length":
            piece = data[: self._left]
            body.append(piece)
            self._left -= len(piece)
            self.done = self._left == 0
            return data[len(piece) :]
        if place == "chunk":
            return self._chunk(data, body)
        mark, limit = (b"\r\n\r\n", _HEAD_LIMIT) if place == "head" else (b"\r\n", _LINE_LIMIT)
        end = data.find(mark)
        if end < 0:
            self._wait(data, limit)
            return b""
        if place == "head":
            self._head(data[:end])
        elif place == "size":
            self._left = _size(data[:end].partition(b";")[0].strip()) + 2
            self._place = "trailer" if self._left == 2 else "chunk"
            if self._left < 2:
                raise HttpError("a chunk without a size")
        elif end == 0:  # the line behind the trailer's last
            self.done = True
        return data[end + len(mark) :]

    def _wait(self, data: bytes, limit: int) -> None:
        """Keep `data` until its line ends."""
        if len(data) > limit:
            raise HttpError("a line without an end")
        if self._place == "head" and not b"HTTP/1.".startswith(data[:7]):
            raise HttpError(not_http(data))
        self._rest = data

    def _chunk(self, data: bytes, body: list[bytes]) -> bytes:
        """Take a chunk's bytes, or the line end behind them."""
        size = min(len(data), self._left - 2)
        if size > 0:
            body.append(data[:size])
            self._left -= size
            return data[size:]
        end = data[: self._left]
        if not b"\r\n"[2 - self._left :].startswith(end):
            raise HttpError("a chunk without an end")
        self._left -= len(end)
        if self._left == 0:
            self._place = "size"
        return data[len(end) :]

    def _head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        version, _, rest = first.partition(b" ")
        code = rest[:3]
        if not version.startswith(b"HTTP/1.") or not code.isdigit():
            raise HttpError(not_http(head))
        if code.startswith(b"1"):  # 100 Continue and the like: the answer is still to come
            return
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        self.status = int(code)
        connection = headers.get(b"connection", b"").lower()
        self.keep_alive = b"close" not in connection if version == b"HTTP/1.1" else b"keep-alive" in connection
        if headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked"):
            self._place = "size"
        elif (length := headers.get(b"content-length")) is not None:
            if not length.isdigit():
                raise HttpError("a length that is no number")
            self._place, self._left = "length", int(length)
            self.done = self._left == 0
        elif self.status in {204, 304}:
            self.done = True
        else:
            self._place, self.keep_alive = "close", False


def _size(digits: bytes) -> int:
    """A chunk's size, written in hexadecimal; -3 for what is none (less than any that there is)."""
    try:
        return int(digits, 16) if digits[:1] not in b"+-" and b"_" not in digits else -3
    except ValueError:
        return -3
