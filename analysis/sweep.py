"""A sweep as tables: one row a cell, a cell and group, and a setting over its repeats."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import t as student

from analysis.bootstrap import CONFIDENCE
from analysis.energy import ENERGY_DIR
from analysis.groups import ALL
from analysis.load import SCOPES
from analysis.slo import Slo
from analysis.sweep_cells import FIGURES, GROUP_FIGURES, CellFigures, cell_figures
from analysis.sweep_file import COMPLETE, SETTING, Cell, SweepFile, read_sweep
from replay.rundir import MANIFEST
from tracegen.buckets import BUCKETS
from tracegen.console import plural
from tracegen.errors import AnalysisError

GROUPINGS = ("bucket", "label")
# How far a cell can be believed, best first. Figures of one standing are never mixed with those of another.
SOUND, INVALID, SATURATED, MISSING = STANDINGS = ("sound", "invalid", "saturated", "missing")
MEANS = [name for name, dtype in FIGURES.items() if dtype.is_numeric()]
_TOLD = ("valid", "verdicts", "invalid_because", "clock_held", "no_energy")
# Other processes are worth their start of some 2 s each for so many cells that are not attributed yet, which takes some
# 0.8 s each (2 min of chat at 1 request/s, two cores); reading one that is takes a twentieth of that.
_POOL_CELLS = 8
_SAVED_REL = 20
_NUMBERS = {"tp": pl.Int64(), "freq_mhz": pl.Float64(), "rate_rps": pl.Float64(), "batch_cap": pl.Int64()}
_SETTING_SCHEMA = {**_NUMBERS, "power_cap_w": pl.Float64(), "repeat": pl.Int64()}
CELLS = pl.Schema(
    {
        "cell": pl.String(),
        **_SETTING_SCHEMA,
        "state": pl.String(),
        "why": pl.String(),
        "run": pl.String(),
        "standing": pl.Enum(STANDINGS),
        "valid": pl.Boolean(),
        "verdicts": pl.List(pl.String()),
        "invalid_because": pl.List(pl.String()),
        "clock_held": pl.Boolean(),
        "no_energy": pl.String(),
        **FIGURES,
    }
)
GROUPS = pl.Schema(
    {
        "cell": pl.String(),
        **_SETTING_SCHEMA,
        "standing": pl.Enum(STANDINGS),
        "group": pl.String(),
        **GROUP_FIGURES,
    }
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SweepTable:
    """A sweep's figures. Latencies are in ms, of answered requests; `tbt_mean_ms` is the mean of requests' TPOT.

    - `cells`, one row a cell (`CELLS`): its setting (null: the driver's own, or not given), repeat, state and why,
      `standing` (`STANDINGS`), the names of the `verdicts` against it, and its figures, null where it has none. Joules
      and watts are of the meters of `scope`, idle included; `attributed_per_request_j` is without.
    - `groups`, one row a cell and group (`GROUPS`), `by` bucket or label. Joules are attributed, without idle.
    - `settings`, one row a setting and group (`all`, then the groups in order): `standing`, the best of its cells';
      `clock_held`, false where in one of these the GPUs' own limits kept them below the clock asked for;
      `repeats`, how many of these there are, of `planned`; the mean of each figure over them, null for saturated and
      missing ones; `<figure>_half`, half the width of its 95 % interval by Student's t over repeats, null with one.
    - `missing`: (cell, state, why) of what has no figures.
    """

    path: Path
    simulated: bool
    clock: str | None
    model: str | None
    engine: str | None
    by: str
    scope: str
    slo: Slo | None
    cells: pl.DataFrame
    groups: pl.DataFrame
    settings: pl.DataFrame
    missing: list[tuple[str, str, str]]
    remarks: list[str]


def load_sweep(
    path: str | Path,
    *,
    by: str = "bucket",
    scope: str = "gpu",
    slo: Slo | None = None,
    progress: Progress = lambda _done, _total: None,
    processes: int = 1,
) -> SweepTable:
    """The figures of the sweep at `path`, as far as it has come; energies are attributed and saved in its runs.

    `progress` is told how many cells of how many are done. With several `processes` a script needs the guard that
    multiprocessing asks for (`if __name__ == "__main__"`).

    Raises `AnalysisError` for a directory that is no sweep, one without any figures, or runs of different models or
    engines; `RunError` where its file is wrong.
    """
    for word, value, words in (("group by", by, GROUPINGS), ("count joules of scope", scope, SCOPES)):
        if value not in words:
            raise AnalysisError(f"cannot {word} '{value}'; use {' or '.join(words)}")
    sweep = read_sweep(path)
    there = [cell for cell in sweep.cells if cell.state == COMPLETE and (sweep.path / cell.run / MANIFEST).is_file()]
    work = partial(cell_figures, by=by, scope=scope, slo=slo)
    known: dict[str, CellFigures] = {}
    with _mapped(work, [sweep.path / cell.run for cell in there], processes) as figures:
        for done, (cell, found) in enumerate(zip(there, figures, strict=True), 1):
            known[cell.cell] = found
            progress(done, len(there))
    model, engine = (_one(sweep, key, known) for key in ("model", "engine"))
    missing = [_missing(cell, known.get(cell.cell)) for cell in sweep.cells if not _has(known.get(cell.cell))]
    if len(missing) == len(sweep.cells):
        name, state, why = missing[0]
        raise AnalysisError(
            f"{sweep.path}: none of its {plural(len(missing), 'cell')} has figures; {name}: {state}, {why}"
        )
    cells, groups = _cells(sweep, known), _groups(sweep, known)
    settings = settings_of(cells, groups)
    return SweepTable(
        path=sweep.path,
        simulated=sweep.simulated,
        clock=sweep.clock,
        model=model,
        engine=engine,
        by=by,
        scope=scope,
        slo=slo,
        cells=cells,
        groups=groups,
        settings=settings,
        missing=missing,
        remarks=_remarks(sweep, cells, settings),
    )


@contextmanager
def _mapped(
    work: Callable[[Path], CellFigures], paths: Sequence[Path], processes: int
) -> Iterator[Iterator[CellFigures]]:
    """`work` on each of `paths`, in their order, by so many processes where there is much to do."""
    todo = sum(not (path / ENERGY_DIR).is_dir() for path in paths)
    if processes < 2 or todo + (len(paths) - todo) / _SAVED_REL < _POOL_CELLS:
        yield map(work, paths)
        return
    # Started anew: a fork would have Polars' threads in whatever state they are.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map(work, paths)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _has(found: CellFigures | None) -> bool:
    return found is not None and found.why is None


def _missing(cell: Cell, found: CellFigures | None) -> tuple[str, str, str]:
    """A cell without figures, its state, and why."""
    if found is not None and found.why is not None:
        return cell.cell, cell.state, found.why
    why = {
        "planned": "not run yet; the same 'replay sweep' command goes on",
        "running": "being run now",
        "interrupted": "cut off; the same 'replay sweep' command goes on",
        "complete": f"{cell.run} is not there",
    }
    return cell.cell, cell.state, cell.why or why.get(cell.state, "no reason given")


def _one(sweep: SweepFile, key: str, known: Mapping[str, CellFigures]) -> str | None:
    """The one model or engine of all cells, else what the sweep's file says. Raises `AnalysisError` for two."""
    first: dict[str, str] = {}
    for cell, found in known.items():
        value = getattr(found, key)
        if value is not None:
            first.setdefault(str(value), cell)
    if len(first) > 1:
        (one, its), (other, others) = list(first.items())[:2]
        raise AnalysisError(
            f"{sweep.path}: cells of different {key}s make no one table: {its} has '{one}' and {others} has '{other}'"
        )
    return next(iter(first), getattr(sweep, key))


def _standing(cell: Cell, found: CellFigures | None) -> str:
    """How far a cell can be believed."""
    if cell.state == "saturated" or (found is not None and "saturated" in found.verdicts):
        return SATURATED
    if found is None or not _has(found):
        return MISSING
    return SOUND if found.valid or found.clock_held is False else INVALID


def _cells(sweep: SweepFile, known: Mapping[str, CellFigures]) -> pl.DataFrame:
    rows = []
    for cell in sweep.cells:
        found = known.get(cell.cell)
        told = {} if found is None else {n: getattr(found, n) for n in _TOLD}
        figures = {} if found is None else found.row
        why = cell.why if cell.why is not None or found is None else found.why
        rows.append({**asdict(cell), "standing": _standing(cell, found), **told, "why": why, **figures})
    return _in_order(pl.DataFrame([{n: row.get(n) for n in CELLS} for row in rows], schema=CELLS))


def _groups(sweep: SweepFile, known: Mapping[str, CellFigures]) -> pl.DataFrame:
    rows = [
        {**asdict(cell), "standing": _standing(cell, known[cell.cell]), **group}
        for cell in sweep.cells
        if cell.cell in known
        for group in known[cell.cell].groups
    ]
    return _in_order(pl.DataFrame([{n: row.get(n) for n in GROUPS} for row in rows], schema=GROUPS))


def _in_order(frame: pl.DataFrame) -> pl.DataFrame:
    """By setting, unlocked clocks after locked ones, then by group as `BUCKETS` has them or by name, and repeat."""
    by: list[pl.Expr | str] = [*SETTING]
    if "group" in frame.columns:
        names = (ALL, *BUCKETS)
        by += [pl.col("group").replace_strict(names, range(len(names)), default=len(names)), "group"]
    return frame.sort(*by, *(["repeat"] if "repeat" in frame.columns else []), nulls_last=True)


def settings_of(cells: pl.DataFrame, groups: pl.DataFrame) -> pl.DataFrame:
    """`SweepTable.settings` from `SweepTable.cells` and `groups`."""
    best = pl.col("standing").cast(pl.Enum(STANDINGS)).to_physical().min().over(*SETTING)
    ranked = cells.with_columns(best.alias("best"), pl.len().over(*SETTING).alias("planned"))
    whole = ranked.with_columns(pl.lit(ALL).alias("group"))
    each = groups.join(ranked.select("cell", "best", "planned", "clock_held"), on="cell")
    rows = _in_order(pl.concat([whole, each], how="diagonal"))
    used = (pl.col("standing").to_physical() == pl.col("best")) & (pl.col("best") < STANDINGS.index(SATURATED))
    figures = pl.col(MEANS).filter(used)
    found = rows.group_by(*SETTING, "group", maintain_order=True).agg(
        pl.col("standing").min().alias("standing"),
        used.sum().cast(pl.Int64).alias("repeats"),
        pl.col("planned").first().cast(pl.Int64),
        pl.col("clock_held").filter(used).all(ignore_nulls=False),
        pl.col("tbt_source").drop_nulls().first(),
        figures.mean(),
        figures.std(ddof=1).name.suffix("_half"),
        figures.count().name.suffix("_count"),
    )
    halves = []
    for name in MEANS:
        counts = pl.Series(_reach(found[f"{name}_count"].to_numpy()))
        halves.append((pl.col(f"{name}_half") * counts).alias(f"{name}_half"))
    return _in_order(found.with_columns(halves).drop("^.*_count$"))


def _reach(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Half a 95 % interval of a mean in standard deviations of what it is of, by how many these are."""
    many = np.maximum(counts.astype(np.float64), 2.0)
    return np.asarray(student.ppf((1 + CONFIDENCE) / 2, many - 1) / np.sqrt(many))


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of `values`, one of each repeat; None with one."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) * _reach(np.array([len(values)]))[0])


def group_rank(name: str) -> tuple[int, str]:
    """Where a group stands in tables: all, then buckets in order of size, then labels by name."""
    names = (ALL, *BUCKETS)
    return (names.index(name) if name in names else len(names), name)


def _remarks(sweep: SweepFile, cells: pl.DataFrame, settings: pl.DataFrame) -> list[str]:
    """What a reader should know beside the figures."""
    said = []
    if sweep.state not in {None, "complete"}:
        said.append(f"the sweep is not complete (state: {sweep.state}): these are the figures that there are")
    whole = settings.filter(pl.col("group") == ALL, pl.col("repeats") > 0)
    if whole.height and (whole["repeats"] == 1).all():
        said.append("one repeat of each setting: nothing is known of how repeats vary, so there are no intervals")
    fewer = whole.filter(pl.col("repeats") < pl.col("planned")).height
    if fewer:
        few = f"settings with fewer repeats than planned: {fewer} of {whole.height}"
        said.append(f"{few}; a mean over other repeats is of other requests")
    if (cells["tbt_source"] == "requests").any():
        said.append("TBT p99 is over requests' means where a run has no times of chunks")
    for why in cells["no_energy"].drop_nulls().unique(maintain_order=True).to_list()[:1]:
        count = cells["no_energy"].drop_nulls().len()
        said.append(f"{plural(count, 'cell')} without energy; the first: {why}")
    return said
