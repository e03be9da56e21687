"""What an attribution says of a run as a whole: the document of `energy/summary.json`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.counter import UNREAD
from analysis.edges import edge_note
from analysis.fit import Quality
from analysis.idle import Idle
from analysis.latency import answered
from analysis.load import NS_PER_S, CpuData, RunData, names
from analysis.manifest import pauses_ns
from analysis.regimes import Regime
from analysis.timeline import EDGE_S, Curve, Estimate, GpuTimeline
from tracegen.console import format_si, plural

# One board's gain against another's, from the published tests of power meters on H100 (Yang et al., "Part-time Power
# Measurements: nvidia-smi's Lack of Attention", SC 2024): about ±5 %. Boards of one group may err together.
GAIN_REL_SE = 0.05
MISMATCH_REL = 0.05  # between counter and samples that is worth a word; the run's verdict has the same bound
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
RECORDS, CLIENT = "step records", "client timestamps"
# Why a request has no energy.
WITHOUT_ENERGY = {
    "unread": "ran while no power was read",
    "idle": "got nothing, for idle power is more than what was measured in the mean",
    "unrecorded": "left no record of work",
}


@dataclass(frozen=True)
class InstanceEnergy:
    """One instance accounted for."""

    instance: int | None
    membership: str | None
    measured_j: float
    idle_j: float
    other_j: float
    unrecorded_j: float  # of other_j, the work of requests of the trace that are not in requests.parquet
    unrecorded: int  # how many of these
    warmup_j: float  # of unrecorded_j, the work of requests that were due in the warm-up
    quality: Quality | None
    misfit_rel: float
    idle: tuple[Idle, ...]
    timelines: tuple[GpuTimeline, ...]
    regimes: tuple[Regime, ...] = ()  # of clock, each with its own fit


def summarize(
    data: RunData, parts: list[InstanceEnergy], frame: pl.DataFrame, method: str, unknown: int
) -> dict[str, Any]:
    """The document of `energy/summary.json`; `unknown`: how many requests have no energy."""
    measured_j, idle_j, other_j, warmup_j = (
        float(np.sum([getattr(part, name) for part in parts]))
        for name in ("measured_j", "idle_j", "other_j", "warmup_j")
    )
    attributed_j = float(frame["energy_j"].sum())
    served = frame.with_columns(data.requests["status"]).filter(answered()).drop_nulls("energy_j")
    each_j = served["energy_j"].mean()
    reasons = _without_energy(data, parts, frame) if unknown else {}
    notes = [*data.notes, *_pauses(data), *_notes(data, parts, frame, reasons)]
    memberships = sorted({p.membership for p in parts if p.membership})
    ran = frame.filter(pl.col("energy_j") > 0).height
    cpu_j = {cpu.name: _cpu_j(cpu, data.duration_s) for cpu in data.cpu or ()}
    notes += [
        f"CPU {name}: energy unknown, for its counter {why}" for name, why in cpu_j.items() if isinstance(why, str)
    ]
    by_counter = all(t.curve.source == "counter" and not t.patches for part in parts for t in part.timelines)
    if by_counter and data.scope == "gpu" and (told := edge_note(data.run, measured_j, data.duration_s)):
        notes.append(told)
    return {
        "run_id": data.run.manifest.get("run_id", data.run.name),
        "simulated": data.run.simulated,
        "method": method,
        "membership": " and ".join(memberships) or None,
        "scope": data.scope,
        "window": {"start_ns": data.window_ns[0], "end_ns": data.window_ns[1], "duration_s": data.duration_s},
        "requests": frame.height,
        "requests_with_energy": ran,
        "requests_averaged": served.height,
        "requests_without_energy": reasons,
        "energy_per_request_j": each_j if isinstance(each_j, float) else None,
        "measured_j": measured_j,
        "attributed_j": attributed_j,
        "prefill_j": float(frame["prefill_j"].sum()),
        "decode_j": float(frame["decode_j"].sum()),
        "shared_j": float(frame["shared_j"].sum()),
        "idle_j": idle_j,
        "other_j": other_j,
        "warmup_j": warmup_j,  # of other_j
        "residual_j": measured_j - attributed_j - idle_j - other_j,
        # Beside the energy that is accounted for and no part of it: whose share of a CPU it is is not known.
        **({"cpu_j": {k: None if isinstance(v, str) else v for k, v in cpu_j.items()}} if data.cpu is not None else {}),
        "gain_rel_se": GAIN_REL_SE,
        "fit": [_fit_document(part) for part in parts],
        "notes": notes,
    }


def _cpu_j(cpu: CpuData, duration_s: float) -> float | str:
    """Joules of a CPU domain in `[0, duration_s]`, between readings in proportion to time; or why it is unknown."""
    if cpu.t_s.size < 2:
        return "was read less than twice"
    if np.any(np.diff(cpu.energy_j) < 0):
        return "decreases"
    if cpu.t_s[0] > EDGE_S or cpu.t_s[-1] < duration_s - EDGE_S:
        return "does not cover the window"
    return Curve("counter", cpu.t_s, cpu.energy_j).between(0.0, duration_s)


def _without_energy(data: RunData, parts: list[InstanceEnergy], frame: pl.DataFrame) -> dict[str, int]:
    """How many requests have no energy, by the reason: a key of `WITHOUT_ENERGY`; none that has no request."""
    rows = data.requests.filter(frame["energy_j"].is_null())
    gone_s = pl.max_horizontal("sent_s", "last_token_s", "done_s")
    unread = (pl.col("sent_s") >= data.duration_s) | (gone_s <= 0)
    starved = pl.col("instance").is_in([part.instance for part in parts if _idle_above_mean(part, data.duration_s)])
    why = pl.when(unread).then(pl.lit("unread")).when(starved).then(pl.lit("idle")).otherwise(pl.lit("unrecorded"))
    counts = rows.select(why.alias("why"))["why"].value_counts().sort("why")
    return dict(counts.iter_rows())


def _idle_above_mean(part: InstanceEnergy, duration_s: float) -> bool:
    """Whether idle power alone would have taken more than was measured."""
    return sum((idle.before_w + idle.after_w) / 2 for idle in part.idle) * duration_s > part.measured_j


def _notes(data: RunData, parts: list[InstanceEnergy], frame: pl.DataFrame, reasons: Mapping[str, int]) -> list[str]:
    """What a reader should know before believing the figures, apart from what `load_run` found."""
    notes = [
        f"{plural(number, 'request')} {WITHOUT_ENERGY[why]}: energy is null, not zero"
        for why, number in reasons.items()
    ]
    failed = frame.with_columns(data.requests["status"]).filter((pl.col("status") != "ok").fill_null(True))
    if failed.height:
        counts = failed["status"].fill_null("no status").value_counts(sort=True).sort("count", "status")
        kinds = ", ".join(f"{count} {status}" for status, count in counts.reverse().iter_rows())
        notes.append(
            f"{failed.height} of {frame.height} requests were not ok ({kinds}); "
            f"{format_si(float(failed['energy_j'].sum()), ' J', 4)} of prefill and decode went into them"
        )
    lost = sum(part.unrecorded for part in parts)
    if lost:
        lost_j = sum(part.unrecorded_j for part in parts)
        notes.append(
            f"{format_si(lost_j, ' J', 4)} of other are {plural(lost, 'request')} of the trace {_why_lost(data)}"
        )
    notes += _alike([i.why for part in parts for i in part.idle if i.why])
    for part in parts:
        if len(part.regimes) > 1:
            clocks = ", ".join(f"{r.clock_mhz or 0:.0f} MHz from {r.start_s:.0f} s" for r in part.regimes)
            notes.append(f"instance {part.instance}: its clock changed during the run ({clocks}): each has its own fit")
    said: dict[str, list[str]] = {}
    for line in (line for part in parts for line in part.timelines):
        for text in (*line.said, *_patched(line), *_windows_said(line)):
            said.setdefault(text, []).append(line.name)
        if line.why:
            said.setdefault(f"energy from {line.curve.source} samples: the counter {line.why}", []).append(line.name)
        elif abs(line.mismatch_rel or 0.0) > MISMATCH_REL:
            off = f"power samples come to {100 * (line.mismatch_rel or 0.0):+.0f} % of the counter's energy"
            said.setdefault(f"{off}: one of them is wrong", []).append(line.name)
    return notes + [f"{names(gpus)}: {text}" for text, gpus in said.items()]


def _pauses(data: RunData) -> list[str]:
    """What to say of the time in which a run that was resumed lay between its stretches."""
    start_ns, end_ns = data.window_ns
    inside = [(max(a, start_ns), min(b, end_ns)) for a, b in pauses_ns(data.run) if a < end_ns and b > start_ns]
    return [
        f"paused by --resume for {(b - a) / NS_PER_S:.1f} s at {(a - start_ns) / NS_PER_S:.0f} s: part of the window"
        for a, b in inside
    ]


def _alike(remarks: Sequence[str]) -> list[str]:
    """`remarks`, each of a GPU by name; one line for all that differ but in numbers: these from least to most."""
    said: dict[str, list[tuple[str, list[str]]]] = {}
    for remark in remarks:
        name = remark.partition(": ")[0]
        text = remark.replace(f"{name}: ", "")
        said.setdefault(_NUMBER.sub("{}", text), []).append((name, _NUMBER.findall(text)))
    lines = []
    for text, rows in said.items():
        spans = [sorted(set(column), key=float) for column in zip(*(numbers for _, numbers in rows), strict=True)]
        shown = [span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans]
        pieces = text.split("{}")
        filled = "".join(a + b for a, b in zip(pieces, [*shown, ""], strict=True))
        lines.append(f"{names([name for name, _ in rows])}: {filled}")
    return lines


def _why_lost(data: RunData) -> str:
    """Why requests of the trace are not in requests.parquet."""
    unended = "whose end was not recorded"
    if data.early is None:
        return unended
    others = "" if data.unrecorded.equals(data.early["request_id"]) else f", or {unended}"
    return f"that were due in the warm-up{others}"


def _patched(line: GpuTimeline) -> list[str]:
    """What to say of the stretches of one GPU's energy that its own sensor did not measure, by reason.

    Holes between readings are named where the run is loaded.
    """
    texts = []
    for why in dict.fromkeys(patch.why for patch in line.patches if UNREAD not in patch.why):
        rows = [patch for patch in line.patches if patch.why == why]
        seconds = sum(p.end_s - p.start_s for p in rows)
        texts.append(f"{why} ({seconds:.1f} s, from {rows[0].start_s:.0f} s on)")
    return texts


def _windows_said(line: GpuTimeline) -> list[str]:
    """What to say of a sensor whose window was not told: the run's own answer, or why it has none."""
    found = line.estimate
    if found is None:
        return []
    if isinstance(found, str):
        return [f"the manifest does not tell the window of the {line.curve.source} sensor, and {found}"]
    untold = f"the manifest does not tell the window of the {found.source} sensor"
    return [f"{untold}: estimated from the steps' work (window and lag in fit, sensors)"]


