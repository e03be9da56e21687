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
import polars as pl

from replay.clock import NS_PER_MS
from replay.gpu.baseline import fell_back
from tracegen.console import plural

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_WORDS = 80  # characters of a server's own words
LAG_BOUND_MS = 10.0  # p99; a fiftieth of the tightest usual TTFT target
STALL_BOUND_MS = 100.0
ERROR_BOUND = 0.01  # above it p99 of latency is unknown: what was lost could have been all of the slowest hundredth
OFFSET_BOUND_MS = 1.0  # a tenth of what requests may lag: below it no other bound can tell
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


def dispatch_lag(requests: pl.DataFrame) -> Verdict:
    """Whether requests left when the trace said: p99 of send - schedule, ms, between neighbours as in all latencies."""
    lag_ms = (requests["sent_ns"] - requests["scheduled_ns"]).drop_nulls() / NS_PER_MS
    if lag_ms.is_empty():
        return Verdict("dispatch_lag", False, None, LAG_BOUND_MS, "no request was sent")
    p50, p99, worst = (float(lag_ms.quantile(q, "linear") or 0.0) for q in (0.5, 0.99, 1.0))
    why = f"p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {worst:.2f} ms after schedule"
    return Verdict("dispatch_lag", p99 <= LAG_BOUND_MS, p99, LAG_BOUND_MS, why)


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


def error_rate(requests: pl.DataFrame, planned: int) -> Verdict:
    """Whether the trace's requests were answered in full: the share of those that were not, unsent ones too."""
    ok = requests.filter(pl.col("status") == "ok").height
    bad = requests.filter(pl.col("status") != "ok")
    unsent = planned - requests.height
    others = [_of_status(of) for of in sorted(bad.partition_by("status"), key=lambda of: -of.height)]
    return errors(ok, planned, others + [f"{unsent:,} not sent"] * (unsent > 0))


def _of_status(requests: pl.DataFrame) -> str:
    """How many requests ended with one status, and what was said most often of why."""
    text = f"{requests.height:,} {requests['status'][0]}"
    code = pl.when(pl.col("http_status") != 200).then(pl.col("http_status").cast(pl.String))
    words = pl.concat_str(code, "error", separator=" ", ignore_nulls=True)
    said = requests.select(words.alias("said"))["said"].replace("", None).drop_nulls()
    if said.is_empty():
        return text
    commonest = str(said.value_counts(sort=True)["said"][0])
    return f"{text} ({commonest if len(commonest) <= MOST_WORDS else f'{commonest[:MOST_WORDS]}...'})"


def errors(ok: int, planned: int, others: Sequence[str]) -> Verdict:
    """`error_rate` from the count of good requests; `others` says what became of the rest."""
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


def lengths_exact(requests: pl.DataFrame, trace: pl.DataFrame) -> Verdict:
    """Whether the server counted as many tokens as the trace asks for, in and out."""
    counted = requests.filter(pl.col("output_tokens").is_not_null() & pl.col("status").is_in(["ok", "length_mismatch"]))
    if counted.is_empty():
        return Verdict("lengths_exact", None, None, 0.0, "the server sent no usage, so lengths are unknown")
    wanted = trace.select("request_id", pl.col("input_tokens").alias("input_wanted"))
    both = counted.join(wanted, on="request_id", how="inner")
    wrong = both.filter(
        (pl.col("output_tokens") != pl.col("output_tokens_wanted")) | (pl.col("input_tokens") != pl.col("input_wanted"))
    ).height
    return lengths(wrong, both.height)


def lengths(wrong: int, requests: int) -> Verdict:
    """`lengths_exact` from the count of requests, and of those that differ from the trace."""
    why = f"{wrong:,} of {plural(requests, 'request')} differ from the trace in input or output tokens"
    return Verdict("lengths_exact", wrong == 0, float(wrong), 0.0, why)


