"""Which setting of a sweep serves best under latency objectives, what it saves, and why the others lose.

One answer a rate, and a group where asked. Eligible is what is sound and keeps to the objectives in the mean over its
repeats; the best of these has the least mean objective, settings of different repeats being set against each other over
those that both have: a repeat's own requests may be cheap. Whether it is better than the next is told from pairs
(`analysis.paired`); where the interval of their difference includes zero there is not enough data for a winner.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from analysis.bootstrap import Floats
from analysis.groups import ALL
from analysis.objectives import Objective, Wanted, objective
from analysis.paired import Apart, Requests, apart
from analysis.sweep import MEANS, MISSING, SATURATED, SOUND, SweepTable, group_rank, half_interval
from analysis.sweep_file import SETTING
from tracegen.errors import AnalysisError

KNOBS = tuple(name for name in SETTING if name != "rate_rps")
CLEAR, OPEN, ALONE, NONE = "clear", "not enough data", "alone", "none"

Pairs = Callable[[str, str, str], tuple[Floats, Floats] | str]  # runs a and b, group


@dataclass(frozen=True)
class Miss:
    """An objective that a setting does not keep to: it has `value` where `asked` is; both are shares, or ms."""

    metric: str  # ttft | tbt | e2e | all (at once) | tbt_p99
    value: float | None
    asked: float
    p99_ms: float | None = None


@dataclass(frozen=True)
class Option:
    """A setting at one rate, for one group: what it came to, and why it cannot be chosen where it cannot."""

    tp: int
    freq_mhz: float | None
    batch_cap: int | None
    power_cap_w: float | None
    standing: str
    repeats: int
    planned: int
    value: float | None  # of the objective, the mean over repeats
    half: float | None  # half its 95 % interval over repeats
    figures: Mapping[str, Any]
    clock_held: bool = True  # False: the GPUs' own limits kept them below it
    misses: tuple[Miss, ...] = ()
    unfit: str | None = None  # why it does not count at all
    values: Mapping[int, float] = field(default_factory=dict, repr=False)  # by repeat
    runs: Mapping[int, str] = field(default_factory=dict, repr=False)

    @property
    def eligible(self) -> bool:
        """Whether it may be chosen."""
        return self.unfit is None and not self.misses and self.value is not None

    @property
    def name(self) -> str:
        """As people are told it."""
        return setting_name(self.tp, self.freq_mhz, self.batch_cap, self.power_cap_w)


@dataclass(frozen=True)
class Versus:
    """The best setting against another one, `what` that is; `apart` is of the best from it."""

    what: str
    option: Option
    apart: Apart | None


@dataclass(frozen=True)
class Loser:
    """A setting that was not chosen: it misses objectives, or is `apart` from the best, or does not count."""

    option: Option
    apart: Apart | None


@dataclass(frozen=True)
class Answer:
    """The best setting at one rate for one group; None with verdict `none`."""

    rate_rps: float | None
    group: str
    verdict: str  # clear | not enough data | alone | none
    best: Option | None
    runner_up: Loser | None
    tied: tuple[str, ...]  # settings that the data does not tell from the best
    against: tuple[Versus, ...]
    losers: tuple[Loser, ...]  # all but the best, eligible ones first, in order of the objective


@dataclass(frozen=True)
class Recommendation:
    """The answers of a sweep."""

    table: SweepTable
    wanted: Wanted
    objective: Objective
    answers: tuple[Answer, ...]


def recommend(
    table: SweepTable,
    wanted: Wanted,
    name: str = "energy",
    *,
    per_group: bool = False,
    rate_rps: float | None = None,
    pairs: Pairs | None = None,
) -> Recommendation:
    """The best setting of `table` for objective `name` at each rate, or at `rate_rps`; for each group where asked.

    `table` is loaded with `wanted.slo`. `pairs` gives the values of two runs' requests, for settings of one repeat;
    None: they are read from the sweep's runs. Raises `AnalysisError` for what the sweep cannot answer.
    """
    what = objective(name)
    if table.slo != wanted.slo:
        raise AnalysisError("the sweep's table is of other latency objectives than those asked for; load it with these")
    if per_group and not what.of_groups:
        raise AnalysisError(
            f"--objective {name}: {what.text} is of the GPUs as a whole and not of a {table.by}; "
            "per bucket use energy, performance or edp"
        )
    settings = _at(table.settings, rate_rps).filter((pl.col("group") != ALL) if per_group else (pl.col("group") == ALL))
    rows = (table.groups if per_group else table.cells.with_columns(pl.lit(ALL).alias("group"))).with_columns(
        what.value.alias("value")
    )
    rows = rows.join(table.cells.select("cell", "run"), on="cell", how="left") if per_group else rows
    requests = pairs or Requests(table.path, table.by, table.scope, name)
    answers = []
    for (rate, group), part in settings.group_by("rate_rps", "group", maintain_order=True):
        same_rate = pl.col("rate_rps").eq_missing(pl.lit(rate, pl.Float64))
        mine = rows.filter(same_rate, pl.col("group") == group)
        unsound = table.cells.filter(same_rate, pl.col("standing") != SOUND)
        options = [_option(row, mine, unsound, wanted) for row in part.iter_rows(named=True)]
        answers.append(_answer(rate, str(group), options, requests))
    answers.sort(key=lambda a: (a.rate_rps or 0.0, group_rank(a.group)))
    return Recommendation(table, wanted, what, tuple(answers))


def _at(settings: pl.DataFrame, rate_rps: float | None) -> pl.DataFrame:
    if rate_rps is None:
        return settings
    found = settings.filter(pl.col("rate_rps") == rate_rps)
    if found.is_empty():
        rates = settings["rate_rps"].drop_nulls().unique().sort().to_list()
        known = f"it has {', '.join(f'{rate:g}' for rate in rates)}" if rates else "its trace was replayed as it is"
        raise AnalysisError(f"--rate {rate_rps:g}: the sweep has no cells of this rate; {known}")
    return found


def _same(frame: pl.DataFrame, row: Mapping[str, Any]) -> pl.DataFrame:
    """The rows of `frame` that are of the setting of `row`."""
    return frame.filter(pl.col(name).eq_missing(pl.lit(row[name], frame.schema[name])) for name in KNOBS)


def _option(row: Mapping[str, Any], rows: pl.DataFrame, unsound: pl.DataFrame, wanted: Wanted) -> Option:
    """The setting of `row`; `rows` are of all settings' repeats, `unsound` the cells that are not to be believed."""
    mine = _same(rows, row).filter(pl.col("standing") == row["standing"]).drop_nulls("value").sort("repeat")
    bad = _same(unsound, row)
    full = bad.filter(pl.col("standing") == SATURATED)
    unfit = None
    if full.height:
        unfit = f"saturated in {full.height} of {row['planned']} repeats" if row["planned"] > 1 else "saturated"
        unfit += f" ({why})" if (why := _why(full)) else ""
        mine = mine.filter(pl.col("standing") == SOUND)
    elif row["standing"] != SOUND:
        of = bad.filter(pl.col("standing") == row["standing"])
        state = of["state"][0] if row["standing"] == MISSING else row["standing"]
        unfit = f"{state}: {_why(of) or 'no figures'}"
        mine = mine.clear()
    elif mine.is_empty():
        unfit = "no energy is known" if row["energy_per_request_j"] is None else "no request was answered"
    values = dict(zip(mine["repeat"].to_list(), mine["value"].to_list(), strict=True))
    return Option(
        **{name: row[name] for name in KNOBS},
        standing=str(row["standing"]),
        repeats=row["repeats"],
        planned=row["planned"],
        value=sum(values.values()) / len(values) if values else None,
        half=half_interval(list(values.values())),
        figures={name: row[name] for mean in MEANS for name in (mean, f"{mean}_half")},
        clock_held=row["clock_held"] is not False,
        misses=() if unfit else _misses(row, wanted),
        unfit=unfit,
        values=values,
        runs=dict(zip(mine["repeat"].to_list(), mine["run"].to_list(), strict=True)),
    )