def _sensor_document(line: GpuTimeline) -> dict[str, Any]:
    """Which windows of power a GPU was fitted by, and who told them; null: not known, or not estimated."""
    found = line.estimate
    known = found if isinstance(found, Estimate) else None
    spans_s = line.windows.end_s - line.windows.start_s
    return {
        "gpu": line.name,
        "source": line.windows.source,
        "window_s": float(np.median(spans_s)) if spans_s.size else None,
        "window_from": "manifest" if line.told else "run" if known else "readings",
        "window_se_s": known.window_se_s if known else None,
        "lag_s": known.lag_s if known else None,
        "lag_se_s": known.lag_se_s if known else None,
    }


def _fit_document(part: InstanceEnergy) -> dict[str, Any]:
    """What the summary says about one instance's meter and model."""
    mismatches = [t.mismatch_rel for t in part.timelines if t.mismatch_rel is not None]
    quality = part.quality
    return {
        "instance": part.instance,
        "gpus": len(part.timelines),
        "membership": part.membership,
        "measured_j": part.measured_j,
        "energy_source": "+".join(sorted({t.curve.source for t in part.timelines})),
        "samples_over_counter_rel": float(np.mean(mismatches)) if mismatches else None,
        "sensors": [_sensor_document(line) for line in part.timelines],
        "patches": [
            {
                "gpu": line.name,
                "source": line.curve.source,
                "start_s": p.start_s,
                "seconds": p.end_s - p.start_s,
                "joules": p.joules,
                "why": p.why,
            }
            for line in part.timelines
            for p in line.patches
        ],
        "idle_power_w": {
            "before": sum(i.before_w for i in part.idle),
            "after": sum(i.after_w for i in part.idle),
            "source": "+".join(sorted({i.source for i in part.idle})),
        },
        "model": quality.model if quality else None,
        "steps": quality.steps if quality else 0,
        "capped_steps": quality.capped if quality else 0,
        "sensor_windows": quality.windows if quality else 0,
        "duration_rel_rms": quality.duration_rel_rms if quality else None,
        "power_rel_rms": quality.power_rel_rms if quality else None,
        "regimes": [{"start_s": r.start_s, "end_s": r.end_s, "sm_clock_mhz": r.clock_mhz} for r in part.regimes],
        "block_misfit_rel": part.misfit_rel,
    }
