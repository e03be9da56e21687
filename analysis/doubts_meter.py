"""Doubts about what was measured: idle power, holes, counter, clocks, throttling."""

from typing import Any

from analysis.counter import UNREAD
from analysis.evidence import CONCERNED, DOUBT, ERROR, OK, UNKNOWN, Doubt, Evidence
from analysis.idle import UNKNOWN_REL
from analysis.load import HOLE_S, NS_PER_S
from analysis.manifest import MOST_BOARD_W, gpu_entry, pauses_ns
from analysis.patches import EDGE_S
from analysis.stretches import AT_CAP_REL, OFF_CLOCK_REL
from replay.rundir import MANIFEST
from tracegen.console import plural

NO_ENERGY = "no energy is attributed"
CAP_TIMES = 3.0  # boards regulate to their cap in the mean; what is so far above is of another unit


def idle_baseline(case: Evidence) -> Doubt:
    """Whether idle power was measured before and after, by the energy's own source.

    The size: an idle power measured once is trusted to 2 % (`analysis.idle`), over the whole window.
    """
    name = "idle_baseline"
    if not case.fits:
        return Doubt(name, UNKNOWN, NO_ENERGY)
    missing = {when: _without(case, key) for when, key in (("before", "idle_power_w"), ("after", "idle_power_after_w"))}
    gpus = plural(len(case.gpus), "GPU")
    remarks = [f"none {when} the run for {count} of {gpus}" for when, count in missing.items() if count]
    off_j = 0.0
    for fit in case.fits:
        idle = fit.get("idle_power_w") or {}
        foreign = idle.get("source") not in {None, fit.get("energy_source")}
        if foreign:
            remarks.append(f"{_instance(fit)}: idle power is by {idle['source']}, energy by {fit['energy_source']}")
        excess_j = _level_w(idle) * _duration_s(case) - float(fit["measured_j"])
        if excess_j > 0:
            remarks.append(f"{_instance(fit)}: idle power of {_level_w(idle):,.1f} W is above what it drew in the mean")
            off_j += excess_j
        elif foreign or any(missing.values()):
            off_j += UNKNOWN_REL * _level_w(idle) * _duration_s(case)
    if not remarks:
        level_w = sum(_level_w(fit.get("idle_power_w") or {}) for fit in case.fits)
        return Doubt(name, OK, f"measured before and after the run, {level_w:,.1f} W in all", 0.0, ERROR)
    do = f"replay with an idle baseline before and after, or write idle_power_w and idle_power_after_w in {MANIFEST}"
    return case.sized(name, off_j, ERROR, "; ".join(remarks), do)


def idle_drift(case: Evidence) -> Doubt:
    """How far idle power moved during the run.

    Between its two measurements it is taken to go in a straight line; where it jumped at one end instead, half the
    difference is wrong all the time, idle or busy.
    """
    name = "idle_drift"
    known = [fit["idle_power_w"] for fit in case.fits if (fit.get("idle_power_w") or {}).get("before") is not None]
    if not known or _without(case, "idle_power_w") or _without(case, "idle_power_after_w"):
        return Doubt(name, UNKNOWN, "idle power is not known on both sides of the run")
    before_w, after_w = (float(sum(idle[when] for idle in known)) for when in ("before", "after"))
    off_j = sum(abs(idle["after"] - idle["before"]) for idle in known) / 2 * _duration_s(case)
    why = f"idle power went from {before_w:,.1f} to {after_w:,.1f} W"
    do = "warm the GPUs up before the baseline is taken, and take it longer"
    return case.sized(name, off_j, ERROR, why, do)


def sensor_gaps(case: Evidence) -> Doubt:
    """Stretches without a reading, at the mean power of the GPU that was not read."""
    name = "sensor_gaps"
    if case.readings is None:
        return Doubt(name, UNKNOWN, "no power was read in the window")
    holes = case.readings.holes
    why = f"no stretch of more than {HOLE_S} s without a reading"
    if holes.count:
        why = f"{holes.count} holes of more than {HOLE_S} s, {holes.seconds:.1f} GPU-seconds in all, "
        why += f"the longest {case.readings.longest_hole_s:.1f} s"
    if case.readings.paused_s:
        why += f"; {case.readings.paused_s:.1f} GPU-seconds that the run lay paused by --resume are none"
    do = "look for what held the sampler up; replay on a machine that is less busy"
    return case.sized(name, holes.joules, ERROR, why, do)


