"""Which runs a command was given: run directories, folders of runs, patterns, and URLs of any of these."""

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.load import open_run
from analysis.remote import Store, fetch_manifest, is_url, matches, without_secrets
from replay.rundir import MANIFEST, Run
from tracegen.errors import AnalysisError, RunError

NAMED = 3  # of what was left out; more are counted
TRACE_FILE = "trace.parquet"


@dataclass(frozen=True)
class Found:
    """A run that was found; `store` is where it lies when that is elsewhere, and `run` is then its copy here."""

    run: Run
    where: str  # its path or URL
    store: Store | None = field(default=None, repr=False)

    def has(self, table: str) -> bool:
        """Whether the run has `table`, where it lies."""
        if self.store is None:
            return self.run.has(table)
        return any(name.startswith(f"{table}.parquet") for name in self.store.sizes())

    def mix(self) -> str | None:
        """What kind of traffic the run served: `analysis.places.mix_of` its manifest and its trace's footer."""
        try:
            path, store = self.run.path / TRACE_FILE, self.store
            footer = pq.read_metadata(path) if store is None or path.is_file() else store.footer(TRACE_FILE)
        except (AnalysisError, pa.ArrowException, OSError):
            footer = None  # a run without a trace, or with a damaged one, has other tables all the same
        return mix_of(self.run.manifest, footer)


def find_runs(paths: Iterable[str | Path], note: Callable[[str], None]) -> list[Found]:
    """The runs that `paths` name, each once, in the order named and within a pattern or folder in order of name.

    A path is a run directory, a folder whose folders are runs, a pattern (`runs/*`, `sweep/**`; in URLs without `**`
    and `?`), or a URL. What is no run among the matches of a pattern, or beside other runs, is left out, and `note` is
    told. Raises `RunError` or `AnalysisError` for a path that does not exist, a pattern that matches nothing, a
    manifest that is wrong, or where no run is left.
    """
    given = [str(path) for path in paths]
    shown = [without_secrets(text) if is_url(text) else text for text in given]
    found: dict[str, Found] = {}
    others: list[str] = []
    for text in given:
        for run, other in _remote(text) if is_url(text) else _local(text):
            if run is None:
                others.append(other)
            else:
                found.setdefault(str(run.run.path.resolve()), run)
    if not found:
        _refuse(shown, others)
    if others:
        note(f"left out, for {_several(others)} no run director{'y' if len(others) == 1 else 'ies'}")
    return list(found.values())


def _refuse(given: list[str], others: list[str]) -> None:
    """Say that there is no run; one path alone is told what is the matter with it."""
    if not given:
        raise AnalysisError("give at least one run directory")
    if len(given) == 1 and others == given and not is_url(given[0]):
        Run.open(given[0])
    raise AnalysisError(
        f"{', '.join(given[:NAMED])}: no run directory there (a run has a {MANIFEST}); 'replay run TRACE' writes one"
    )


def _local(text: str) -> Iterator[tuple[Found | None, str]]:
    """Each run that a path or pattern names, or what is no run."""
    path = Path(text).expanduser()
    if path.exists() or not glob.has_magic(text):
        if not path.exists():
            raise RunError(f"{text}: no such run directory; 'replay run TRACE' writes one under runs/")
        hits = [path]
    else:
        hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - Path.glob wants its own root
        if not hits:
            raise AnalysisError(f"{text}: the pattern matches nothing")
    runs = {hit for hit in hits if (hit / MANIFEST).is_file()}
    for hit in hits:
        if hit in runs:
            yield Found(open_run(hit), str(hit)), ""
        elif not any(run in hit.parents for run in runs):  # `**` goes into runs too
            inner = sorted(p.parent for p in hit.glob(f"*/{MANIFEST}")) if hit.is_dir() else []
            yield from ((Found(open_run(p), str(p)), "") for p in inner)
            if not inner:
                yield None, str(hit)


def _remote(url: str) -> Iterator[tuple[Found | None, str]]:
    """The same for a URL."""
    stores = matches(url)
    if not stores:
        raise AnalysisError(f"{without_secrets(url)}: the pattern matches nothing")
    for store in stores:
        inner = [store] if store.is_run() else [child for child in store.children() if child.is_run()]
        yield from ((Found(open_run(fetch_manifest(run)), run.url, run), "") for run in inner)
        if not inner:
            yield None, store.url


def mix_of(manifest: dict[str, Any], footer: pq.FileMetaData | None) -> str | None:
    """The mix that a run served, null where that cannot be told.

    What `replay run --metadata mix=NAME` said; else the label that all requests of the trace have, by the statistics in
    its `footer`; else, where it has no labels, the mix that it was synthesized from, by its file metadata.
    """
    metadata = manifest.get("metadata")
    said = metadata.get("mix") if isinstance(metadata, dict) else None
    if said is not None or footer is None:
        return None if said is None else str(said)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    labels = [
        column.statistics
        for group in groups
        for column in map(group.column, range(group.num_columns))
        if column.path_in_schema == "label"
    ]
    if labels:
        sure = all(s is not None and s.has_min_max and s.null_count == 0 for s in labels)
        values = {value for s in labels for value in (s.min, s.max)} if sure else set()
        return str(values.pop()) if len(values) == 1 else None
    return _synthesized_from(footer)


def _synthesized_from(footer: pq.FileMetaData) -> str | None:
    """The mix in the file metadata of a trace."""
    try:
        parameters = json.loads((footer.metadata or {}).get(b"parameters", b"{}"))
    except ValueError:
        return None
    mix = parameters.get("mix") if isinstance(parameters, dict) else None
    return None if mix is None else str(mix)


def _several(names: list[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"
