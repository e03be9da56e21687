"""Runs that lie elsewhere, under a URL: what is asked of them is copied here once, then they are runs like others.

pyarrow itself speaks `s3`, `gs`, `abfs` and `hdfs`; other schemes (`https`, `hf`, `ssh`, ...) go through fsspec where
that is installed. Credentials come from where these find them: environment, configuration files, the URL's own query
(`s3://bucket/runs?region=eu-west-1`).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from analysis.energy import ENERGY_DIR, SUMMARY
from replay.rundir import MANIFEST
from replay.tables import TABLES
from tracegen.errors import AnalysisError

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")  # two letters at least: `C:` is a drive
_SECRET = re.compile(r"//[^/@]*:[^/@]*@")  # user:password@ in a URL
_PATTERN = re.compile(r"[*\[]")  # `?` begins a URL's query
_STAMPS = ".fetched.json"
_PIECE_BYTES = 1 << 20
_FILES = (MANIFEST, *(f"{t}.parquet" for t in TABLES), f"{ENERGY_DIR}/requests.parquet", f"{ENERGY_DIR}/{SUMMARY}")
_ENERGY_FILE = re.compile(rf"{ENERGY_DIR}/\w[\w.-]*")


def is_url(text: str) -> bool:
    """Whether `text` names something that is not on this machine's own file system."""
    return _SCHEME.match(text) is not None


@dataclass(frozen=True)
class Store:
    """A file system and a folder in it."""

    files: fs.FileSystem = field(repr=False)
    root: str  # as the file system names it
    url: str  # as people name it, without secrets
    query: str = field(default="", repr=False)  # of the URL: the same path elsewhere is something else

    def child(self, name: str) -> "Store":
        """The folder or file `name` in this one."""
        return replace(self, root=f"{self.root.rstrip('/')}/{name}", url=f"{self.url}/{name}")

    def children(self) -> list["Store"]:
        """The folders in this one, in order of name; none where it is none itself."""
        with _speaking(self.url):
            found = self.files.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        return [self.child(name) for name in sorted(i.base_name for i in found if i.type == fs.FileType.Directory)]

    def is_run(self) -> bool:
        """Whether there is a manifest in this folder."""
        with _speaking(self.url):
            return bool(self.files.get_file_info(self.child(MANIFEST).root).type == fs.FileType.File)

    def sizes(self) -> dict[str, list[int | None]]:
        """Size and time of change (ns, None where it is not said) of each file in this folder, by relative path.

        Of a server that lists nothing, as most behind https, those of a run's own files that are there.
        """
        try:
            with _speaking(self.url):
                found = self.files.get_file_info(fs.FileSelector(self.root, recursive=True))
        except AnalysisError:
            found = []
        if not found:
            with _speaking(self.url):
                found = self.files.get_file_info([self.child(name).root for name in _FILES])
        start = len(self.root.rstrip("/")) + 1
        return {i.path[start:]: [i.size, i.mtime_ns] for i in found if i.type == fs.FileType.File}

    def footer(self, name: str) -> pq.FileMetaData:
        """The metadata of a Parquet file in this folder; nothing else of the file is read."""
        with _speaking(self.url), self.files.open_input_file(self.child(name).root) as file:
            return pq.ParquetFile(file).metadata


def without_secrets(url: str) -> str:
    """`url` for people: without password and query."""
    return _SECRET.sub("//", url.partition("?")[0]).rstrip("/")


def open_store(url: str) -> Store:
    """The folder that `url` names. Raises `AnalysisError` for a URL that nobody here understands."""
    address, _, query = url.partition("?")
    shown = without_secrets(url)
    scheme = address.partition("://")[0]
    try:
        files, root = fs.FileSystem.from_uri(url if query else address)
    except (ValueError, OSError) as error:
        if "nrecognized filesystem" not in str(error):
            raise AnalysisError(f"{shown}: not a URL of runs ({_first_line(error)})") from None
        files, root = _by_fsspec(url, scheme, shown)
    return Store(files, root, shown, query)


def _by_fsspec(url: str, scheme: str, shown: str) -> tuple[fs.FileSystem, str]:
    """What fsspec makes of `url`."""
    try:
        from fsspec.core import url_to_fs  # not needed for what lies here, in s3, gs or abfs

        files, root = url_to_fs(url)
    except ImportError as error:
        raise AnalysisError(
            f"{shown}: {scheme}:// needs fsspec and what it asks for: pip install 'wattrace[remote]' ({error})"
        ) from None
    except ValueError as error:
        raise AnalysisError(f"{shown}: not a URL of runs ({_first_line(error)})") from None
    return fs.PyFileSystem(fs.FSSpecHandler(files)), root


def matches(url: str) -> list[Store]:
    """The folders that `url` names: itself, or where it has `*` or `[...]` those that match, in order of name."""
    address, mark, query = url.partition("?")
    head, *segments = re.split(r"(?<![:/])/", address.rstrip("/"))
    fixed = next((i for i, segment in enumerate(segments) if _PATTERN.search(segment)), len(segments))
    stores = [open_store("/".join([head, *segments[:fixed]]) + mark + query)]
    for segment in segments[fixed:]:
        stores = [c for store in stores for c in store.children() if fnmatchcase(Path(c.root).name, segment)]
    return stores


