"""SQL over the tables of one or several runs."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from analysis.tables import QUERY_TABLES, STORED, Runs
from replay.rundir import Run
from tracegen.errors import AnalysisError

EXAMPLE = "SELECT bucket, avg(energy_j) FROM requests GROUP BY bucket"
FORMATS = ("table", "csv", "json", "parquet")
VERBS = ("SELECT", "WITH", "SHOW")
_ASIDE = re.compile(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", re.DOTALL)  # texts and comments
_READS = re.compile(r'\b((?:read|scan)_\w+)["`]?\s*\(', re.IGNORECASE)  # SQL's table functions
_TABLE = re.compile(r'(?:\bfrom\b|\bjoin\b|,)[\s(]*["`]?(\w+)', re.IGNORECASE)  # where a table's name may stand


def query(runs: Runs | Sequence[Run], sql: str, note: Callable[[str], None] | None = None) -> pl.DataFrame:
    """The answer to `sql` over all tables of `runs`, each with the columns run, engine, mix, tp and freq_mhz.

    Tables: `requests` (with latencies, bucket, label and energy), `energy`, `buckets`, `runs`, and as stored `trace`,
    `steps`, `segments`, `arrivals`, `power`, `cpu_energy`, `server_metrics`, `truth`, `warmup`; of several runs the
    union, a missing table left out. `freq` may be written for `freq_mhz`.
    Energy that a query needs and a run does not have yet is attributed and kept; `note` is told.
    Raises `AnalysisError` for SQL that does not parse, names a table or column that is not there, does anything but
    ask, or reads files of its own.
    """
    return collect(plan(runs if isinstance(runs, Runs) else Runs.of(runs, note), sql))


def plan(runs: Runs, sql: str) -> pl.LazyFrame:
    """`query`, but nothing is read of the stored tables before the frame is collected."""
    verb, bare = _check(sql)
    typed = set(_TABLE.findall(bare))
    if verb == "SHOW":
        frames = {name: pl.LazyFrame() for name in QUERY_TABLES if _may_have(runs, name)}
    else:
        tables = runs.tables(name for name in QUERY_TABLES if name in {word.lower() for word in typed})
        if re.search(r"\bfreq\b", bare, re.IGNORECASE):
            tables = {name: frame.with_columns(freq=pl.col("freq_mhz")) for name, frame in tables.items()}
        frames = tables | {word: tables[word.lower()] for word in typed if word.lower() in tables}
    try:
        answer = pl.SQLContext(frames).execute(sql)
        answer.collect_schema()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise AnalysisError(_one_line(error, frames)) from None
    return answer


def collect(answer: pl.LazyFrame) -> pl.DataFrame:
    """The rows of `plan`. Raises `AnalysisError` for what only shows then, `RunError` for a damaged file."""
    with _answering():
        return answer.collect(engine="streaming")


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what Polars raises at work into one `AnalysisError`."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise AnalysisError(_one_line(error, {})) from None


def _may_have(runs: Runs, table: str) -> bool:
    """Whether a table may be asked for; what is derived is computed only then."""
    return table not in STORED or any(found.has(table) for found in runs.found)


def _check(sql: str) -> tuple[str, str]:
    """The statement's first word, one of `VERBS`, and the statement without texts and comments.

    Raises `AnalysisError` for another word, or for a function that reads.
    """
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
    return verb, bare


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


def save_result(answer: pl.LazyFrame, path: Path, kind: str) -> None:
    """Write the rows of `plan` to `path` as csv, json or parquet, by rename; csv and parquet as they come.

    Raises `AnalysisError` for what cannot be written, and as `collect` does.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _answering():
            if kind == "parquet":
                answer.sink_parquet(partial)
            elif kind == "csv":
                _refuse_lists(answer.collect_schema())
                answer.sink_csv(partial)
            else:
                partial.write_text(as_text(collect(answer), kind), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise AnalysisError(
            f"{path}: cannot be written ({error.strerror or str(error).partition(' (os error')[0]})"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def as_text(frame: pl.DataFrame, kind: str) -> str:
    """`frame` as csv or json text."""
    if kind == "json":
        return frame.write_json() + "\n"
    _refuse_lists(frame.schema)
    return frame.write_csv()


def _refuse_lists(schema: pl.Schema) -> None:
    """Raise `AnalysisError` for a column that csv has no way to hold."""
    nested = [name for name, dtype in schema.items() if dtype.is_nested()]
    if nested:
        raise AnalysisError(f"column '{nested[0]}' holds lists, which csv cannot; use --format json or parquet")


def format_of(kind: str | None, output: Path | None) -> str:
    """The format asked for, by name or by the ending of `output`. Raises `AnalysisError` where there is none."""
    if kind is None:
        kind = "table" if output is None else output.suffix.removeprefix(".").lower()
        if output is not None and kind not in FORMATS[1:]:
            raise AnalysisError(f"-o {output}: end it in .csv, .json or .parquet, or give --format")
    if kind not in FORMATS:
        raise AnalysisError(f"--format '{kind}': use one of {', '.join(FORMATS)}")
    if kind == "parquet" and output is None:
        raise AnalysisError("--format parquet needs a file: -o FILE")
    if kind == "table" and output is not None:
        raise AnalysisError("-o needs --format csv, json or parquet")
    return kind
