"""A recommendation for people: what is best, what it saves, how sure that is, and why the others lose."""

import shlex
from collections.abc import Sequence

from analysis.groups import ALL
from analysis.paired import Apart
from analysis.recommend import (
    ALONE,
    CLEAR,
    NONE,
    OPEN,
    Answer,
    Loser,
    Miss,
    Option,
    Recommendation,
    Versus,
    setting_name,
)
from analysis.sweep_text import headline, missing_lines, percent, rate_name, row_name, short, with_half
from tracegen.console import plural

S_PER_HOUR = 3600.0
TIED_NAMED = 3
NOT_HELD = "a clock that the GPUs' own limits did not let them hold under load"
_NAMES = {"ttft": "TTFT", "tbt": "TBT", "e2e": "E2E", "all": "all at once"}


def opening(found: Recommendation) -> list[str]:
    """What was asked of what."""
    group = "attributed, without idle" if found.answers and found.answers[0].group != ALL else "idle included"
    joules = f" ({group})" if found.objective.name in {"energy", "edp"} else ""
    asked = str(found.wanted) or "nothing else"
    return [headline(found.table), f"asked: least {found.objective.text}{joules}, with {asked}"]


def answer_lines(found: Recommendation, answer: Answer, price: float | None = None) -> list[str]:
    """One answer in sentences."""
    of = "" if answer.group == ALL else f"{answer.group}, "
    where = f"{of}{rate_name(answer.rate_rps)}"
    if answer.best is None:
        return [f"{where}: no setting keeps to the objectives{_nearest(answer)}"]
    best = answer.best
    lines = [
        f"{where}: {best.name}, {_value(found, best, price)} ({_served(best)})",
        *(f"  {line}" for line in _runner_up(found, answer)),
        *(f"  {_versus(found, versus)}" for versus in answer.against),
    ]
    if not answer.against and answer.losers:
        lines.append(
            "  nothing to be believed has a higher clock at its TP or is faster: there is nothing to set it against"
        )
    if not best.clock_held:
        lines.append(f"  {best.name}: {NOT_HELD}")
    if best.repeats < best.planned:
        lines.append(f"  {best.name} has {best.repeats} of {best.planned} repeats")
    return lines


def _value(found: Recommendation, option: Option, price: float | None) -> str:
    value = with_half(option.value, option.half)
    cost = "" if price is None else f", {thousand_cost(option, price):.4g} for 1,000 requests"
    return f"{value} {found.objective.unit}{cost}"


def thousand_cost(option: Option, price: float) -> float:
    """What the GPUs held for 1,000 requests cost, at `price` a GPU-hour."""
    return 1000 * (option.value or 0.0) * price / S_PER_HOUR


def _served(option: Option) -> str:
    f = option.figures
    met = "" if f["slo_attainment"] is None else f"; SLO met {percent(f['slo_attainment'])}"
    return f"TTFT p99 {short(f['ttft_p99_ms'])} ms, mean TBT {short(f['tbt_mean_ms'])} ms{met}"


def _nearest(answer: Answer) -> str:
    missing = [loser.option for loser in answer.losers if loser.option.misses]
    if not missing:
        return ", for none could be judged"
    near = max(missing, key=lambda o: o.figures["slo_attainment"] or 0.0)
    return f"; nearest is {near.name}, which misses {misses(near.misses)}"


def _runner_up(found: Recommendation, answer: Answer) -> list[str]:
    """How sure the first place is."""
    if answer.verdict == ALONE or answer.runner_up is None:
        return ["no other setting keeps to the objectives"]
    rival = answer.runner_up
    said = f"{rival.option.name}, {_apart(rival.apart, found.objective.noun)}"
    if answer.verdict == CLEAR:
        nor = [name for name in answer.tied if name != rival.option.name]
        return [f"runner-up: {said}", *([f"not told apart from it: {_list(nor)}"] if nor else [])]
    others = [name for name in answer.tied if name != rival.option.name]
    nor = [f"nor from {_list(others)}"] if others else []
    return [f"not enough data to tell it from the runner-up: {said}", *nor]


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:TIED_NAMED])
    return shown if len(names) <= TIED_NAMED else f"{shown} and {len(names) - TIED_NAMED} more"