def saturated(requests: pl.DataFrame, *, capped: bool = False) -> Verdict:
    """Whether the server kept up: requests that wait for their first token must not pile up while sending.

    The value is the growth of that backlog (least squares over the sending window) as a share of the arrival rate;
    with arrivals at rate λ and first tokens at rate μ < λ it is 1 - μ/λ. `capped`: requests were held back, so that
    those that pile up do not wait in the server.
    """
    if capped:
        late = pl.col("sent_ns").is_null() | (pl.col("sent_ns") > pl.col("scheduled_ns").max())
        held = plural(requests.filter(late).height, "request")
        why = f"not known: closed by cap, which still held back {held} when the last was due"
        return Verdict("saturated", None, None, BACKLOG_GROWTH_BOUND, why)
    # A request that failed before its first token waits no longer, nor does one that was answered without a token.
    none = pl.col("first_token_ns").is_null()
    failed = none & pl.col("status").is_in(["http_error", "connect_error", "stream_error"])
    answered = none & pl.col("status").is_in(["ok", "length_mismatch"])
    requests = requests.filter(~failed)
    if requests.height and requests.select(answered.all()).item():
        why = "not known: no token has a time, so nobody knows who waited for one"
        return Verdict("saturated", None, None, BACKLOG_GROWTH_BOUND, why)
    begun = requests.select(pl.when(answered).then("done_ns").otherwise("first_token_ns")).to_series()
    sent = np.sort(requests["sent_ns"].drop_nulls().to_numpy())
    first = np.sort(begun.drop_nulls().to_numpy())
    at_ns = backlog_grid_ns(sent[0], sent[-1]) if len(sent) else np.zeros(1)
    waiting = np.searchsorted(sent, at_ns, "right") - np.searchsorted(first, at_ns, "right")
    return saturation(len(sent), at_ns, waiting)


def backlog_grid_ns(first_ns: int, last_ns: int) -> FloatArray:
    """When `saturated` counts who waits for a first token, where requests are sent from `first_ns` to `last_ns`."""
    return np.linspace(first_ns, last_ns, 200)


def saturation(sent: int, at_ns: FloatArray, waiting: IntArray) -> Verdict:
    """`saturated` from how many requests were `waiting` at each moment of its grid, of as many as were `sent`."""
    if sent < 20 or at_ns[0] == at_ns[-1]:
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


def clocks_held(
    power: pl.DataFrame | None, gpus: Sequence[int], locked_mhz: int | None, held_mhz: float | None = None
) -> Verdict:
    """Whether the SM clocks stayed where they were locked; `held_mhz`: the highest held under load, where known."""
    if locked_mhz is None:
        return Verdict("clocks_held", None, None, None, "clocks were not locked (no --freq)")
    readings = None if power is None else power.filter(pl.col("gpu").is_in(gpus) & pl.col("sm_clock_mhz").is_not_null())
    if readings is None or readings.is_empty():
        return Verdict("clocks_held", False, None, CLOCK_BOUND, "no clock was read")
    off = (readings["sm_clock_mhz"].cast(pl.Int64) - locked_mhz).abs() > CLOCK_TOLERANCE_MHZ
    reasons = 0
    for value in readings["throttle_reasons"].drop_nulls().unique():
        reasons |= value
    return clocks(locked_mhz, int(off.sum()), off.len(), reasons, held_mhz)


def clocks(locked_mhz: int, off: int, readings: int, reasons: int, held_mhz: float | None = None) -> Verdict:
    """`clocks_held` from the count of readings and of those that were off; `reasons`: NVML's bits in any of them."""
    share = 1 - off / readings
    named = throttle_reasons(reasons)
    if held_mhz is not None and held_mhz < locked_mhz:
        named.append(f"under load this GPU holds {held_mhz:.0f} MHz at most")
    why = f"{percent(share)} of readings within {CLOCK_TOLERANCE_MHZ} MHz of {locked_mhz} MHz"
    return Verdict("clocks_held", share >= CLOCK_BOUND, share, CLOCK_BOUND, why + "".join(f"; {n}" for n in named))


def throttle_reasons(bits: int | None) -> list[str]:
    """The names of NVML's reasons in `bits`."""
    return [name for bit, name in THROTTLE_REASONS.items() if (bits or 0) & bit]


def sensor_alive(power: pl.DataFrame | None, gpus: Sequence[int], start_ns: int, end_ns: int) -> Verdict:
    """Whether power was read all the time: the share of the window not more than 0.5 s from a reading.

    A GPU that was polled but told no power, for it was lost, was not read.
    """
    if power is None or not gpus:
        return Verdict("sensor_alive", None, None, None, "no power was read: name the server's GPUs with --gpus")
    told = power.filter(~pl.all_horizontal(pl.col("power_instant_mw", "power_average_mw", "energy_mj").is_null()))
    worst, silent = 1.0, ""
    for gpu in gpus:
        t = told.filter((pl.col("gpu") == gpu) & pl.col("t_ns").is_between(start_ns, end_ns))["t_ns"].sort().to_numpy()
        times = np.concatenate([[start_ns], t, [end_ns]])
        gaps = np.diff(times)
        share = 1 - float(gaps[gaps > SENSOR_GAP_NS].sum()) / max(1, end_ns - start_ns)
        if share < SENSOR_BOUND:
            longest = int(np.argmax(gaps))
            since_s, until_s = ((times[i] - start_ns) / 1e9 for i in (longest, longest + 1))
            silent += f"; GPU {gpu} was not read from {since_s:.1f} s to {until_s:.1f} s of the run"
        worst = min(worst, share)
    return coverage(worst, silent)


