"""Runs of one trace side by side, one or several of each setting: what changed, and whether it is more than chance.

Requests are paired by `request_id`, so that the spread between requests drops out; `analysis.bootstrap` has the
statistics. With one run of each setting an interval speaks of these requests served once by each, not of what a
repeated run would vary by; with two or more of each it speaks of both.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.bootstrap import CONFIDENCE, SAME_REL, Draws, Estimate, Floats, compare_means, holm
from analysis.groups import ALL
from analysis.requests import CORE, beside, request_table
from analysis.saved import RunEnergy
from replay.rundir import Run
from tracegen.buckets import BUCKETS
from tracegen.console import plural
from tracegen.errors import AnalysisError

METRICS = {"energy_j": "J/request", "ttft_ms": "TTFT ms", "tpot_ms": "TBT ms", "e2el_ms": "E2E ms"}
MEASURED = "measured_per_request_j"  # a run's whole energy, idle included, over the requests that it served
MEASURED_TEXT = "J/request with idle"
FEWEST_PAIRS = 10
TOLD = ("lower", "higher")
VERSUS = "vs"
OpenRuns = tuple[Sequence[Run], Sequence[RunEnergy]]


@dataclass(frozen=True)
class Arm:
    """One run of a setting or several."""

    name: str
    runs: tuple[Run, ...]
    energies: tuple[RunEnergy, ...]


@dataclass(frozen=True)
class Difference:
    """Means of one metric in one group of requests, and how far the second setting is from the first, in %."""

    group: str
    metric: str
    pairs: int  # requests; 0 where whole runs are compared
    mean_a: float | None
    mean_b: float | None
    difference_percent: float | None
    low_percent: float | None  # of the 95 % interval; None with too few pairs
    high_percent: float | None
    verdict: str  # lower | higher | not distinguishable | too few pairs | no data
    p_value: float | None = None  # of a size after Holm's correction for as many sizes
    effect_size: float | None = None  # see `analysis.bootstrap.Estimate`
    smallest_percent: float | None = None  # difference that this much data would find in 4 of 5 cases
    needed: int | None = None  # pairs, or runs of each setting, that would find this difference in 4 of 5 cases


@dataclass(frozen=True)
class Comparison:
    """The differences of setting b against setting a; `warnings` say what limits them."""

    run_a: str
    run_b: str
    runs_a: tuple[str, ...]
    runs_b: tuple[str, ...]
    paired: bool
    repeats: bool  # both settings have several runs, so that intervals speak of run-to-run variation too
    simulated: bool
    totals: list[dict[str, Any]]  # per run: measured_j, duration_s, energy per request with idle power included
    differences: list[Difference]
    warnings: list[str]

    def document(self) -> dict[str, Any]:
        """The comparison as a JSON document."""
        return {**asdict(self), "confidence": CONFIDENCE}


def compare(
    a: Run, b: Run, energy_a: RunEnergy, energy_b: RunEnergy, *, paired: bool = True, seed: int = 0
) -> Comparison:
    """Compare run `b` with run `a`, per bucket and over all, over requests that both served; as `compare_arms`."""
    return compare_arms(Arm(a.name, (a,), (energy_a,)), Arm(b.name, (b,), (energy_b,)), paired=paired, seed=seed)


def compare_arms(a: Arm, b: Arm, *, paired: bool = True, seed: int = 0) -> Comparison:
    """Compare setting `b` with setting `a`, per bucket and over all, over requests that all runs served.

    Raises `AnalysisError` when the traces differ and `paired` is asked for, or when no request was served by all.
    """
    runs = [*a.runs, *b.runs]
    if paired:
        _check_traces(runs)
    tables = [_served(run, energy) for arm in (a, b) for run, energy in zip(arm.runs, arm.energies, strict=True)]
    warnings = _warnings(runs, [*a.energies, *b.energies])
    if paired:
        tables, lost = _in_common(tables, runs)
        warnings += _left_out(lost, runs)
    for table, run in zip(tables, runs, strict=True):
        if table.is_empty():
            raise AnalysisError(f"{run.path}: no request was served")
    draws = Draws(np.random.default_rng(seed))
    sides = tables[: len(a.runs)], tables[len(a.runs) :]
    here = set.intersection(*(set(table["bucket"]) for table in tables))
    groups = [ALL, *(name for name in BUCKETS if name in here)]
    found = [_difference(group, metric, sides, draws, paired=paired) for group in groups for metric in METRICS]
    totals = [[_total(run, energy) for run, energy in zip(arm.runs, arm.energies, strict=True)] for arm in (a, b)]
    repeats = len(a.runs) > 1 and len(b.runs) > 1
    if repeats:
        warnings += [w for arm, side in zip((a, b), sides, strict=True) for w in _copies(arm, side)]
        found.insert(0, _measured(totals, draws))
    return Comparison(
        a.name,
        b.name,
        tuple(run.name for run in a.runs),
        tuple(run.name for run in b.runs),
        paired,
        repeats,
        any(run.simulated for run in runs),
        totals[0] + totals[1],
        _corrected(found),
        warnings,
    )


def _check_traces(runs: Sequence[Run]) -> None:
    """Raise `AnalysisError` where two runs replayed different traces."""
    shas = {str(run.manifest["trace_sha256"]): run for run in runs if run.manifest.get("trace_sha256")}
    if len(shas) > 1:
        first, second = (run.path for run in list(shas.values())[:2])
        raise AnalysisError(
            f"{first} and {second} replayed different traces (trace_sha256), so their requests do not pair; "
            "compare group means with --unpaired"
        )


def _served(run: Run, energy: RunEnergy) -> pl.DataFrame:
    """The requests that were answered in full."""
    table = request_table(run, energy.requests, CORE).filter(pl.col("status") == "ok")
    return table.select("request_id", "bucket", *METRICS)


def _in_common(tables: list[pl.DataFrame], runs: Sequence[Run]) -> tuple[list[pl.DataFrame], pl.Series]:
    """Of each table the requests that all have, in one order; and which of the longest table's these are not."""
    first = tables[0]
    common = first
    for table in tables[1:]:
        if not common["request_id"].equals(table["request_id"]):
            common = common.join(table.select("request_id"), on="request_id", how="semi", maintain_order="left")
    if common.is_empty():
        paths = ", ".join(str(run.path) for run in runs)
        raise AnalysisError(f"{paths} served no request in common; compare with --unpaired")
    ids = common["request_id"]
    most = max((table["request_id"] for table in tables), key=len)
    lost = most.clear() if len(most) == len(ids) else most.filter(~most.is_in(ids.implode()))
    return [ids.to_frame("request_id").hstack(beside(ids, table)) for table in tables], lost


