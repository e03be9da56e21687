"""Download a public trace: resumed where it broke off, checked against its published hash, there whole or not at all.

What came so far lies in a hidden neighbour of the target, with the server's mark of the version (ETag) beside it. It is
gone on with where the server says that the version is still the same, or where a hash will tell.
"""

import http.client
import io
import os
import shutil
import time
import urllib.error
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tracegen.datasets import Dataset, find_dataset
from tracegen.errors import TraceError
from tracegen.schema import file_sha256
from tracegen.sources import open_url, reason_of

CHUNK_BYTES = 1 << 20
TRIES = 5  # in a row without a byte
WAIT_S = 1.0  # before the second try, twice that before each further one
_AGAIN = {408, 429, 500, 502, 503, 504}  # answers that another try may change (RFC 9110)
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Fetched:
    """A file that was fetched, or was there; `checked` is null where no hash is published, or it was not wanted."""

    path: Path
    bytes: int
    sha256: str
    checked: bool | None
    was_there: bool = False


def cache_folder() -> Path:
    """Where fetched traces lie: `wattrace/datasets` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wattrace" / "datasets"


def fetch_dataset(
    name: str,
    output: str | Path | None = None,
    *,
    checksum: bool = True,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Fetched:
    """Download the dataset called `name` to `output`, by default into `cache_folder()` under its file's name.

    What is there already, with the published hash or where none is published, is not fetched again unless `force`.
    `on_progress` is called with the bytes that are there and the file's size, null where it is not known.
    Raises `TraceError` for a dataset that is not known or not one file, a server that fails, a file of another hash
    (unless not `checksum`), and a full disk.
    """
    dataset = find_dataset(name)
    if dataset.url is None:
        raise TraceError(f"{name} is not one file; see {dataset.page}, then 'tracegen import {dataset.format}'")
    target = Path(output) if output is not None else cache_folder() / name / _file_name(dataset)
    wanted = dataset.sha256 if checksum else None
    if target.exists() and not force:
        found = file_sha256(target)
        if wanted is not None and found != wanted:
            raise TraceError(f"{target}: is there, but is not {name} (SHA-256 {found}); overwrite it with --force")
        return Fetched(target, target.stat().st_size, found, None if wanted is None else True, was_there=True)
    return fetch_url(dataset.url, target, sha256=wanted, on_progress=on_progress)


def _file_name(dataset: Dataset) -> str:
    return urllib.parse.unquote(Path(urllib.parse.urlsplit(dataset.url or "").path).name)


def fetch_url(
    url: str, target: Path, *, sha256: str | None = None, on_progress: Progress | None = None, wait_s: float = WAIT_S
) -> Fetched:
    """Download `url` to `target`, by rename once it is whole and, where `sha256` is given, has it.

    A connection that breaks off is taken up again where it broke, by this call and by a later one; after `TRIES` in a
    row that brought nothing the error of the last is raised. Raises `TraceError` as `fetch_dataset` does.
    """
    download = _Download(url, target, sha256, on_progress)
    tries = 0
    while True:
        before = download.have_bytes
        try:
            download.go_on()
            return download.finished()
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
                if error.code not in _AGAIN:
                    raise TraceError(f"{url}: HTTP {error.code} {error.reason}; check the address") from None
            if isinstance(error, _DiskError):
                raise TraceError(f"{target}: {error}; free some space: fetching goes on where it stopped") from None
            tries = 0 if download.have_bytes > before else tries + 1
            if tries >= TRIES:
                kept = f"{download.have_bytes:,} bytes are kept, " if download.have_bytes else ""
                raise TraceError(f"{url}: {reason_of(error)}; {kept}try again later") from None
            time.sleep(wait_s * 2 ** max(tries - 1, 0))


class _DiskError(OSError):
    """What the disk says, to be told apart from what the connection says."""


class _Download:
    """A file on its way: `go_on` asks for the rest and writes it, `finished` puts it in place."""

    def __init__(self, url: str, target: Path, sha256: str | None, on_progress: Progress | None) -> None:
        self.url, self.target, self.sha256, self.on_progress = url, target, sha256, on_progress
        self.partial = target.with_name(f".{target.name}.partial")
        self.mark = target.with_name(f".{target.name}.etag")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{target}: cannot be written ({error.strerror}); choose another output") from None

    @property
    def have_bytes(self) -> int:
        """How much of the file is there."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def go_on(self) -> None:
        """Ask for what is missing, and write it; raises what the connection raises where it ends too early."""
        have = self.have_bytes
        etag = self.mark.read_text() if self.mark.exists() else None
        if have and etag is None and self.sha256 is None:
            have = 0  # nothing would tell that the rest is of another version
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and etag is not None:
            headers["If-Range"] = etag
        try:
            answer = open_url(self.url, headers)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
            if _whole_size(error.headers.get("Content-Range")) == have:
                return  # the end had come, and was not told
            self.restart()
            answer = open_url(self.url)
        with answer:
            self._take(answer, have)

    def _take(self, answer: http.client.HTTPResponse, have: int) -> None:
        """Write what a server answers, behind the first `have` bytes if it is what follows them."""
        length = answer.headers.get("Content-Length")
        left = int(length) if length and length.isdigit() else None
        if have and not (answer.status == http.HTTPStatus.PARTIAL_CONTENT and _starts_at(answer) == have):
            have = 0  # the server sends all of it, or another part than was asked for
            if answer.status == http.HTTPStatus.PARTIAL_CONTENT:
                self.restart()
                raise ConnectionError("the server sent another part of the file than was asked for")
        if not have:
            self.restart()
            etag = answer.headers.get("ETag", "")
            if etag.startswith('"'):  # a weak one does not promise the same bytes (RFC 9110, section 8.8.1)
                self.mark.write_text(etag)
        size = None if left is None else have + left
        if left is not None and left > (free := shutil.disk_usage(self.target.parent).free):
            raise _DiskError(f"{left:,} bytes are to come, and the disk has {free:,} left")
        with self.partial.open("ab", buffering=0) as file:
            while chunk := answer.read(CHUNK_BYTES):
                _write(file, chunk)
                have += len(chunk)
                if self.on_progress is not None:
                    self.on_progress(have, size)
        if size is not None and have < size:
            raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")

    def restart(self) -> None:
        """Forget what came so far."""
        self.partial.unlink(missing_ok=True)
        self.mark.unlink(missing_ok=True)

    def finished(self) -> Fetched:
        """Check the whole file and put it in place."""
        found, size = file_sha256(self.partial), self.have_bytes
        if self.sha256 is not None and found != self.sha256:
            self.restart()
            raise TraceError(
                f"{self.url}: SHA-256 {found} of {size:,} bytes is not the published {self.sha256}: removed; "
                "try again, or take it as it is with --no-checksum"
            )
        self.partial.replace(self.target)
        self.mark.unlink(missing_ok=True)
        return Fetched(self.target, size, found, None if self.sha256 is None else True)


def _write(file: io.FileIO, chunk: bytes) -> None:
    """Write all of `chunk`; what the disk says is told apart from what a connection says."""
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[file.write(rest) :]
        except OSError as error:
            raise _DiskError(f"cannot be written ({error.strerror or error})") from None


def _starts_at(answer: http.client.HTTPResponse) -> int | None:
    """Where the part begins that a server sends, by its `Content-Range: bytes 100-199/200`."""
    first = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else None


def _whole_size(content_range: str | None) -> int | None:
    """The size of the whole file, by `Content-Range: bytes */200`."""
    size = (content_range or "").rpartition("/")[2]
    return int(size) if size.isdigit() else None