def coverage(worst: float, silent: str = "") -> Verdict:
    """`sensor_alive` from the share of the window that is covered on the GPU that was read worst."""
    why = f"{percent(worst)} of the run is covered by readings no more than 0.5 s apart{silent}"
    return Verdict("sensor_alive", worst >= SENSOR_BOUND, worst, SENSOR_BOUND, why)


def counter_agrees(power: pl.DataFrame | None, gpus: Sequence[int], start_ns: int, end_ns: int) -> Verdict:
    """Whether the energy counter and the samples of power tell of the same energy: relative difference."""
    name = "counter_agrees"
    if power is None or not gpus:
        return Verdict(name, None, None, None, "no power was read")
    inside = power.filter(pl.col("gpu").is_in(gpus) & pl.col("t_ns").is_between(start_ns, end_ns)).sort("t_ns")
    inside = inside.filter(pl.col("energy_mj").is_not_null() & pl.col("power_instant_mw").is_not_null())
    counter_j = sampled_j = 0.0
    for readings in inside.partition_by("gpu"):
        if fell_back(readings["energy_mj"]):
            why = f"the energy counter of GPU {readings['gpu'][0]} fell back (wrap-around or reset): it tells no energy"
            return Verdict(name, False, None, COUNTER_BOUND, why)
        # From one update of the counter to another: between two it stands still while power is drawn.
        updates = (readings["energy_mj"] != readings["energy_mj"].shift(1)).fill_null(value=False).arg_true()
        if updates.is_empty():
            continue
        frame = readings[updates[0] : updates[-1] + 1]
        t_s = frame["t_ns"].to_numpy() / 1e9
        watts = frame["power_instant_mw"].to_numpy() / 1e3
        # A reading stands for the time since the one before it.
        sampled_j += float((watts[1:] * np.diff(t_s)).sum())
        counter_j += (frame["energy_mj"][-1] - frame["energy_mj"][0]) / 1e3
    return counter(counter_j, sampled_j)


def counter(counter_j: float, sampled_j: float) -> Verdict:
    """`counter_agrees` from the energy that either tells of."""
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


def steps_complete(steps: pl.DataFrame | None, segments: pl.DataFrame | None, requests: pl.DataFrame) -> Verdict:
    """Whether every engine step is recorded and explains every token: the count of what is missing."""
    name = "steps_complete"
    if steps is None or segments is None:
        return Verdict(name, None, None, None, "no engine steps: membership is rebuilt from client times")
    gaps = 0
    for frame in steps.partition_by("instance"):
        numbers = frame["step"].to_numpy()
        gaps += int(numbers.max() - numbers.min()) + 1 - frame.height
    tokens = (pl.col("last_step") - pl.col("first_step") + 1).cast(pl.Int64) * pl.col("tokens_per_step")
    scheduled = (
        segments.filter(pl.col("request_id").is_not_null()).group_by("request_id").agg(tokens.sum().alias("tokens"))
    )
    # A request's last output token is never scheduled: prompt + outputs - 1 tokens pass through the engine,
    # less what the prefix cache held, and more if a preemption made it compute again.
    need = pl.col("input_tokens").cast(pl.Int64) + pl.col("output_tokens") - 1 - pl.col("cached_tokens").fill_null(0)
    ok = requests.filter((pl.col("status") == "ok") & pl.col("input_tokens").is_not_null()).join(
        scheduled, on="request_id", how="left"
    )
    short = ok.filter(pl.col("tokens").fill_null(0) < need).height
    return completeness(steps.height, gaps, short, ok.height)


def completeness(steps: int, gaps: int, short: int, requests: int) -> Verdict:
    """`steps_complete` from the steps' count, those missing, and the requests of which a token was in no step."""
    name = "steps_complete"
    of = plural(requests, "request")
    why = f"{plural(steps, 'step')}; {gaps:,} missing; {short:,} of {of} with tokens in no step"
    return Verdict(name, gaps == 0 and short == 0, float(gaps + short), 0.0, why)
