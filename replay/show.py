"""A run's summary as one screen for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from replay.stream import printable
from tracegen.console import plural

_IN_FIGURES = " (answered: in the latencies)"
_MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


def lines(summary: dict[str, Any]) -> list[str]:
    """`summary` as lines: what was run, how it ended, what was measured; verdicts last, and whether it is valid."""
    s, error = summary, _client_error(summary)
    mark = "SIMULATED  " if s["simulated"] else ""
    lasted = f", {s['energy_why']}" if s["seconds"] is None else f" in {s['seconds']:.1f} s"
    model = printable(str(s["model"]))  # an attached server's may be any text
    planned = "? requests" if s["requests_planned"] is None else plural(s["requests_planned"], "request")
    result = [
        f"{mark}{'killed' if s['killed'] else s['state']}: {s['requests_ok']:,} of {planned} ok{lasted}{_paused(s)}",
        f"run     {Path(s['trace']).name} on {model}; {'virtual time' if s['virtual_time'] else s['begun']}",
        f"node    {_node(s)}",
    ]
    if s["warmup_s"]:
        sent = plural(s["warmup_requests"], "request")
        result.append(f"warmup  {sent} due in the first {s['warmup_s']:g} s, in none of the figures{_held_back(s)}")
    if s["failure"]:
        result.append(f"failed  {s['failure']}")
    result += [
        f"status  {_statuses(s)}",
        f"rate    asked for {_rps(s['target_rps'])}, sent {_rps(s['sent_rps'])}",
        *(_latency(name, s[f"{name.lower()}_ms"], error) for name in ("TTFT", "ITL", "TPOT", "E2EL")),
    ]
    if error is not None:
        late = ", ".join(f"{q} {value:,.3f} ms" for q, value in error.items())
        result.append(f"client  adds at most {late} to TTFT and ITL ({s['client_error']['source']})")
    if s["output_tokens_per_s"] is not None:
        result.append(f"output  {s['output_tokens']:,} tokens, {s['output_tokens_per_s']:,.1f} tokens/s")
    return [*result, *_energy(s), *_verdicts(s)]


def _node(s: dict[str, Any]) -> str:
    """What it was run on: node or engine, GPUs, clock, power cap."""
    on = s["hardware"] or f"engine {s['engine']}"
    size = f"TP {s['tp']}" + (f" x {s['replicas']}" if s["replicas"] > 1 else "")
    gpus = f"GPU{'s' * (len(s['gpus']) > 1)} {_ranges(s['gpus'])}" if s["gpus"] else "GPUs not known"
    cap = f", {s['power_cap_w']:g} W at most" if s["power_cap_w"] else ""
    return f"{on}, {size}, {gpus}, {_clock(s)}{cap}"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as `--gpus` takes them: `0,2-4`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _clock(s: dict[str, Any]) -> str:
    clock = f"{s['freq_mhz']} MHz" if s["freq_mhz"] else "the driver's clocks"
    return clock if s["freq_asked_mhz"] == s["freq_mhz"] else f"{clock} (asked for: {s['freq_asked_mhz']} MHz)"


def _paused(s: dict[str, Any]) -> str:
    return f", {s['paused_s']:.1f} s of them paused" if s["paused_s"] else ""


def _held_back(s: dict[str, Any]) -> str:
    """How much of the measured time went to the warm-up's own requests, where a cap sent them late."""
    count = s["warmup_held_back"]
    return f"; the cap sent {count:,} of them only after it, before those that are measured" if count else ""


def _statuses(s: dict[str, Any]) -> str:
    """Requests by status, those without a record last."""
    counts = s["statuses"].items()
    said = [f"{count:,} {status}{_IN_FIGURES * (status == 'length_mismatch')}" for status, count in counts]
    unsent = (s["requests_planned"] or 0) - sum(s["statuses"].values())
    return ", ".join([*said, *[f"{unsent:,} without a record"] * (unsent > 0)]) or "nothing on record"


def _rps(rps: float | None) -> str:
    return "-" if rps is None else f"{rps:,.4g} requests/s"


def _client_error(s: dict[str, Any]) -> dict[str, float] | None:
    """How far the client's own times may be off, ms; None where it is not known."""
    return (s["client_error"] or {}).get("ttft_ms")


def _latency(name: str, ms: dict[str, float] | None, error: dict[str, float] | None) -> str:
    """Percentiles, and beside those between two times of the client what it may itself have added.

    It is estimated for TTFT, of which both ends are known less exactly than the two ends of a gap between tokens.
    """
    if ms is None:
        why = "no answer tells how many tokens its chunks have" if name == "ITL" else "known of no answer"
        return f"{name:<8}{why}"
    shown = f"{name:<8}" + "   ".join(f"{q} {value:,.1f} ms" for q, value in ms.items())
    if error is not None and name in {"TTFT", "ITL"}:
        shown += f"   ±{error['p99']:,.2f} ms"
    return shown


def _energy(s: dict[str, Any]) -> list[str]:
    """What the counters say, and idle power around the run."""
    if s["energy_j"] is None:
        result = [f"energy  not measured: {s['energy_why']}"]
    else:
        shown = f"{s['energy_j'] / 1e3:,.2f} kJ, mean {s['mean_power_w']:,.0f} W"
        result = [f"energy  {shown}, by the energy counters of {plural(len(s['gpus']), 'GPU')}"]
    idle = [(s["idle_power_w"], "before"), (s["idle_power_after_w"], "after")]
    known = [f"{watts:,.0f} W {when}" for watts, when in idle if watts is not None]
    return [*result, f"idle    {', '.join(known)}"] if known else result


def _verdicts(s: dict[str, Any]) -> list[str]:
    if s["valid"] is None:
        if s["killed"]:
            return [f"not judged: the run was killed (state: {s['state']}); {s['what_now']}"]
        return [f"not judged: the run goes on (state: {s['state']})"]
    shown = [f"  {_MARKS[v['ok']]}  {v['name']:<15} {v['why']}" for v in s["verdicts"]]
    last = "valid: no bound is broken" if s["valid"] else f"invalid: {'; '.join(s['invalid_because'])}"
    return ["verdicts", *shown, last]