def _left_out(lost: pl.Series, runs: Sequence[Run]) -> list[str]:
    """What to say of the requests `lost`, which some run served and others did not, or not in what is measured."""
    early = [run.scan("warmup", ["request_id"]).collect()["request_id"] for run in runs if run.has("warmup")]
    warmed = lost.filter(lost.is_in(pl.concat(early).implode())) if early else lost.clear()
    counts = {
        "they were due in a run's warm-up": len(warmed),
        "not every run served them in full": len(lost) - len(warmed),
    }
    return [f"left out, for {why}: {plural(count, 'request')}" for why, count in counts.items() if count]


def _copies(arm: Arm, tables: Sequence[pl.DataFrame]) -> list[str]:
    """That the runs of `arm` are one and the same. Raises `AnalysisError` where one is named twice."""
    if len({run.path.resolve() for run in arm.runs}) < len(arm.runs):
        raise AnalysisError(f"a run of {arm.name} is named twice; repeats are runs of their own")
    means = pl.concat([table.select(*METRICS).mean() for table in tables])
    apart = means.select((pl.all().max() - pl.all().min()) / pl.all().mean()).row(0)
    if any(rel is not None and rel > SAME_REL for rel in apart):
        return []
    return [f"the runs of {arm.name} do not differ from each other: they say nothing of how a repeated run would vary"]