def _why(cells: pl.DataFrame) -> str | None:
    """The first reason that is given for `cells`."""
    for row in cells.iter_rows(named=True):
        if said := row["why"] or "; ".join(row["invalid_because"] or []):
            return str(said)
    return None


def _misses(row: Mapping[str, Any], wanted: Wanted) -> tuple[Miss, ...]:
    """The objectives that a setting's means do not keep to; one that is not known is not kept."""
    asked, misses = wanted.attainment, []
    for metric, ours in {"ttft": "ttft", "tpot": "tbt", "e2el": "e2e"}.items():
        if metric in wanted.slo.bounds_ms and not _at_least(row[f"slo_attainment_{ours}"], asked):
            misses.append(Miss(ours, row[f"slo_attainment_{ours}"], asked, row[f"{ours}_p99_ms"]))
    if not misses and wanted.slo.bounds_ms and not _at_least(row["slo_attainment"], asked):
        misses.append(Miss("all", row["slo_attainment"], asked))
    tail, bound = row["tbt_p99_ms"], wanted.tbt_p99_ms
    if bound is not None and (tail is None or tail > bound):
        misses.append(Miss("tbt_p99", tail, bound))
    return tuple(misses)


def _at_least(share: float | None, asked: float) -> bool:
    return share is not None and share >= asked - 1e-12  # a mean of shares rounds


