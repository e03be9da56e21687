"""What the power samples of one GPU say: its sensor's updates, and their integral.

A value that a sensor showed at an update describes the time since the update before, so values hold *back*.
Integrating by trapezoid across unchanged or dropped samples would be wrong (100 W for 10 s, then 500 W for 0.1 s is
1050 J, not 3030 J). A sensor that averages over more than its period shows what was half the difference ago: its
updates overlap, and their integral is moved back by that much.
"""

from dataclasses import dataclass

import numpy as np

from analysis.load import Floats, GpuData
from analysis.patches import EDGE_S, Bools, Patch, Shape, fill

SOURCES = ("instant", "average")
COLUMNS = {"instant": "power_instant_mw", "average": "power_average_mw"}
MISSED_UPDATES = 5  # a sensor that shows nothing for so many periods, or EDGE_S, has a hole
# "On Ampere (except GA100) or newer GPUs, the API returns power averaged over 1 sec interval" (NVML,
# nvmlDeviceGetPowerUsage): what an average is where the manifest does not tell.
AVERAGE_WINDOW_S = 1.0
# A powered GPU draws something, and none draws more than this or, where its usual power is high, so many times that.
ABSURD_W, ABSURD_TIMES = 3000.0, 10.0
_MANY = 20_000  # values are enough for a median


@dataclass(frozen=True)
class Updates:
    """A power sensor's updates (n,): its value in W holds from `since_s` to `end_s`, and `dated` says who dated it.

    Times are those of what was shown: the lag is taken off. `said` names readings that cannot be true.
    """

    source: str
    end_s: Floats
    since_s: Floats
    watts: Floats
    dated: Bools  # by the sampler, which saw the sensor update; else by the poll that showed it
    period_s: float
    hole_s: float
    said: tuple[str, ...]


def read_updates(gpu: GpuData, source: str) -> Updates | None:
    """The updates of the sensor `source` (`instant` or `average`); None with fewer than two.

    A new sensor time is an update. A reading without one (the first polls, before the sampler has seen the value
    change; an average beside instant power, whose times they are) counts as an update at its poll, and so does one
    whose sensor time is more than a period after the poll that saw it. Readings of 0 W or less and those that no board
    draws are left out.
    """
    raw_w = gpu.instant_w if source == "instant" else gpu.average_w
    known = np.isfinite(raw_w)
    if np.count_nonzero(known) < 2:
        return None
    said, known = _absurd(gpu, raw_w, known, COLUMNS[source])
    poll_s, watts, sensor_s = gpu.t_s, raw_w, gpu.sensor_s
    if not known.all():
        poll_s, watts, sensor_s = poll_s[known], watts[known], sensor_s[known]
    if poll_s.size < 2:
        return None
    told_s = float(gpu.sensors.get(source, {}).get("period_ns") or 0) / 1e9
    lag_s = float(gpu.sensors.get(source, {}).get("lag_ns") or 0) / 1e9
    dated = np.zeros(poll_s.size, bool)
    if source == "instant" or not np.isfinite(gpu.instant_w).any():
        dated = sensor_s <= poll_s + max(told_s, 0.1)  # False where there is none
    end_s = np.maximum.accumulate(np.where(dated, sensor_s, poll_s))
    new = np.concatenate([[True], end_s[1:] > end_s[:-1]])
    last_old_poll_s = np.concatenate([[-np.inf], poll_s[:-1]])[new]
    end_s, watts, dated = end_s[new], watts[new], dated[new]
    since_s = np.concatenate([end_s[:1], end_s[:-1]])
    period_s = told_s or (_median(np.diff(end_s)) if end_s.size > 1 else 0.1)
    # Polls that went on showing the old value tell that the sensor repeated it, so the new one is not that old.
    late = end_s - since_s > 1.5 * period_s
    repeated_s = np.maximum(since_s[late], np.minimum(end_s[late] - period_s, last_old_poll_s[late]))
    since_s[late] = repeated_s
    hole_s = max(EDGE_S, MISSED_UPDATES * period_s)
    return Updates(source, end_s - lag_s, since_s - lag_s, watts, dated, period_s, hole_s, said)


def window_of(gpu: GpuData, source: str) -> float | None:
    """The seconds that the sensor averages over, as the manifest says; None where it does not."""
    return float(gpu.sensors.get(source, {}).get("window_ns") or 0) / 1e9 or None


def integrate(updates: Updates, window_s: float | None) -> tuple[Floats, Floats, Bools]:
    """Knots and joules (from 0) of held-back samples, and which intervals nobody polled.

    A value that holds for part of a gap leaves the rest to the last, which polls saw repeated.

    `window_s`: what the sensor averages over, where known.
    """
    end_s, since_s, watts = updates.end_s, updates.since_s, updates.watts
    if window_s is None and updates.source == "average":
        window_s = AVERAGE_WINDOW_S
    centred_s = max(0.0, (window_s or 0.0) - updates.period_s) / 2
    step_j = (end_s - since_s) * watts
    gap_s = since_s[1:] - end_s[:-1]
    if not (gap_s > 0).any():
        return end_s - centred_s, np.cumsum(step_j), np.diff(end_s) > updates.hole_s
    times = np.stack([since_s, end_s], axis=1).ravel()
    held_j = np.concatenate([[0.0], gap_s * watts[:-1]])
    joules = np.cumsum(np.stack([held_j, step_j], axis=1).ravel())
    new = np.concatenate([[True], np.diff(times) > 0])
    unseen = (np.arange(times.size) % 2 == 1) & np.repeat(end_s - since_s > updates.hole_s, 2)
    return times[new] - centred_s, joules[new], unseen[new][1:]


