"""A run's verdicts on itself: can its figures be trusted, and if not, why.

Each verdict has a value and the bound that it is held against; `ok` is None where the question does not arise, with
the reason in `why`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from replay.clock import NS_PER_MS
from tracegen.console import plural

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_WORDS = 80  # characters of a server's own words
LAG_BOUND_MS = 10.0  # p99; a fiftieth of the tightest usual TTFT target
STALL_BOUND_MS = 100.0
ERROR_BOUND = 0.01  # above it p99 of latency is unknown: what was lost could have been all of the slowest hundredth
OFFSET_BOUND_MS = 1.0  # a tenth of what requests may lag: below it no other bound can tell
MOMENT_NS = 100 * NS_PER_MS  # about the first token of a large model: within less, none could come
STEP_NS = 10 * NS_PER_MS  # of the wall clock; NTP slews both clocks alike, so less is the time between two readings
SENSOR_GAP_NS = 500 * NS_PER_MS  # readings farther apart leave what lies between unread
SENSOR_BOUND = 0.95  # share of the sensor's updates that were seen
CLOCK_BOUND = 0.99  # share of the readings at the clock asked for
CLOCK_TOLERANCE_MHZ = 15  # one step of the grid that NVIDIA clocks stand on
COUNTER_BOUND = 0.05  # published gain error of the sensors ("Part-time Power Measurements", SC'24)
BACKLOG_GROWTH_BOUND = 0.05  # share of the arrivals that pile up
BACKLOG_MIN = 5.0  # requests; fewer are chance

# NVML's throttle reasons; idle and application settings are no throttling.
THROTTLE_REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True)
class Verdict:
    """One question about a run and its answer."""

    name: str
    ok: bool | None
    value: float | None
    bound: float | None
    why: str


def percent(share: float) -> str:
    """A share as `12.3%`; what rounds to none has no sign."""
    return f"{round(share, 3) + 0.0:.1%}"


def lag(late_ms: tuple[float, float, float] | None) -> Verdict:
    """Whether requests left when the trace said: p99 of send - schedule, ms, between neighbours as in all latencies.

    `late_ms`: p50, p99 and the greatest; None where no request was sent.
    """
    name = "dispatch_lag"
    if late_ms is None:
        return Verdict(name, False, None, LAG_BOUND_MS, "no request was sent")
    p50, p99, worst = late_ms
    why = f"p50 {p50:,.2f} ms, p99 {p99:,.2f} ms, max {worst:,.2f} ms after schedule"
    return Verdict(name, p99 <= LAG_BOUND_MS, p99, LAG_BOUND_MS, why)


def loop_stall(late_ns: Sequence[int] | None) -> Verdict:
    """Whether the client itself held nothing up: the event loop's worst delay, ms; None where nobody can say."""
    if not late_ns:
        why = (
            "the run was too short to measure it" if late_ns is not None else "not known: replay was killed at the end"
        )
        return Verdict("loop_stall", None, None, STALL_BOUND_MS, why)
    worst = max(late_ns) / NS_PER_MS
    why = f"event loop late by p99 {np.quantile(late_ns, 0.99) / NS_PER_MS:.2f} ms, max {worst:.2f} ms"
    return Verdict("loop_stall", worst <= STALL_BOUND_MS, worst, STALL_BOUND_MS, why)


def open_loop(max_concurrency: int | None, max_rate_rps: float | None) -> Verdict:
    """Whether sending depended on the trace alone."""
    asked = {"--max-concurrency": max_concurrency, "--max-rate": max_rate_rps}
    caps = [f"{name} {cap:g}" for name, cap in asked.items() if cap is not None]
    why = f"closed by cap: {', '.join(caps)}" if caps else "send times come from the trace alone"
    return Verdict("open_loop", not caps, None, None, why)


def validity(state: str, judged: Sequence[Verdict], failure: str | None = None) -> dict[str, Any]:
    """The manifest's `valid` and `invalid_because`: a run is valid when it is complete and no verdict is against it.

    `failure`: what ended a failed run.
    """
    because = []
    if state != "complete":
        ended = {"interrupted": "was interrupted", "failed": "failed"}.get(state, "has not ended")
        because.append(f"the run {ended}" + (f": {failure}" if failure else ""))
    because += [f"{verdict.name}: {verdict.why}" for verdict in judged if verdict.ok is False]
    return {"valid": not because, "invalid_because": because}