def _difference(
    group: str, metric: str, sides: tuple[list[pl.DataFrame], list[pl.DataFrame]], draws: Draws, *, paired: bool
) -> Difference:
    """One metric in one group. In a pair the group is the first run's: served lengths may differ."""
    tables = [table for side in sides for table in side]
    if paired:
        both = pl.DataFrame({str(i): table[metric] for i, table in enumerate(tables)})
        rows = both.drop_nulls() if group == ALL else both.filter(tables[0]["bucket"] == group).drop_nulls()
        values = [rows[name].to_numpy() for name in rows.columns]
    else:
        values = [
            (table if group == ALL else table.filter(pl.col("bucket") == group))[metric].drop_nulls().to_numpy()
            for table in tables
        ]
    fewest = min(run.size for run in values)
    a, b = values[: len(sides[0])], values[len(sides[0]) :]
    return _judged(group, metric, fewest, compare_means(a, b, draws, paired=paired) if fewest else None)


def _judged(group: str, metric: str, pairs: int, found: Estimate | None, fewest: int = FEWEST_PAIRS) -> Difference:
    """`Difference` from an estimate, its verdict still to come where there is enough to judge."""
    if found is None:
        return Difference(group, metric, pairs, None, None, None, None, None, "no data")
    means = (found.mean_a, found.mean_b, found.percent)
    if pairs < fewest:
        return Difference(group, metric, pairs, *means, None, None, "too few pairs")
    return Difference(
        group,
        metric,
        pairs,
        *means,
        found.low_percent,
        found.high_percent,
        "",
        found.p_value,
        found.effect_size,
        found.smallest_percent,
        found.needed,
    )


def _measured(totals: list[list[dict[str, Any]]], draws: Draws) -> Difference:
    """Whole runs' energy over the requests that they served, idle power included."""
    sides: list[list[Floats]] = []
    for arm in totals:
        if any(total[MEASURED] is None for total in arm):
            return _judged(ALL, MEASURED, 0, None)
        sides.append([np.array([total[MEASURED]]) for total in arm])
    return _judged(ALL, MEASURED, 0, compare_means(sides[0], sides[1], draws, paired=True), fewest=0)


def _corrected(found: list[Difference]) -> list[Difference]:
    """`found` with verdicts. The sizes of one metric are as many questions at once: theirs after Holm's correction."""
    adjusted: dict[int, float] = {}
    for metric in METRICS:
        rows = [i for i, d in enumerate(found) if d.metric == metric and d.group != ALL and d.p_value is not None]
        adjusted |= dict(zip(rows, holm([found[i].p_value or 0.0 for i in rows]), strict=True))
    return [_with_verdict(d, adjusted.get(i, d.p_value)) for i, d in enumerate(found)]


def _with_verdict(difference: Difference, p_value: float | None) -> Difference:
    if p_value is None or difference.difference_percent is None:
        return difference
    told = p_value < 1 - CONFIDENCE
    verdict = ("lower" if difference.difference_percent < 0 else "higher") if told else "not distinguishable"
    needed = None if told else difference.needed
    return Difference(**{**asdict(difference), "verdict": verdict, "p_value": p_value, "needed": needed})


def _total(run: Run, energy: RunEnergy) -> dict[str, Any]:
    """A run's whole energy over the requests that it served, idle time included, work for its warm-up's left out."""
    served = run.scan("requests", ["status", "output_tokens"]).filter(pl.col("status") == "ok")
    count, tokens = served.select(pl.len(), pl.col("output_tokens").cast(pl.Int64).sum()).collect().row(0)
    summary = energy.summary or {}
    measured_j = summary.get("measured_j")
    served_j = None if measured_j is None else measured_j - float(summary.get("warmup_j") or 0.0)
    return {
        "run": run.name,
        "served": count,
        "duration_s": summary.get("window", {}).get("duration_s"),
        "scope": energy.scope,
        "measured_j": measured_j,
        "idle_j": summary.get("idle_j"),
        "measured_per_request_j": served_j / count if served_j is not None and count else None,
        "measured_per_output_token_j": served_j / tokens if served_j is not None and tokens else None,
    }


_SUMMARY_KEYS = {"membership": "who was in each step", "method": "the method", "scope": "the scope"}