def failed_polls(case: Evidence) -> Doubt:
    """Polls that brought no value, as of a GPU that fell off the bus."""
    name = "failed_polls"
    if case.readings is None:
        return Doubt(name, UNKNOWN, "no power was read in the window")
    failed, polls = case.readings.failed, case.readings.failed + case.readings.whole.count
    if not failed:
        return Doubt(name, OK, f"none of {polls:,} polls failed", 0.0, CONCERNED)
    why = f"{failed:,} of {polls:,} polls brought no value"
    joules = case.readings.whole.joules * failed / polls
    return case.sized(name, joules, CONCERNED, why, "look at the driver's log: was the GPU reset, or lost?")


def counter_agrees(case: Evidence) -> Doubt:
    """How far counter and samples of power are apart, where both were read: one of them is wrong by that."""
    name = "counter_agrees"
    known = [fit for fit in case.fits if fit.get("samples_over_counter_rel") is not None]
    if not known:
        return Doubt(name, UNKNOWN, "there are not both, counter and samples, to compare")
    off_j = sum(abs(fit["samples_over_counter_rel"]) * fit["measured_j"] for fit in known)
    why = "samples against the counter: " + ", ".join(
        f"{_instance(fit)} {100 * fit['samples_over_counter_rel']:+.2f} % over {_compared_s(case, fit):.1f} s"
        for fit in known
    )
    why += f" of {_duration_s(case):.1f} s, where both were read"
    return case.sized(name, off_j, ERROR, why, "compare both with an external meter (replay --power csv:FILE)")


def board_power(case: Evidence) -> Doubt:
    """Whether the mean power of a GPU can be at all, or its readings are of another unit.

    The bound: `CAP_TIMES` its power cap where it was given one, else what no board draws.
    """
    name = "board_power"
    if not case.fits:
        return Doubt(name, UNKNOWN, NO_ENERGY)
    bounds_w = [MOST_BOARD_W if gpu.cap_w is None else CAP_TIMES * gpu.cap_w for gpu in case.gpus]
    bound_w = max(bounds_w, default=MOST_BOARD_W)
    mean_w = {_instance(fit): float(fit["measured_j"]) / fit["gpus"] / _duration_s(case) for fit in case.fits}
    said = [f"{who}: a GPU drew {watts:,.0f} W in the mean" for who, watts in mean_w.items() if watts > bound_w]
    if not said:
        return Doubt(name, OK, f"no GPU drew more than {bound_w:,.0f} W in the mean", 0.0, ERROR)
    off_j = sum(float(fit["measured_j"]) for fit in case.fits if mean_w[_instance(fit)] > bound_w)
    why = f"{'; '.join(said)}, and none can draw {bound_w:,.0f} W"
    return case.sized(name, off_j, ERROR, why, "see whether power.parquet is in mW and mJ, and what wrote it")


def counter_sound(case: Evidence) -> Doubt:
    """Whether the energy counter could be taken, and what of it had to be patched with samples."""
    name = "counter_sound"
    if not case.fits:
        return Doubt(name, UNKNOWN, NO_ENERGY)
    filled = [p for fit in case.fits for p in _of_counter(fit)]
    patches = [p for p in filled if not _in_pause(case, p)]
    sampled = [fit for fit in case.fits if fit.get("energy_source") != "counter"]
    if not patches and not sampled:
        why = "all energy is by the GPUs' energy counters"
        if not filled:
            return Doubt(name, OK, why, 0.0, CONCERNED)
        why += ", which counted on unread while the run lay paused by --resume"
        return Doubt(name, OK, why, sum(float(p["joules"]) for p in filled), CONCERNED, counted=False)
    joules = sum(float(fit["measured_j"]) for fit in sampled) + sum(abs(float(p["joules"])) for p in patches)
    reasons = [note for note in case.summary.get("notes", []) if "samples: the counter" in note]
    if sampled and not patches and all("has no readings" in reason for reason in reasons):
        why = "no GPU has an energy counter: its energy is the integral of power samples"
        return Doubt(name, UNKNOWN, why, joules, CONCERNED, counted=False)
    why = "; ".join([*reasons, *_patched(patches)]) or "energy is by power samples"
    return case.sized(name, joules, CONCERNED, why, "look for a driver reset; compare with an external meter")