def fetch_manifest(store: Store) -> Path:
    """The folder in which what is fetched of the run at `store` is kept, its current manifest in it.

    The file is written only where it changed, so that energy attributed to it here stays newer.
    """
    folder = (
        cache_dir() / hashlib.sha256(f"{store.url}?{store.query}".encode()).hexdigest()[:16] / Path(store.root).name
    )
    document = b"".join(_pieces(store, MANIFEST))
    with _keeping(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if not path.is_file() or path.read_bytes() != document:
            _write(path, document)
    return folder


def fetch(store: Store, folder: Path, tables: Sequence[str], *, energy: bool = False) -> None:
    """Bring `tables` of the run at `store` into `folder` (of `fetch_manifest`) where they changed since they were.

    `energy`: also the attribution kept there, if it is newer than the manifest there. A table that the run does not
    have is no longer in `folder` either. Raises `AnalysisError` when the store does not answer or `folder` is full.
    """
    there = store.sizes()
    wanted = {name: told for name, told in there.items() if _table_of(name) in tables}
    if energy and _newer(there, f"{ENERGY_DIR}/{SUMMARY}"):
        # The summary comes last: with it the others are taken for whole.
        kept = sorted((n for n in there if _ENERGY_FILE.fullmatch(n)), key=lambda name: name.endswith(SUMMARY))
        wanted |= {name: there[name] for name in kept}
    with _keeping(folder):
        manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        stamps = _read_stamps(folder)
        for name in [n for n in stamps if n not in there]:
            (folder / name).unlink(missing_ok=True)
            del stamps[name]
        for name, (size, changed_ns) in wanted.items():
            # Where a store does not say when a file changed, the manifest's bytes tell of a run that went on.
            stamp = [size, changed_ns if changed_ns is not None else manifest]
            if stamps.get(name) == stamp and (folder / name).is_file():
                continue
            _copy(store, name, folder / name, size)
            stamps[name] = stamp
        _write(folder / _STAMPS, json.dumps(stamps).encode())


def _table_of(name: str) -> str | None:
    """The table of which the file `name` is the whole or a part; names come from outside, so only known ones count."""
    found = re.fullmatch(r"(\w+)\.parquet(/[\w.]+-[\w.-]+\.parquet)?", name)
    return found[1] if found and found[1] in TABLES else None


def _newer(there: dict[str, list[int | None]], name: str) -> bool:
    """Whether the file `name` is there and not older than the manifest there, as far as that is said."""
    if name not in there:
        return False
    changed_ns, manifest_ns = there[name][1], there.get(MANIFEST, [None, None])[1]
    return changed_ns is None or manifest_ns is None or changed_ns >= manifest_ns


def _copy(store: Store, name: str, target: Path, size: int | None) -> None:
    """Copy one file by rename. Raises `AnalysisError` for one that ends early."""
    if target.parent.is_file():  # one file where there are parts now
        target.parent.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for piece in _pieces(store, name):
                file.write(piece)
        if size is not None and partial.stat().st_size != size:
            raise AnalysisError(f"{store.url}/{name}: ended after {partial.stat().st_size} of {size} bytes; try again")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _pieces(store: Store, name: str) -> Iterator[bytes]:
    """The bytes of one file."""
    with _speaking(store.url), store.files.open_input_stream(store.child(name).root, compression=None) as stream:
        while piece := stream.read(_PIECE_BYTES):
            yield piece


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _read_stamps(folder: Path) -> dict[str, Any]:
    """What was fetched before; nothing where that cannot be told."""
    try:
        stamps = json.loads((folder / _STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def cache_dir() -> Path:
    """Where fetched runs are kept; it may be deleted at any time."""
    # The XDG specification has relative paths ignored; LOCALAPPDATA is where Windows keeps such things.
    named = [Path(os.environ.get(name, "")) for name in ("XDG_CACHE_HOME", "LOCALAPPDATA")]
    return next((path for path in named if path.is_absolute()), Path.home() / ".cache") / "wattrace" / "runs"


@contextmanager
def _speaking(url: str) -> Iterator[None]:
    """Turn what a store answers when it does not into one `AnalysisError`."""
    try:
        yield
    except FileNotFoundError:
        raise AnalysisError(f"{url}: there is no such run or file") from None
    except AnalysisError:
        raise
    except Exception as error:  # noqa: BLE001 - behind fsspec are many libraries, each with errors of its own
        raise AnalysisError(f"{url}: cannot be read ({_first_line(error)})") from None


@contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    """Turn a full or forbidden cache into one `AnalysisError`."""
    try:
        yield
    except OSError as error:
        raise AnalysisError(
            f"{folder}: what was fetched cannot be kept ({error.strerror or error}); set XDG_CACHE_HOME to a folder "
            "with room"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
