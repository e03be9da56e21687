"""Published files as they are: a path or an https URL, plain or packed with gzip, xz or zstd, read as a stream.

What packs a file is told by its first bytes and not by its name. The SHA-256 is that of the file as published, packed.
Memory is bounded by a block and by the longest line.
"""

import gzip
import hashlib
import http.client
import io
import lzma
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, Self

import pyarrow as pa

from tracegen.errors import TraceError

_START_BYTES = 1 << 16  # what formats are recognised by
BLOCK_BYTES = 8 << 20  # enough for the vectorised readers, little beside their bound of 1 GiB
LONGEST_LINE_BYTES = 64 << 20
TIMEOUT_S = 60.0  # of a server that says nothing
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_NEWLINE = b"\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Stream(Protocol):
    """What is read from: `read(n)` gives up to `n` bytes, none at the end."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes."""


_UNPACK: dict[bytes, Callable[[IO[bytes]], Stream]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"),
}


class _Counted(io.RawIOBase):
    """`stream`, hashed and counted as it goes by."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.bytes_read = 0
        self.hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.hash.update(data)
        self.bytes_read += len(data)
        return len(data)


class Source(AbstractContextManager["Source"]):
    """An open file or URL: its first bytes (`start`), then `blocks` of whole lines, then its `sha256`.

    `name` is the file's name; `said` is what metadata quote: the path's name, or the URL without user and query.
    Raises `TraceError` where it is missing, cannot be read, or ends before its time.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.path: Path | None = None
        self.size_bytes: int | None = None
        with ExitStack() as opened:
            if isinstance(location, str) and "://" in location:
                raw = self._open_url(location)
            else:
                self.path = Path(location)
                self.name = self.said = self.path.name
                raw = self._open_path(self.path)
            self._counted = _Counted(opened.enter_context(raw))
            plain = io.BufferedReader(self._counted, BLOCK_BYTES)
            with self._reading():
                magic = plain.peek(8)
            unpack = next((way for mark, way in _UNPACK.items() if magic.startswith(mark)), None)
            self.packed = unpack is not None
            with self._reading():
                self._stream: Stream = unpack(plain) if unpack else plain
                self.start = self._beginning().removeprefix(BYTE_ORDER_MARK)
            self._closing = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, of `size_bytes`, as they are in the file."""
        return self._counted.bytes_read

    def _open_path(self, path: Path) -> IO[bytes]:
        try:
            self.size_bytes = path.stat().st_size
            return path.open("rb", buffering=0)
        except FileNotFoundError:
            raise TraceError(f"{path}: no such file") from None
        except OSError as error:
            raise TraceError(f"{path}: cannot be read ({error.strerror})") from None

    def _open_url(self, url: str) -> IO[bytes]:
        parts = _split(url)
        self.name = Path(urllib.parse.unquote(parts.path)).name or parts.netloc
        self.said = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self.location = self.said  # errors quote no key
        try:
            answer = open_url(url)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise TraceError(
                f"{self.said}: cannot be read ({reason_of(error)}); check the address, or fetch it"
            ) from None
        length = answer.headers.get("Content-Length")
        self.size_bytes = int(length) if length and length.isdigit() else None
        return answer

    def _beginning(self) -> bytes:
        """The first unpacked bytes, however few of them a read gives."""
        start = b""
        while len(start) < _START_BYTES and (more := self._stream.read(_START_BYTES - len(start))):
            start += more
        return start

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what reading raises into one `TraceError`."""
        try:
            yield
        except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError, pa.ArrowException) as error:
            self._damaged(error)
        except (OSError, http.client.HTTPException) as error:
            # pyarrow tells of a damaged archive by a bare OSError, without a number of the system's.
            if isinstance(error, OSError) and getattr(self, "packed", False) and error.errno is None:
                self._damaged(error)
            raise TraceError(f"{self.location}: cannot be read ({reason_of(error)})") from None

    def _damaged(self, error: Exception) -> None:
        self._check_whole()  # a connection that broke is not the archive's fault
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(f"{self.location}: truncated or damaged archive ({why}); fetch it again") from None

    def _check_whole(self) -> None:
        """A server that hangs up early is told from the end of the file by the size that it promised."""
        if self.path is None and self.size_bytes is not None and self.bytes_read < self.size_bytes:
            got = f"{self.bytes_read:,} of {self.size_bytes:,} bytes"
            raise TraceError(f"{self.location}: the connection ended after {got}; try again")

    def chunks(self) -> Iterator[bytes]:
        """The unpacked bytes, in pieces of at most `BLOCK_BYTES`; to be read once."""
        chunk = self.start
        while chunk:
            yield chunk
            with self._reading():
                chunk = self._stream.read(BLOCK_BYTES)
        self._check_whole()

    def blocks(self) -> Iterator[bytes]:
        """The unpacked bytes in blocks that end with a line's end; the last may miss it."""
        rest: list[bytes] = []
        for chunk in self.chunks():
            cut = chunk.rfind(_NEWLINE) + 1
            if not cut:
                rest.append(chunk)
                if sum(map(len, rest)) > LONGEST_LINE_BYTES:
                    raise TraceError(
                        f"{self.location}: a line is longer than {LONGEST_LINE_BYTES >> 20} MiB; is it a text file?"
                    )
                continue
            yield b"".join([*rest, chunk[:cut]])
            rest = [chunk[cut:]]
        if last := b"".join(rest):
            yield last

    def sha256(self) -> str | None:
        """The SHA-256 of the file as published, read to its end; null where that would mean to load it from a URL."""
        if self.path is None and self.size_bytes != self.bytes_read and self._counted.read(1):
            return None
        with self._reading():
            while self._counted.read(BLOCK_BYTES):
                pass
        return self._counted.hash.hexdigest()

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """A plain local file with the unpacked bytes, for formats that are read from their end."""
        if self.path is not None and not self.packed:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(prefix="tracegen-", buffering=0) as file:
            for chunk in self.chunks():
                try:
                    file.write(chunk)
                except OSError as error:
                    raise no_room(Path(file.name), error) from None
            yield Path(file.name)


def no_room(path: Path, error: OSError) -> TraceError:
    """The error that a temporary file cannot be written."""
    return TraceError(f"{path}: cannot be written ({error.strerror or error}); point TMPDIR to a folder with room")


def open_url(url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """The server's answer for `url`, as it lies there, with further request `headers`.

    Raises `TraceError` for what is not https, and what urllib raises.
    """
    _check_scheme(url)
    asked = {"Accept-Encoding": "identity", **(headers or {})}
    request = urllib.request.Request(url, headers=asked)  # noqa: S310 - checked above
    return urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT_S)  # type: ignore[no-any-return]


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a server's word to another place, but never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    """Refuse what is not https, but for this machine's own servers."""
    parts = _split(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL):
        return
    raise TraceError(f"{parts.scheme}://{parts.hostname}: is not an https URL; download the file and name its path")


def _split(url: str) -> urllib.parse.SplitResult:
    """The parts of `url`; raises `TraceError` where it has no such parts."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # which is read only then
    except ValueError as error:
        raise TraceError(f"{url.partition('?')[0]}: is no URL ({error}); check the address") from None
    return parts


def reason_of(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended before the answer did"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return str(reason).splitlines()[0] if str(reason) else type(error).__name__
