"""SQL over the tables of one or several runs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from analysis.buckets import bucket_table
from analysis.requests import request_table
from analysis.saved import RunEnergy, ensure_energy
from replay.rundir import Run
from tracegen.errors import AnalysisError

STORED = ("trace", "steps", "segments", "arrivals", "power", "cpu_energy", "server_metrics", "truth")
DERIVED = ("requests", "energy", "buckets", "runs")
QUERY_TABLES = (*DERIVED, *STORED)
EXAMPLE = "SELECT bucket, avg(energy_j) FROM requests GROUP BY bucket"
FORMATS = ("table", "csv", "json", "parquet")
VERBS = ("SELECT", "WITH", "SHOW")
_ASIDE = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)  # texts and comments
_READS = re.compile(r'\b((?:read|scan)_\w+)["`]?\s*\(', re.IGNORECASE)  # SQL's table functions


def query(runs: Sequence[Run], sql: str, note: Callable[[str], None] | None = None) -> pl.DataFrame:
    """The answer to `sql` over all tables of `runs`, each with the columns run, engine, tp and freq_mhz.

    Tables: `requests` (with latencies, bucket, label and energy), `energy`, `buckets`, `runs`, and as stored `trace`,
    `steps`, `segments`, `arrivals`, `power`, `cpu_energy`, `server_metrics`, `truth`; of several runs the union, a
    missing table left out.
    Energy that a query needs and a run does not have yet is attributed and kept; `note` is told.
    Raises `AnalysisError` for SQL that does not parse, names a table or column that is not there, does anything but
    ask, or reads files of its own.
    """
    verb = _check(sql)
    wanted = [t for t in QUERY_TABLES if verb == "SHOW" or re.search(rf"\b{t}\b", sql, re.IGNORECASE)]
    tables = open_tables(runs, wanted, note or (lambda _: None))
    try:
        return pl.SQLContext(tables).execute(sql, eager=True)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise AnalysisError(_one_line(error, tables)) from None


def _check(sql: str) -> str:
    """The statement's first word, one of `VERBS`. Raises `AnalysisError` for another, or for a function that reads."""
    bare = _ASIDE.sub(" ", sql)
    words = re.findall(r"\w+", bare)
    if not words:
        raise AnalysisError(f"the query is empty; for example: {EXAMPLE}")
    verb = str(words[0]).upper()
    if verb not in VERBS:
        raise AnalysisError(f"query: '{words[0]}' is not answered, only {', '.join(VERBS)}; for example: {EXAMPLE}")
    reads = _READS.search(bare)
    if reads:
        raise AnalysisError(f"query: {reads[1]} would read a file; a query sees only the tables of the runs given")
    return verb


def open_tables(runs: Sequence[Run], wanted: Sequence[str], note: Callable[[str], None]) -> dict[str, pl.LazyFrame]:
    """The tables `wanted` of all `runs`, by name; a table that no run has is missing."""
    names = run_names(runs)
    parts: dict[str, list[pl.LazyFrame]] = {}
    for run, name in zip(runs, names, strict=True):
        energy = RunEnergy(None, None)
        if set(wanted) & set(DERIVED):
            energy = ensure_energy(run)
            remark = energy.remark(run)
            if remark:
                note(remark)
        for table in wanted:
            frame = _frame(run, table, energy)
            if frame is not None:
                parts.setdefault(table, []).append(frame.with_columns(_identity(run, name)))
    return {table: pl.concat(frames, how="diagonal_relaxed") for table, frames in parts.items()}


def _frame(run: Run, table: str, energy: RunEnergy) -> pl.LazyFrame | None:
    """One table of one run, or None where the run does not have it."""
    if table == "requests":
        return request_table(run, energy.requests).lazy()
    if table == "buckets":
        return bucket_table(run, energy.requests).lazy()
    if table == "energy":
        return None if energy.requests is None else energy.requests.lazy()
    if table == "runs":
        return _run_row(run, energy).lazy()
    return run.scan(table) if run.has(table) else None


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; their paths where names repeat."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _identity(run: Run, name: str) -> list[pl.Expr]:
    """The columns that tell runs apart."""
    values = {"engine": run.manifest.get("engine"), "tp": setting(run, "tp"), "freq_mhz": setting(run, "freq_mhz")}
    types = {"engine": pl.String, "tp": pl.Int64, "freq_mhz": pl.Int64}
    return [pl.lit(name).alias("run"), *(pl.lit(v, types[k]).alias(k) for k, v in values.items())]


def setting(run: Run, key: str) -> Any:
    """What all instances of `run` have in common under `key`, else None."""
    values = {entry.get(key) for entry in run.manifest.get("instances") or []}
    return values.pop() if len(values) == 1 else None


def _run_row(run: Run, energy: RunEnergy) -> pl.DataFrame:
    """One row of what a run came to."""
    figures = ("requests", "measured_j", "attributed_j", "prefill_j", "decode_j", "idle_j", "other_j")
    summary = energy.summary or {}
    row = {name: summary.get(name) for name in figures}
    schema = {name: pl.Int64() if name == "requests" else pl.Float64() for name in figures}
    return pl.DataFrame([row], schema=schema).with_columns(
        duration_s=pl.lit(summary.get("window", {}).get("duration_s"), pl.Float64),
        state=pl.lit(run.manifest.get("state"), pl.String),
        simulated=pl.lit(run.simulated),
    )


def _one_line(error: BaseException, tables: dict[str, pl.LazyFrame]) -> str:
    """Polars' message without its plan, and what would have been there."""
    message = str(error).strip().split("\n")[0]
    missing = re.search(r"relation '(.+?)' was not found", message)
    if missing:
        reason = "no run given has it" if missing[1].lower() in QUERY_TABLES else "there is no such table"
        return f"query: table '{missing[1]}': {reason}; tables are {', '.join(QUERY_TABLES)}"
    if isinstance(error, pl.exceptions.ColumnNotFoundError):
        wanted = re.search(r'"(.+?)"', message)
        columns = [f"{t} has {', '.join(f.collect_schema().names())}" for t, f in tables.items()]
        return f"query: column '{wanted[1] if wanted else message}' is not there; {'; '.join(columns)}"
    return f"query: {message}"


def save_result(frame: pl.DataFrame, path: Path, kind: str) -> None:
    """Write `frame` to `path` as csv, json or parquet, by rename. Raises `AnalysisError` for what cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if kind == "parquet":
            frame.write_parquet(partial)
        else:
            partial.write_text(as_text(frame, kind), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def as_text(frame: pl.DataFrame, kind: str) -> str:
    """`frame` as csv or json text."""
    if kind == "json":
        return frame.write_json() + "\n"
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    if nested:
        raise AnalysisError(f"column '{nested[0]}' holds lists, which csv cannot; use --format json or parquet")
    return frame.write_csv()