def shape_of(gpu: GpuData, updates: Updates, name: str | None = None) -> Shape:
    """The samples as something to fill another curve from."""
    t_s, e_j, unseen = integrate(updates, window_of(gpu, updates.source))
    seen_s = np.concatenate([[0.0], np.cumsum(np.where(unseen, 0.0, np.diff(t_s)))])
    return Shape(name or COLUMNS[updates.source], t_s, e_j, seen_s)


def with_holes_filled(
    shape: Shape, hole_s: float, window_s: tuple[float, float], other: Shape | None
) -> tuple[Floats, Floats, tuple[Patch, ...]]:
    """Knots and joules of `shape` with its holes filled from `other`, and what was filled.

    The level is `shape`'s own: `other` counts times the ratio of the two where both saw. Without another sensor the
    value after a hole holds back through it, and the power at an edge goes on.
    """
    t_s, e_j = shape.t_s, shape.e_j
    start = [window_s[0]] if t_s[0] > window_s[0] + hole_s else []
    end = [window_s[1]] if t_s[-1] < window_s[1] - hole_s else []
    step_j = np.diff(e_j)
    bad = np.diff(shape.seen_s) == 0
    if not (start or end or bad.any()):
        return t_s, e_j, ()
    t_s = np.concatenate([start, t_s, end])
    step_j = np.concatenate([[np.nan] * len(start), step_j, [np.nan] * len(end)])
    bad = np.concatenate([np.ones(len(start), bool), bad, np.ones(len(end), bool)])
    rows = np.flatnonzero(bad)
    filled_j = np.full(rows.size, np.nan) if other is None else other.joules(t_s[rows], t_s[rows + 1])
    total_j = np.where(np.isnan(filled_j), step_j[rows], np.nan)
    knot_s, joules, _ = fill(t_s, step_j, bad, total_j, other, _ratio(t_s, step_j, ~bad, other))
    patches = []
    for a, b, seen, held in zip(t_s[rows], t_s[rows + 1], np.isfinite(filled_j), step_j[rows], strict=True):
        if b <= window_s[0] or a >= window_s[1]:
            continue
        how = "the value after it held" if np.isfinite(held) else "the power beside it went on"
        why = f"no {shape.name}; {f'filled from {other.name}' if seen and other is not None else how}"
        patch = Patch(max(float(a), window_s[0]), min(float(b), window_s[1]), 0.0, why)
        patches.append(patch.measured(knot_s, joules))
    return knot_s, joules, tuple(patches)


def _ratio(t_s: Floats, step_j: Floats, sound: Bools, other: Shape | None) -> float:
    """Joules over those of `other`, where both are there; 1 where that is nowhere."""
    if other is None:
        return 1.0
    other_j = other.joules(t_s[:-1], t_s[1:])
    both = sound & np.isfinite(other_j)
    own, others = float(step_j[both].sum()), float(other_j[both].sum())
    return own / others if own > 0 and others > 0 else 1.0


def _absurd(gpu: GpuData, watts: Floats, known: Bools, column: str) -> tuple[tuple[str, ...], Bools]:
    """What to say of readings that cannot be true, and `known` without them."""
    usual_w = _median(watts[known])
    limit_w = max(ABSURD_W, ABSURD_TIMES * usual_w)
    none, much, high = watts <= 0, watts > limit_w, watts > ABSURD_TIMES * usual_w
    said = []
    if none.any():
        said.append(f"{np.count_nonzero(none)} readings of {column} are 0: left out, for a GPU always draws power")
    if much.any():
        most = int(np.argmax(np.where(much, watts, -np.inf)))
        said.append(
            f"{np.count_nonzero(much)} readings of {column} are above {limit_w:,.0f} W (up to {watts[most]:,.0f} W at "
            f"{gpu.t_s[most]:.1f} s), which no board draws: left out"
        )
    elif high.any():
        most = int(np.argmax(np.where(high, watts, -np.inf)))
        said.append(
            f"{np.count_nonzero(high)} readings of {column} are above {ABSURD_TIMES:.0f} times the usual "
            f"{usual_w:,.0f} W (up to {watts[most]:,.0f} W at {gpu.t_s[most]:.1f} s): kept, for a burst may be true"
        )
    return tuple(said), known & ~none & ~much if said else known


def _median(values: Floats) -> float:
    """Of the values or, where they are many, of as many of them as do."""
    return float(np.median(values[:: max(1, values.size // _MANY)])) if values.size else 0.0