def _answer(rate_rps: float | None, group: str, options: list[Option], pairs: Pairs) -> Answer:
    """The best of `options`, all at one rate and of one group."""
    ranked = sorted(options, key=_rank)
    best = _best([option for option in ranked if option.eligible])
    if best is not None:
        ranked.sort(key=lambda o: (not o.eligible, _over(best, o) if o.eligible else 0.0))
    losers = tuple(Loser(o, _apart(best, o, group, pairs) if best else None) for o in ranked if o is not best)
    if best is None:
        return Answer(rate_rps, group, NONE, None, None, (), (), losers)
    rivals = [loser for loser in losers if loser.option.eligible]
    tied = tuple(rival.option.name for rival in rivals if not _worse(rival.apart))
    verdict = ALONE if not rivals else OPEN if rivals[0].option.name in tied else CLEAR
    against = tuple(
        Versus(what, option, _apart(option, best, group, pairs)) for what, option in _baselines(best, options)
    )
    return Answer(rate_rps, group, verdict, best, rivals[0] if rivals else None, tied, against, losers)


def _best(fit: list[Option]) -> Option | None:
    """The one that needs least of `fit`, which are in order of their own means."""
    best = fit[0] if fit else None
    for option in fit[1:]:
        if best is not None and _over(best, option) < 1:
            best = option
    return best


def _over(a: Option, b: Option) -> float:
    """The ratio of b's mean to a's, over the repeats that both have; where they have none in common, over their own."""
    common = sorted(a.values.keys() & b.values.keys())
    if not common:
        return _ratio(b.value or 0.0, a.value or 0.0)
    return _ratio(sum(b.values[r] for r in common), sum(a.values[r] for r in common))


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs > 0 else float("inf")


def _worse(apart: Apart | None) -> bool:
    """Whether a setting so far from the best is known to need more."""
    return apart is not None and apart.told and apart.percent > 0


def _rank(option: Option) -> tuple[Any, ...]:
    """Eligible first, then those that miss objectives, then the rest; each by the objective and then by setting."""
    value = float("inf") if option.value is None else option.value
    place = tuple(float("inf") if knob is None else knob for knob in (getattr(option, name) for name in KNOBS))
    return (not option.eligible, option.unfit is not None, value, place)


def _apart(a: Option, b: Option, group: str, pairs: Pairs) -> Apart | None:
    """How far option b is from option a."""
    if not a.values or not b.values:
        return None
    return apart(dict(a.values), dict(b.values), lambda repeat: pairs(a.runs[repeat], b.runs[repeat], group))


def _baselines(best: Option, options: list[Option]) -> list[tuple[str, Option]]:
    """What a reader would have chosen without asking: the highest clock of the same TP, and the fastest of all."""
    there = [option for option in options if option.values]
    siblings = [o for o in there if (o.tp, o.batch_cap, o.power_cap_w) == (best.tp, best.batch_cap, best.power_cap_w)]
    locked = [option for option in siblings if option.freq_mhz is not None]
    found: list[tuple[str, Option]] = []
    if locked:
        found.append((f"the highest clock of TP{best.tp}", max(locked, key=lambda o: o.freq_mhz or 0.0)))
    found += [("the driver's own clocks at this TP", o) for o in siblings if o.freq_mhz is None]
    timed = [option for option in there if option.figures["e2e_mean_ms"] is not None]
    # A mean over some of the repeats planned may be of the light ones.
    timed = [option for option in timed if len(option.values) == option.planned] or timed
    if timed:
        found.append(("the fastest of all", min(timed, key=lambda o: (o.figures["e2e_mean_ms"], _rank(o)))))
    named: dict[str, tuple[str, Option]] = {}  # one may be several of these
    for what, option in found:
        before = named.get(option.name)
        named[option.name] = (what if before is None else f"{before[0]} and {what}", option)
    return [(what, option) for what, option in named.values() if option is not best]


def setting_name(tp: int, freq_mhz: float | None, batch_cap: int | None, power_cap_w: float | None) -> str:
    """A setting as people are told it: `TP2 1200 MHz`, and its caps where it has any."""
    clock = "unlocked" if freq_mhz is None else f"{freq_mhz:g} MHz"
    caps = [] if batch_cap is None else [f"batch {batch_cap}"]
    caps += [] if power_cap_w is None else [f"{power_cap_w:g} W"]
    return " ".join([f"TP{tp}", clock, *caps])