def _of_counter(fit: dict[str, Any]) -> list[dict[str, Any]]:
    """The stretches of its counters that were replaced."""
    return [p for p in fit.get("patches") or [] if p.get("source", "counter") == "counter"]


def _compared_s(case: Evidence, fit: dict[str, Any]) -> float:
    """How long counter and samples were compared, s: what was filled in is left out."""
    return _duration_s(case) - sum(float(p["seconds"]) for p in _of_counter(fit)) / int(fit["gpus"])


def _in_pause(case: Evidence, patch: dict[str, Any]) -> bool:
    """Whether nobody read the counter because the run lay between its stretches, but for what a sensor may miss."""
    start_ns = int(case.summary["window"]["start_ns"] + patch["start_s"] * NS_PER_S)
    end_ns = start_ns + int(patch["seconds"] * NS_PER_S)
    paused_ns = sum(max(min(end_ns, b) - max(start_ns, a), 0) for a, b in pauses_ns(case.run))
    return UNREAD in str(patch.get("why")) and paused_ns > 0 and end_ns - start_ns - paused_ns <= EDGE_S * NS_PER_S


def _patched(patches: list[dict[str, Any]]) -> list[str]:
    """What to say of stretches of a counter that were replaced, by reason."""
    reasons = dict.fromkeys(str(patch.get("why") or "unsound") for patch in patches)
    said = []
    for reason in reasons:
        rows = [p for p in patches if str(p.get("why") or "unsound") == reason]
        lasted_s = sum(float(p["seconds"]) for p in rows)
        said.append(f"counter patched {len(rows)} times, {lasted_s:.1f} s in all: {reason}")
    return said


def window(case: Evidence) -> Doubt:
    """Whether the window is the one that the run gives."""
    name = "window"
    known = case.summary.get("window")
    if not known or case.mean_w is None:
        return Doubt(name, UNKNOWN, NO_ENERGY)
    start, end = (case.run.manifest.get(key) for key in ("measure_start_ns", "measure_end_ns"))
    if start is None or end is None:
        why = f"{MANIFEST} has no measure_start_ns or no measure_end_ns: the window is the requests' own"
        return Doubt(name, DOUBT, why, do=f"write the window into {MANIFEST}")
    lost_s = (max(known["start_ns"] - start, 0) + max(end - known["end_ns"], 0)) / NS_PER_S
    why = f"{known['duration_s']:.1f} s, as the run gives it"
    if lost_s > 0:
        why = f"power readings leave out {lost_s:.3f} s at the edges, so the window was cut"
    return case.sized(name, lost_s * case.mean_w, ERROR, why, "read power before the first and after the last request")


def clock_offset(case: Evidence) -> Doubt:
    """What the hosts' clocks may be apart moves both ends of every stretch of time that one meter is read for."""
    name = "clock_offset"
    hosts = case.run.manifest.get("hosts") or []
    names = {str(i.get("host")) for i in case.run.manifest.get("instances") or [] if i.get("host")}
    names |= {str(w.get("host")) for w in case.run.manifest.get("workers") or [] if w.get("host")}
    bounds = [float(h["offset_error_ns"]) for h in hosts if h.get("offset_error_ns") is not None]
    if len(bounds) < len(names) and len(names) > 1:
        return Doubt(name, UNKNOWN, f"{len(names)} hosts, and {MANIFEST} has no offset_error_ns of them all")
    if case.mean_w is None:
        return Doubt(name, UNKNOWN, NO_ENERGY)
    bound_s = max(bounds, default=0.0) / NS_PER_S
    why = f"hosts' clocks are known to {1e3 * bound_s:.3g} ms" if bound_s else "one clock"
    do = "synchronise the hosts' clocks better (chrony, PTP) and replay"
    return case.sized(name, 2 * bound_s * case.mean_w, ERROR, why, do)