def worst(judged: Sequence[Verdict]) -> Verdict:
    """Of the same verdict on several stretches of a run one that is against it, else one that tells."""
    return min(judged, key=lambda verdict: (verdict.ok is not False, verdict.ok is None))


def errors(ok: int, planned: int, others: Sequence[str]) -> Verdict:
    """Whether the trace's requests were answered in full: the share of those that were not, unsent ones too.

    `ok` of as many as were `planned`; `others` says what became of the rest.
    """
    if not planned:
        return Verdict("error_rate", None, None, ERROR_BOUND, "every request was due in the warm-up")
    why = f"{ok:,} of {plural(planned, 'request')} ok" + (f": {', '.join(others)}" if others else "")
    share = (planned - ok) / planned
    return Verdict("error_rate", share <= ERROR_BOUND, share, ERROR_BOUND, why)


def clock_offset(hosts: Sequence[Mapping[str, Any]], anchors: Sequence[Mapping[str, int]]) -> Verdict:
    """Whether the hosts' clocks are known to each other well enough: the greatest error of an offset, ms.

    `anchors`: the manifest's; a wall clock that was set during the run is told of, for no time in a table is its.
    """
    name = "clock_offset"
    worst = max((float(entry["offset_error_ns"]) for entry in hosts), default=0.0) / NS_PER_MS
    why = "all times are of one host's clock" if len(hosts) < 2 else f"{len(hosts)} hosts' clocks, to {worst:.3f} ms"
    ahead_ns = [anchor["unix_ns"] - anchor["monotonic_ns"] for anchor in anchors]
    stepped = [after - before for before, after in pairwise(ahead_ns) if abs(after - before) > STEP_NS]
    if stepped:
        why += f"; the wall clock was set by {sum(stepped) / 1e9:+,.2f} s meanwhile, which no figure depends on"
    return Verdict(name, worst <= OFFSET_BOUND_MS, worst, OFFSET_BOUND_MS, why)


def lengths(wrong: int, requests: int) -> Verdict:
    """Whether the server counted as many tokens as the trace asks for, in and out.

    From the count of requests of which it told, and of those that differ from the trace.
    """
    why = f"{wrong:,} of {plural(requests, 'request')} differ from the trace in input or output tokens"
    return Verdict("lengths_exact", wrong == 0, float(wrong), 0.0, why)


def no_usage() -> Verdict:
    """`lengths` where the server told none."""
    return Verdict("lengths_exact", None, None, 0.0, "the server sent no usage, so lengths are unknown")


def backlog_grid_ns(first_ns: int, last_ns: int) -> FloatArray:
    """When `saturation` counts who waits for a first token, where requests are sent from `first_ns` to `last_ns`."""
    return np.linspace(first_ns, last_ns, 200)


def saturation(sent: int, at_ns: FloatArray, waiting: IntArray) -> Verdict:
    """Whether the server kept up: requests that wait for their first token must not pile up while sending.

    From how many were `waiting` at each moment of the grid, of as many as were `sent`. The value is the growth of that
    backlog (least squares over the sending window) as a share of the arrival rate; with arrivals at rate λ and first
    tokens at rate μ < λ it is 1 - μ/λ.
    """
    if sent < 20 or at_ns[-1] - at_ns[0] < MOMENT_NS:
        why = "not known: fewer than 20 requests, or all sent at one moment, tell nothing"
        return Verdict("saturated", None, None, BACKLOG_GROWTH_BOUND, why)
    at_s = (at_ns - at_ns[0]) / 1e9
    rate = (sent - 1) / at_s[-1]
    slope = np.polyfit(at_s, waiting, 1)[0]
    growth = float(slope / rate)
    full = growth > BACKLOG_GROWTH_BOUND and slope * at_s[-1] > BACKLOG_MIN
    left = plural(int(waiting[-1]), "request")
    why = f"{'' if full else 'not saturated: '}{left} waited at the last send; grew by {percent(growth)} of arrivals"
    return Verdict("saturated", not full, growth, BACKLOG_GROWTH_BOUND, why)


def held_back(requests: int) -> Verdict:
    """`saturation` where a cap held `requests` back: those that pile up do not wait in the server."""
    why = f"not known: closed by cap, which still held back {plural(requests, 'request')} when the last was due"
    return Verdict("saturated", None, None, BACKLOG_GROWTH_BOUND, why)