def _warnings(runs: Sequence[Run], energies: Sequence[RunEnergy]) -> list[str]:
    """What a reader should know before believing the differences."""
    warnings = []

    def differ(what: str, values: Sequence[Any]) -> None:
        unlike = list(dict.fromkeys(str(value) for value in values))
        if len(unlike) > 1:
            warnings.append(f"the runs differ in {what}: {' and '.join(unlike)}")

    for key in ("engine", "state"):
        differ(key, [run.manifest.get(key) for run in runs])
    summaries = [energy.summary for energy in energies if energy.summary is not None]
    for key, what in _SUMMARY_KEYS.items():
        differ(f"{what} behind their joules", [summary.get(key) for summary in summaries])
    models = [{i.get("model") for i in run.manifest.get("instances") or []} for run in runs]
    if any(model != models[0] for model in models):
        warnings.append("the runs served different models")
    for run, energy in zip(runs, energies, strict=True):
        if not run.manifest.get("trace_sha256"):
            warnings.append(f"{run.name}: no trace_sha256, so it is not certain that the traces are the same")
        if energy.why:
            warnings.append(f"no energy: {energy.why}")
        failed = [str(v.get("name")) for v in run.manifest.get("verdicts") or [] if v.get("ok") is False]
        if failed:
            warnings.append(f"{run.name}: failed its verdicts {', '.join(failed)}")
    return warnings


def setting_of(run: Run, key: str) -> str:
    """What `run` was started with under `key`.

    Of its instances (`freq_mhz`, `tp`, `model`, `power_cap_w`), else of its `--metadata`, else an argument. Raises
    `AnalysisError` where it has none, or its instances differ.
    """
    key = "freq_mhz" if key == "freq" else key  # as queries take it
    of_instances = {str(i[key]) for i in run.manifest.get("instances") or [] if i.get(key) is not None}
    if len(of_instances) > 1:
        raise AnalysisError(f"{run.path}: its instances differ in '{key}', so it belongs to no one setting")
    documents = (run.manifest.get("metadata") or {}, run.manifest.get("arguments") or {})
    found = [*of_instances, *(d[key] for d in documents if isinstance(d, dict) and d.get(key) is not None)]
    if not found:
        known = sorted({k for i in run.manifest.get("instances") or [] for k, v in i.items() if v is not None})
        raise AnalysisError(f"{run.path}: its manifest has no '{key}' to compare by; it has {', '.join(known)}")
    return str(found[0])


def arms_of(words: Sequence[str], by: str | None, open_all: Callable[[Sequence[str]], OpenRuns]) -> list[Arm]:
    """The settings that a command line names: `A B`, `A1 A2 vs B1 B2`, or runs to be told apart by a key.

    `open_all` opens directories and finds their energies. Raises `AnalysisError` for words that make no two settings.
    """
    if by is not None:
        return arms_by(*open_all(words), by)
    if VERSUS in words:
        place = list(words).index(VERSUS)
        sides = [words[:place], words[place + 1 :]]
        if not all(sides) or VERSUS in sides[1]:
            raise AnalysisError(f"give runs on both sides of one '{VERSUS}': analysis compare A1 A2 A3 vs B1 B2 B3")
    elif len(words) == 2:
        sides = [words[:1], words[1:]]
    else:
        raise AnalysisError(
            f"{len(words)} runs do not say what to compare with what; give two, or A1 A2 A3 {VERSUS} B1 B2 B3, "
            "or a setting: RUN... --by freq_mhz"
        )
    arms = []
    for letter, side in zip("AB", sides, strict=True):
        runs, energies = open_all(side)
        name = runs[0].name if len(runs) == 1 else f"{letter} ({len(runs)} runs)"
        arms.append(Arm(name, tuple(runs), tuple(energies)))
    return arms


def arms_by(runs: Sequence[Run], energies: Sequence[RunEnergy], key: str) -> list[Arm]:
    """`runs` by their setting `key`, in the order given. Raises `AnalysisError` where there is but one setting."""
    by: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        by.setdefault(setting_of(run, key), []).append(i)
    if len(by) < 2:
        raise AnalysisError(f"all runs have {key} {next(iter(by), 'unknown')}, so there is nothing to compare by {key}")
    return [
        Arm(f"{key} {value}", tuple(runs[i] for i in rows), tuple(energies[i] for i in rows))
        for value, rows in by.items()
    ]