def clocks_off(case: Evidence) -> Doubt:
    """Time in which a GPU was not at the clock that it was locked to."""
    name = "clocks_off"
    locked = [gpu for gpu in case.gpus if gpu.freq_mhz is not None]
    if not locked:
        return Doubt(name, UNKNOWN, f"clocks were not locked (no freq_mhz in {MANIFEST}): a step's cost may vary")
    if case.readings is None or not case.readings.clocked:
        return Doubt(name, UNKNOWN, "no clock was read (sm_clock_mhz)")
    held = case.readings.off_clock
    why = f"{held.seconds:.1f} of {case.readings.whole.seconds:.1f} GPU-seconds more than "
    why += f"{100 * OFF_CLOCK_REL:.0f} % off the clock locked"
    return case.sized(name, held.joules, CONCERNED, why, "lock a clock that the GPUs hold under this load (--freq)")


def throttled(case: Evidence) -> list[Doubt]:
    """Time in which a GPU said that it was throttled, by NVML's reason; reasons may hold at once."""
    name = "throttled"
    if case.readings is None or not case.readings.reasons:
        return [Doubt(name, UNKNOWN, "no throttle reasons were read")]
    if not case.readings.throttled:
        return [Doubt(name, OK, f"in none of {case.readings.reasons:,} readings", 0.0, CONCERNED)]
    do = "lower the clock (--freq), raise the power cap, or cool better"
    return [
        case.sized(name, held.joules, CONCERNED, f"{reason} for {held.seconds:.1f} GPU-seconds", do)
        for reason, held in case.readings.throttled.items()
    ]


def power_cap(case: Evidence) -> Doubt:
    """Time in which a GPU drew what it was capped to, so that its steps took longer instead."""
    name = "power_cap"
    capped = [gpu for gpu in case.gpus if gpu.cap_w is not None]
    if not capped:
        return Doubt(name, OK, "no power cap was set", 0.0, CONCERNED)
    if case.readings is None:
        return Doubt(name, UNKNOWN, "no power was read in the window")
    held = case.readings.capped
    why = f"{held.seconds:.1f} GPU-seconds at {100 * AT_CAP_REL:.0f} % of the power cap or more"
    do = "expect the step model to be less exact; the cap is part of what was measured"
    return case.sized(name, held.joules, CONCERNED, why, do)


def gain(case: Evidence) -> Doubt:
    """What the meters' gain may be off by: the same factor on every figure, so it is not held against a run."""
    known = case.summary.get("gain_rel_se")
    if known is None or case.measured_j is None:
        return Doubt("meter_gain", UNKNOWN, NO_ENERGY, counted=False)
    why = f"±{100 * known:.0f} % on published hardware, one factor on all requests; it cannot be known from inside"
    do = "compare with an external meter once"
    return Doubt("meter_gain", DOUBT, why, known * case.measured_j, ERROR, do, counted=False)


def _without(case: Evidence, key: str) -> int:
    """How many of the GPUs have no figure under `key` of the manifest's `gpus`."""
    entries = [gpu_entry(case.run, meter.host, meter.gpu) for meter in case.gpus]
    return sum(all(watts is None for watts in (entry.get(key) or {}).values()) for entry in entries)


def _instance(fit: dict[str, Any]) -> str:
    return "unused GPUs" if fit.get("instance") is None else f"instance {fit['instance']}"


def _level_w(idle: dict[str, Any]) -> float:
    """Mean of a summary's idle power."""
    known = [float(idle[when]) for when in ("before", "after") if idle.get(when) is not None]
    return sum(known) / len(known) if known else 0.0


def _duration_s(case: Evidence) -> float:
    return float(case.summary["window"]["duration_s"])


CHECKS = (
    idle_baseline, idle_drift, sensor_gaps, failed_polls, board_power, counter_agrees, counter_sound, window,
    clock_offset, clocks_off, power_cap, gain,
)  # fmt: skip
