"""An attribution for people in a terminal: where the joules went, and what that rests on."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from analysis.costs import rows_for_people
from analysis.evaluate import Error
from analysis.split import MARGINAL
from tracegen.console import format_si, note, plural, print_table, prose, say

TOLD_S = 3.0  # between two words on how far it is


def told_every(interval_s: float = TOLD_S, what: str = "attributed") -> Callable[[float], None]:
    """Says on stderr how much of a run or sweep is done, every few seconds; of what is quick it says nothing."""
    last_s = time.monotonic()

    def told(part: float) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= interval_s and part < 1:
            note(f"{what} {100 * part:.0f} %")
            last_s = now_s

    return told


def print_energy(summary: dict[str, Any], name: str, errors: Sequence[Error] = ()) -> None:
    """A run's `summary`; `errors` against its truth where it is simulated."""
    window_s = summary["window"]["duration_s"]
    simulated = "SIMULATED  " if summary["simulated"] else ""
    total = format_si(summary["measured_j"] / 1e3, " kJ", 4)
    say(f"{simulated}{name}: {total} in {window_s:.1f} s, {summary['method']}, scope {summary['scope']}")
    say()
    _print_lines(summary, name)
    for domain, joules in summary.get("cpu_j", {}).items():
        say(f"CPU {domain} {'unknown' if joules is None else f'{joules:,.0f} J'}, not attributed")
    each_j = summary["energy_per_request_j"]
    if each_j is not None:
        answered = f"{summary['requests_averaged']:,} answered of {plural(summary['requests'], 'request')}"
        prose(["", f"{format_si(each_j, ' J', 4)} per request over {answered}{_with_idle(summary)}"])
    left = format_si(summary["residual_j"], " J")
    prose(
        [
            f"not accounted for: {left}; membership from {summary['membership'] or 'nothing'}",
            *(line for fit in summary["fit"] for line in _fit_lines(fit)),
            f"gain of the power meters: known to ±{100 * summary['gain_rel_se']:.0f} % only, the same for all requests",
            *(f"note: {remark}" for remark in summary["notes"]),
        ]
    )
    if "costs" in summary:
        say()
        print_table(
            *rows_for_people(summary["costs"]), title=f"{simulated}what it comes to, {_rates(summary['costs'])}"
        )
    if errors:
        say()
        rows = [
            [e.method, f"{100 * e.median_rel:.2f} %", f"{100 * e.p99_rel:.1f} %", f"{100 * e.worst_bucket_rel:.1f} %"]
            for e in errors
        ]
        title = f"error of J/request against SIMULATED ground truth, {plural(errors[0].requests, 'request')}"
        print_table(["method", "median", "p99", "worst bucket mean"], rows, title=title)


def _print_lines(summary: dict[str, Any], name: str) -> None:
    """The lines that add up to what was measured."""
    measured_j = summary["measured_j"]
    idle = "idle (no request in the engine)"
    if "idle_spread" in summary:
        idle = f"idle, spread over requests by {summary['idle_spread']['by']}"
    other = "other (not ours)" if summary["method"] != MARGINAL else "other (not ours, or added by nobody)"
    lines = (("prefill", "prefill_j"), ("decode", "decode_j"), (idle, "idle_j"), (other, "other_j"))
    rows = [
        [label, f"{summary[key] / 1e3:,.3f}", f"{100 * summary[key] / measured_j:.2f} %" if measured_j else "-"]
        for label, key in (*lines, ("measured", "measured_j"))
    ]
    print_table(["", "kJ", "share"], rows)


def _with_idle(summary: dict[str, Any]) -> str:
    each_j = summary.get("idle_spread", {}).get("energy_per_request_with_idle_j")
    return "" if each_j is None else f"; {format_si(each_j, ' J', 4)} with its share of idle energy"


def _rates(costs: dict[str, Any]) -> str:
    """What the figures of `costs` rest on."""
    inputs, said = costs["inputs"], []
    if "pue" in inputs:
        said.append(f"PUE {inputs['pue']['value']:g}")
    if "carbon_g_per_kwh" in inputs:
        carbon = inputs["carbon_g_per_kwh"]
        said.append(f"{format_si(carbon['value'], digits=4)} gCO2e/kWh ({carbon['source']})")
    if "price_per_kwh" in inputs:
        price = inputs["price_per_kwh"]
        said.append(f"{price['value']:g} {price['currency'] or ''}".rstrip() + "/kWh")
    return f"{', '.join(said)}; of a request {costs['request_energy']}"


def _fit_lines(fit: dict[str, Any]) -> list[str]:
    """One instance's meter, idle power and model."""

    def percent(key: str) -> str:
        return "-" if fit[key] is None else f"{100 * fit[key]:.2f} %"

    name = "unused GPUs" if fit["instance"] is None else f"instance {fit['instance']}"
    idle = fit["idle_power_w"]
    mismatch = fit["samples_over_counter_rel"]
    agree = "" if mismatch is None else f", samples {100 * mismatch:+z.2f} % against the counter"
    rest = f"idle {idle['before']:,.1f} to {idle['after']:,.1f} W"
    lines = [f"{name}: {plural(fit['gpus'], 'GPU')} by {fit['energy_source']}{agree}; {rest}"]
    if fit["model"]:
        lines.append(
            f"  {fit['model']} model on {fit['steps']:,} steps and {fit['sensor_windows']:,} sensor windows: residuals "
            f"{percent('duration_rel_rms')} in time, {percent('power_rel_rms')} in power, "
            f"{percent('block_misfit_rel')} between blocks"
        )
    if fit.get("capped_steps"):
        lines.append(f"  a power cap was seen to hold clocks down in {fit['capped_steps']:,} steps, priced by that")
    return lines