def untimed() -> Verdict:
    """`saturation` of answers without times."""
    why = "not known: no token has a time, so nobody knows who waited for one"
    return Verdict("saturated", None, None, BACKLOG_GROWTH_BOUND, why)


def clocks(locked_mhz: int | None, off: int, readings: int, reasons: int, held_mhz: float | None = None) -> Verdict:
    """Whether the SM clocks stayed where they were locked, from the count of readings and of those that were off.

    `reasons`: NVML's bits in any of them; `held_mhz`: the highest clock held under load, where known.
    """
    if locked_mhz is None:
        return Verdict("clocks_held", None, None, None, "clocks were not locked (no --freq)")
    if not readings:
        return Verdict("clocks_held", False, None, CLOCK_BOUND, "no clock was read")
    share = 1 - off / readings
    named = throttle_reasons(reasons)
    if held_mhz is not None and held_mhz < locked_mhz:
        named.append(f"under load this GPU holds {held_mhz:.0f} MHz at most")
    why = f"{percent(share)} of readings within {CLOCK_TOLERANCE_MHZ} MHz of {locked_mhz} MHz"
    return Verdict("clocks_held", share >= CLOCK_BOUND, share, CLOCK_BOUND, why + "".join(f"; {n}" for n in named))


def throttle_reasons(bits: int | None) -> list[str]:
    """The names of NVML's reasons in `bits`."""
    return [name for bit, name in THROTTLE_REASONS.items() if (bits or 0) & bit]


def coverage(worst: float, silent: str = "") -> Verdict:
    """Whether power was read all the time: the share of the window not more than 0.5 s from a reading.

    On the GPU that was read worst; `silent`: when it was not.
    """
    why = f"{percent(worst)} of the run is covered by readings no more than 0.5 s apart{silent}"
    return Verdict("sensor_alive", worst >= SENSOR_BOUND, worst, SENSOR_BOUND, why)


def unread() -> Verdict:
    """`coverage` where there was nothing to read."""
    return Verdict("sensor_alive", None, None, None, "no power was read: name the server's GPUs with --gpus")


def uncounted() -> Verdict:
    """`counter` where there was nothing to read."""
    return Verdict("counter_agrees", None, None, None, "no power was read")


def counter_fell(gpu: int) -> Verdict:
    """`counter` where that of `gpu` went back."""
    why = f"the energy counter of GPU {gpu} fell back (wrap-around or reset): it tells no energy"
    return Verdict("counter_agrees", False, None, COUNTER_BOUND, why)


def counter(counter_j: float, sampled_j: float) -> Verdict:
    """Whether the energy counter and the samples of power tell of the same energy: relative difference."""
    name = "counter_agrees"
    if counter_j <= 0:
        return Verdict(name, None, None, COUNTER_BOUND, "the GPU has no energy counter, or no instant power")
    off = abs(sampled_j - counter_j) / counter_j
    why = f"counter {counter_j:,.0f} J, samples {sampled_j:,.0f} J"
    return Verdict(name, off <= COUNTER_BOUND, off, COUNTER_BOUND, why)


def idle_measured(before: Sequence[dict[str, float]], after: Sequence[dict[str, float]]) -> Verdict:
    """Whether idle power is known on both sides of the run: the count of GPUs where it is not."""
    if not before:
        return Verdict("idle_measured", None, None, None, "no power was read")
    lacking = {"before": sum(not b for b in before), "after": sum(not a for a in after)}
    missing = sum(lacking.values())
    where = " and ".join(when for when, count in lacking.items() if count)
    why = f"idle power is missing {where} the run" if missing else "idle power measured before and after the run"
    return Verdict("idle_measured", missing == 0, float(missing), 0.0, why)


def no_steps() -> Verdict:
    """`completeness` where no steps are on record."""
    why = "no engine steps: membership is rebuilt from client times"
    return Verdict("steps_complete", None, None, None, why)


def completeness(steps: int, gaps: int, short: int, requests: int) -> Verdict:
    """Whether every engine step is recorded and explains every token: the count of what is missing.

    From the steps' count, those missing between the first and the last, and the requests of which a token was in none.
    """
    name = "steps_complete"
    of = plural(requests, "request")
    why = f"{plural(steps, 'step')}; {gaps:,} missing; {short:,} of {of} with tokens in no step"
    return Verdict(name, gaps == 0 and short == 0, float(gaps + short), 0.0, why)