def _apart(apart: Apart | None, noun: str) -> str:
    """A difference with its interval, and what that is from."""
    if apart is None:
        return f"no repeat with values in common, so no known difference in {noun}"
    return f"{apart.percent:+z.1f} % {noun}{interval(apart)}"


def interval(apart: Apart, *, less: bool = False) -> str:
    """The interval of a difference in brackets; `less`: of its negative."""
    if apart.low_percent is None or apart.high_percent is None:
        return f" (no interval: {apart.why})"
    low, high = (-apart.high_percent, -apart.low_percent) if less else (apart.low_percent, apart.high_percent)
    return f" ({low:+z.1f} to {high:+z.1f} %, by {plural(apart.pairs, str(apart.paired_by).removesuffix('s'))})"


def _versus(found: Recommendation, versus: Versus) -> str:
    """What the best saves against another setting."""
    whom = f"{versus.option.name}, {versus.what}{_but(versus.option)}"
    if versus.apart is None:
        return f"no repeat with values in common with {whom}"
    noun = found.objective.noun
    if versus.apart.low_percent is not None and not versus.apart.told:
        return f"not enough data to tell it from {whom}: {_apart(versus.apart, noun)}"
    if versus.apart.percent <= 0:
        span = interval(versus.apart, less=True).replace("+", "")
        return f"saves {-versus.apart.percent:.1f} % of {noun}{span} against {whom}"
    return f"{_apart(versus.apart, noun)} against {whom}"


def _but(option: Option) -> str:
    """What to know of a setting that is compared with."""
    if option.unfit is not None:
        return f" ({option.unfit})"
    if not option.clock_held:
        return f" ({NOT_HELD})"
    return f" (misses {misses(option.misses)})" if option.misses else ""


def misses(found: Sequence[Miss]) -> str:
    """Objectives missed, and by how much."""
    said = []
    for miss in found:
        if miss.metric == "tbt_p99":
            said.append(f"TBT p99: {short(miss.value)} ms, {miss.asked:g} asked")
        else:
            tail = "" if miss.p99_ms is None else f", p99 {short(miss.p99_ms)} ms"
            share = "not known" if miss.value is None else f"met by {percent(miss.value)}"
            said.append(f"{_NAMES[miss.metric]}: {share}{tail}")
    return "; ".join(said)


def loser_rows(found: Recommendation, answer: Answer) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: every other setting, how far it is from the best, and why it loses."""
    rows = [
        [
            _on_two_lines(loser.option),
            with_half(loser.option.value, loser.option.half),
            "-" if loser.apart is None else f"{loser.apart.percent:+z.1f} %",
            _span(loser.apart),
            _why(loser, answer, found.objective.noun),
        ]
        for loser in answer.losers
    ]
    return ["", found.objective.unit, "against\nthe best", "95 % interval", "why not"], rows


def _on_two_lines(option: Option) -> str:
    """Its name, caps below: reasons need the width."""
    name = setting_name(option.tp, option.freq_mhz, None, None)
    return f"{name}\n{option.name.removeprefix(name).strip()}".rstrip()


def _span(apart: Apart | None) -> str:
    if apart is None or apart.low_percent is None:
        return "-"
    return f"{apart.low_percent:+z.1f} to {apart.high_percent:+z.1f} %"


def _why(loser: Loser, answer: Answer, noun: str) -> str:
    option = loser.option
    if option.unfit is not None:
        return option.unfit
    if option.misses:
        return f"misses {misses(option.misses)}"
    few = f"; {option.repeats} of {option.planned} repeats" if option.repeats < option.planned else ""
    if option.name in answer.tied:
        return f"not told apart from the best{few}"
    return f"more {noun}{few}"


def answer_rows(found: Recommendation) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one row an answer, for several rates or groups."""
    by_group = any(answer.group != ALL for answer in found.answers)
    several = len({answer.rate_rps for answer in found.answers}) > 1
    rows = []
    for answer in found.answers:
        best, rival = answer.best, answer.runner_up
        heads = [*([_rate(answer)] if several else []), *([answer.group] if by_group else [])]
        if best is None:
            rows.append([*heads, "none", *["-"] * 4, "no setting keeps to the objectives"])
            continue
        far = rival.apart if rival is not None else None
        rows.append(
            [
                *heads,
                _on_two_lines(best),
                with_half(best.value, best.half),
                short(best.figures["ttft_p99_ms"]),
                short(best.figures["tbt_mean_ms"]),
                percent(best.figures["slo_attainment"]),
                _next(answer, far),
            ]
        )
    headings = [*(["req/s"] if several else []), *([found.table.by] if by_group else [])]
    return [
        *headings,
        "best",
        found.objective.unit,
        "TTFT p99\nms",
        "TBT\nms",
        "SLO\nmet",
        "next",
    ], rows


