"""Whether to believe a run's figures, for the report: its own verdicts, and what `analysis check` finds."""

from typing import Any

from analysis.doubts import check_run
from replay.rundir import Run
from tracegen.console import format_si, plural
from tracegen.errors import AnalysisError, RunError

PERCENT = " %"
# What replay's verdicts are counted in (docs/live.md); one that is not here stands without a unit.
UNITS = {
    "dispatch_lag": " ms",
    "loop_stall": " ms",
    "clock_offset": " ms",
    "error_rate": PERCENT,
    "saturated": PERCENT,
    "clocks_held": PERCENT,
    "sensor_alive": PERCENT,
    "counter_agrees": PERCENT,
    "lengths_exact": " differing",
    "idle_measured": " missing",
    "steps_complete": " missing",
}


def cautions(name: str, run: Run) -> list[str]:
    """Why not to believe what is said of `run`: verdicts that failed, and what `analysis check` finds serious."""
    lines = []
    failed = [v for v in run.manifest.get("verdicts") or [] if v.get("ok") is False]
    if failed:
        said = "; ".join(f"{v.get('name')} ({v['why']})" if v.get("why") else str(v.get("name")) for v in failed)
        lines.append(f"{name} failed {plural(len(failed), 'verdict')} of its own: {said}.")
    try:
        check = check_run(run)
    except (AnalysisError, RunError) as error:
        return [*lines, f"{name} cannot be checked: {error}"]
    if check.serious:
        doubts = [f"{d.name} ({format_si(d.joules, ' J', 3)} {d.joules_are}: {d.why})" for d in check.serious]
        bound = f"{100 * check.bound_rel:g} % of the measured energy"
        lines.append(f"{name}: the attribution is in doubt, by more than {bound}: {'; '.join(doubts)}.")
    return lines


def verdict_texts(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict as texts; `ok` None is not judged."""
    name = str(verdict.get("name", ""))
    return {
        "name": name,
        "ok": verdict.get("ok"),
        "value": _figure(verdict.get("value"), UNITS.get(name, "")),
        "bound": _figure(verdict.get("bound"), UNITS.get(name, "")),
        "why": str(verdict.get("why") or ""),
    }


def _figure(value: Any, unit: str) -> str:
    """A verdict's value or bound, whatever its writer made of it; shares as per cent."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format_si(value * (100 if unit == PERCENT else 1), unit, digits=4)
