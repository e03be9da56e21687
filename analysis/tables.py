"""The tables of many runs in Python: `open_runs("runs/*")` and then one LazyFrame a table.

Every frame has columns that tell the runs apart (`IDENTITY`), so that it joins to the others on `run` and `request_id`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import polars as pl

from analysis.buckets import bucket_table
from analysis.energy import ENERGY_DIR, SUMMARY
from analysis.latency import LATENCY_COLUMNS
from analysis.places import Found, find_runs
from analysis.remote import fetch
from analysis.requests import CORE, ENERGY_COLUMNS, beside, request_table
from analysis.saved import RunEnergy, ensure_energy
from analysis.scan import deferred, scan, table_schema
from replay.rundir import Run
from tracegen.errors import AnalysisError

STORED = ("trace", "steps", "segments", "arrivals", "power", "cpu_energy", "server_metrics", "truth", "warmup")
DERIVED = ("requests", "energy", "buckets", "runs")
QUERY_TABLES = (*DERIVED, *STORED)
IDENTITY = pl.Schema(
    {"run": pl.String(), "engine": pl.String(), "mix": pl.String(), "tp": pl.Int64(), "freq_mhz": pl.Int64()}
)
# What attribution reads.
ATTRIBUTED = ("trace", "requests", "steps", "segments", "arrivals", "power", "cpu_energy", "warmup")
_NEEDS = {"requests": ("requests", "trace"), "buckets": ("requests", "trace"), "energy": (), "runs": ()}
_COPIES = 8  # runs fetched at a time: most of it is waiting
_FIGURES = ("measured_j", "attributed_j", "prefill_j", "decode_j", "idle_j", "other_j")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Runs:
    """Several runs and their tables.

    Frames are lazy: rows are read when they are collected, and only the columns that are used. A table that some of the
    runs do not have has the rows of the others. `note` is told what a user should know: what was left out, which run
    was attributed just now, which one has no energy and why.
    """

    found: tuple[Found, ...]
    note: Note = field(repr=False)
    _energies: dict[str, RunEnergy] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False)

    @classmethod
    def of(cls, runs: Iterable[Run], note: Note | None = None) -> "Runs":
        """Runs that are open already."""
        return cls(tuple(Found(run, str(run.path)) for run in runs), note or _log)

    def requests(self) -> pl.LazyFrame:
        """One row a request that was sent: requests.parquet with latencies (ms), bucket, label and joules.

        Energy that a run does not have yet is attributed when a column of it is collected, and kept.
        """
        return self.table("requests")

    def energy(self) -> pl.LazyFrame:
        """energy/requests.parquet: request_id, energy_j = prefill_j + decode_j, shared_j, energy_se_j, bucket, label.

        Attributed now where it is not there.
        """
        return self.table("energy")

    def buckets(self) -> pl.LazyFrame:
        """One row a size bucket and one for all: latency percentiles (ms), joules a request and token; `group`."""
        return self.table("buckets")

    def runs(self) -> pl.LazyFrame:
        """One row a run: `path`, model, instances, power_cap_w, state, simulated, requests, duration_s, its joules.

        `scope`: whose joules these are, the serving GPUs' (`gpu`) or those of every sampled GPU (`node`).

        `no_energy` says why the joules are null where they are.
        """
        return self.table("runs")

    def trace(self) -> pl.LazyFrame:
        """trace.parquet: what was asked for."""
        return self.table("trace")

    def steps(self) -> pl.LazyFrame:
        """steps.parquet: one row an engine iteration."""
        return self.table("steps")

    def segments(self) -> pl.LazyFrame:
        """segments.parquet: who was in which steps."""
        return self.table("segments")

    def power(self) -> pl.LazyFrame:
        """power.parquet: every reading of every GPU."""
        return self.table("power")

    def table(self, name: str) -> pl.LazyFrame:
        """Any of `QUERY_TABLES`, the union over the runs.

        Raises `AnalysisError` for another name or when no run has it, `RunError` for one that is damaged or wrong.
        """
        if name not in QUERY_TABLES:
            raise AnalysisError(f"table '{name}': there is no such table; tables are {', '.join(QUERY_TABLES)}")
        tables = self.tables([name])
        if name not in tables:
            raise AnalysisError(f"table '{name}': no run given has it")
        return tables[name]

    def tables(self, names: Iterable[str]) -> dict[str, pl.LazyFrame]:
        """The tables of `names` that at least one run has, by name. What they need of remote runs is fetched now."""
        wanted = list(dict.fromkeys(names))
        self._fetch({table for name in wanted for table in _NEEDS.get(name, (name,))})
        parts: dict[str, list[pl.LazyFrame]] = {}
        for found, name in zip(self.found, run_names([f.run for f in self.found]), strict=True):
            identity = _identity(found, name) if wanted else []
            for table in wanted:
                frame = self._frame(found, table)
                if frame is not None:
                    parts.setdefault(table, []).append(frame.with_columns(identity))
        return {table: pl.concat(frames, how="diagonal_relaxed") for table, frames in parts.items()}

    def sql(self, text: str) -> pl.LazyFrame:
        """The answer to an SQL query over all tables (Polars' dialect); `freq` may be written for `freq_mhz`.

        Raises `AnalysisError` for SQL that does not parse, names a table or column that is not there, does anything
        but ask, or reads files of its own.
        """
        from analysis.query import plan

        return plan(self, text)

    def _fetch(self, tables: set[str]) -> None:
        """Bring `tables` of remote runs here."""
        there = [(found.store, found.run.path) for found in self.found if found.store is not None]
        if there and tables:
            with ThreadPoolExecutor(_COPIES) as pool:
                list(pool.map(lambda run: fetch(run[0], run[1], sorted(tables)), there))

    def _frame(self, found: Found, table: str) -> pl.LazyFrame | None:
        """One table of one run, or None where the run does not have it."""
        run = found.run
        if table == "runs":
            return _run_row(found, self._energy(found)).lazy()
        if table == "energy":
            energy = self._energy(found).requests
            return None if energy is None else energy.lazy()
        if table in {"requests", "buckets"} and not run.has("requests"):
            return None
        if table == "requests":
            return _lazy_requests(run, lambda: self._energy(found))
        if table == "buckets":
            return bucket_table(run, self._energy(found).requests).lazy()
        return scan(run, table) if run.has(table) else None

    def _energy(self, found: Found) -> RunEnergy:
        """The run's energy, attributed where it has none; what there is to say of that is said once."""
        with self._lock:
            if found.where not in self._energies:
                known = ensure_energy(found.run) if found.store is None else _energy_from_afar(found)
                self._energies[found.where] = known
                remark = known.remark(found.run)
                if known.fresh and found.store is not None:
                    remark = f"{found.where}: energy attributed here and kept in {found.run.path}, not there"
                if remark:
                    self.note(remark)
                if known.scope == "node":
                    self.note(f"{found.run.name}: its joules are of every sampled GPU (scope node, as attributed)")
            return self._energies[found.where]


def open_runs(*paths: str | Path, note: Note | None = None) -> Runs:
    """The runs at `paths`: run directories, folders of runs, patterns (`runs/*`), URLs (`s3://bucket/runs`).

    `note` is told remarks for a person; by default the logger `analysis` is. Raises `RunError` or `AnalysisError` for
    what does not exist, matches nothing or is no run.
    """
    tell = note or _log
    return Runs(tuple(find_runs(paths, tell)), tell)


def _log(remark: str) -> None:
    logging.getLogger("analysis").warning(remark)


def _lazy_requests(run: Run, energy: Callable[[], RunEnergy]) -> pl.LazyFrame:
    """`request_table` of `run`, read when it is needed; energy is attributed only where one of its columns is."""
    stored = table_schema(run, "requests")
    schema = pl.Schema(
        {
            **stored,
            "label": pl.String(),
            **dict.fromkeys(LATENCY_COLUMNS, pl.Float64()),
            "bucket": pl.String(),
            **dict.fromkeys(ENERGY_COLUMNS, pl.Float64()),
        }
    )

    def rows(columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        frame = request_table(run, None, list(dict.fromkeys((*CORE, *(name for name in columns if name in stored)))))
        wanted = [name for name in ENERGY_COLUMNS if name in columns]
        joules = energy().requests if wanted else None
        if joules is None:
            yield frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in wanted)
        else:
            known = beside(frame["request_id"], joules.select("request_id", *wanted))
            yield frame.drop(ENERGY_COLUMNS, strict=False).hstack(known)

    return deferred(schema, rows)


def _energy_from_afar(found: Found) -> RunEnergy:
    """The energy of a remote run: what is kept there, or was attributed here before, else attributed here."""
    assert found.store is not None
    summary = found.run.path / ENERGY_DIR / SUMMARY
    fetch(found.store, found.run.path, (), energy=True)
    if summary.is_file():
        known = ensure_energy(found.run)
        if not known.fresh and known.why is None:
            return known
        summary.unlink(missing_ok=True)  # out of date, and what it was made anew from was not all here
    fetch(found.store, found.run.path, ATTRIBUTED)
    return ensure_energy(found.run)


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; their paths where names repeat."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _identity(found: Found, name: str) -> list[pl.Expr]:
    """The columns that tell runs apart."""
    run = found.run
    values = {
        "run": name,
        "engine": run.manifest.get("engine"),
        "mix": found.mix(),
        "tp": setting(run, "tp"),
        "freq_mhz": setting(run, "freq_mhz"),
    }
    return [pl.lit(values[column], dtype).alias(column) for column, dtype in IDENTITY.items()]


def setting(run: Run, key: str) -> Any:
    """What all instances of `run` have in common under `key`, else None."""
    values = {entry.get(key) for entry in run.manifest.get("instances") or []}
    return values.pop() if len(values) == 1 else None


def _run_row(found: Found, energy: RunEnergy) -> pl.DataFrame:
    """One row of what a run was and came to."""
    manifest, summary = found.run.manifest, energy.summary or {}
    cap_w = setting(found.run, "power_cap_w")
    columns = {
        "path": (found.where, pl.String()),
        "model": (setting(found.run, "model"), pl.String()),
        "instances": (len(manifest.get("instances") or []), pl.Int64()),
        "power_cap_w": (cap_w, pl.Float64()),
        "state": (manifest.get("state"), pl.String()),
        "simulated": (found.run.simulated, pl.Boolean()),
        "requests": (summary.get("requests"), pl.Int64()),
        "duration_s": (summary.get("window", {}).get("duration_s"), pl.Float64()),
        "scope": (energy.scope, pl.String()),
        **{name: (summary.get(name), pl.Float64()) for name in _FIGURES},
        "no_energy": (energy.why, pl.String()),
    }
    return pl.DataFrame({name: pl.Series([value], dtype=dtype) for name, (value, dtype) in columns.items()})