def _rate(answer: Answer) -> str:
    return "trace's" if answer.rate_rps is None else f"{answer.rate_rps:g}"


def _next(answer: Answer, far: Apart | None) -> str:
    """The runner-up in few words."""
    if answer.runner_up is None:
        return "no other keeps to them"
    name = answer.runner_up.option.name
    if answer.verdict == OPEN:
        return f"not enough data to tell from {name}"
    return name if far is None else f"{name} {far.percent:+z.1f} %"


def closing(found: Recommendation) -> list[str]:
    """How the intervals were made, and what is missing."""
    apart = [loser.apart for answer in found.answers for loser in answer.losers if loser.apart is not None]
    ways = {a.paired_by for a in apart}
    lines = []
    if "repeats" in ways:
        lines.append("intervals: 95 %, of differences paired by repeat (the same requests for each setting)")
    if "requests" in ways:
        lines.append(
            "intervals by requests: one repeat, paired request by request; they say nothing of how repeats would vary"
        )
    if any(answer.verdict == NONE for answer in found.answers):
        lines.append("where none keeps to the objectives: loosen --slo or --attainment, or add settings to the sweep")
    if any(answer.verdict == OPEN for answer in found.answers):
        more = f"replay sweep -o {shlex.quote(str(found.table.path))} --repeats N"
        lines.append(f"where there is not enough data, more repeats go into the same folder: {more}")
    lines += [f"note: {remark}" for remark in found.table.remarks]
    # One answer's table has the reason of every setting.
    return lines if len(found.answers) == 1 else [*lines, *missing_lines(found.table)]


def front_rows(found: Recommendation) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells of the Pareto fronts at each rate (and of each group that was answered for)."""
    from analysis.pareto import FRONTS, with_fronts

    groups = {answer.group for answer in found.answers}
    rates = {answer.rate_rps for answer in found.answers}
    tables = []
    for (rate, group), part in with_fronts(found.table.settings).group_by("rate_rps", "group", maintain_order=True):
        if group not in groups or rate not in rates:
            continue
        on = [row for row in part.iter_rows(named=True) if any(row[f"pareto_{name}"] for name in FRONTS)]
        rows = [
            [
                row_name(row),
                short(row["energy_per_request_j"]),
                *(f"{short(row[latency])} {'*' if row[f'pareto_{name}'] else ' '}" for name, latency in FRONTS.items()),
            ]
            for row in sorted(on, key=lambda row: row["energy_per_request_j"])
        ]
        of = "" if group == ALL else f" of {group}"
        title = f"Pareto front{of} {rate_name(rate)}: J/request against latency (*: on the front)"
        tables.append((title, ["", "J/request", "TTFT p99 ms", "mean TBT ms"], rows))
    return tables
