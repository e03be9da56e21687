"""The energy counter of a GPU, repaired where it failed.

NVML counts mJ since the driver was loaded, in 64 bits ("Retrieves total energy consumption for this GPU in millijoules
(mJ) since the driver was last reloaded", nvmlDeviceGetTotalEnergyConsumption): it does not wrap in any run's time, and
starts again from zero when the driver does. Others keep fewer bits: see `WRAPS_J`. A counter counts on while nobody
reads it, so holes between readings lose no joule, only where in the hole they fell.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.patches import EDGE_S, Bools, Floats, Patch, Shape, fill, near_w

Ints = NDArray[np.int64]

STILL_UPDATES = 5  # a counter may miss so many of its own updates, or EDGE_S, before it counts as frozen
SOUND_SHARE = 0.5  # of the time that a counter must be sound for the joules to be its own
# Where counters of fewer bits start again, J: 32 bits of mJ; of the 15.3 uJ (2^-16 J) and 61 uJ (2^-14 J) that RAPL's
# registers count in (Intel SDM vol. 3B, MSR_RAPL_POWER_UNIT; AMD's is the first); of uJ.
WRAPS_J = {"2^32 mJ": 2**32 / 1e3, "2^32 / 2^14 J": 2.0**18, "2^32 / 2^16 J": 2.0**16, "2^32 uJ": 2**32 / 1e6}
# More than any board draws (1.4 kW is the highest rating, MI355X and B300 in 2025), unless its usual power says else.
CEILING_W, CEILING_TIMES = 3000.0, 10.0
_MANY = 20_000  # values are enough for a median


@dataclass(frozen=True)
class Survey:
    """What was learnt of a GPU's counter and samples; add up those of a long run's slabs and hand the sum on."""

    sound_s: float = 0.0  # seconds of the window in which the counter was sound, of so many
    total_s: float = 0.0
    counter_j: float = 0.0  # joules by counter and by samples where both are sound
    samples_j: float = 0.0
    poll_s: float | None = None  # usual distance of readings, and of the counter's updates
    update_s: float | None = None

    def __add__(self, other: "Survey") -> "Survey":
        """Both together; distances are the first's, so that all slabs date alike."""
        return Survey(
            self.sound_s + other.sound_s,
            self.total_s + other.total_s,
            self.counter_j + other.counter_j,
            self.samples_j + other.samples_j,
            self.poll_s or other.poll_s,
            self.update_s or other.update_s,
        )

    @property
    def gain(self) -> float:
        """Counter over samples; 1 where that is not known."""
        return self.counter_j / self.samples_j if self.counter_j > 0 and self.samples_j > 0 else 1.0


@dataclass(frozen=True)
class Counted:
    """The counter's curve, or the reason in words why there is none, and what was done to it."""

    t_s: Floats
    e_j: Floats  # as the counter has it, up to what was filled in
    why: str | None
    patches: tuple[Patch, ...]
    said: tuple[str, ...]
    survey: Survey


@dataclass(frozen=True)
class _Values:
    """The values that the counter showed one after the other: when a poll saw each first and last."""

    e_j: Floats
    first_s: Floats
    last_s: Floats


@dataclass(frozen=True)
class _Course:
    """Knots of the curve (m + 1), the joules between them (m), and what is wrong with each interval: one of `_WORDS`.

    `held_s`: how long of an interval the value was seen to stand still.
    """

    t_s: Floats
    step_j: Floats
    fault: Ints
    held_s: Floats
    before_j: float  # the counter's value at the first knot

    @property
    def bad(self) -> Bools:
        """Intervals that are not as the counter has them."""
        return np.asarray(self.fault != _SOUND)


_SOUND, _HOLE, _FROZEN, _FELL, _LEAPT, _UNMOVED, _STOPPED, _UNREAD = range(8)
UNREAD = "is not read"  # a hole between readings, in words
_WORDS = {
    _HOLE: UNREAD,
    _FROZEN: "stands still",
    _FELL: "starts again",
    _LEAPT: "leaps",
    _UNMOVED: "does not move",
    _STOPPED: "stands still",
    _UNREAD: "has no readings",
}


def read_counter(
    t_s: Floats, counter_j: Floats, window_s: tuple[float, float], shape: Shape | None, known: Survey
) -> Counted:
    """The curve of a counter read as `counter_j` at ascending `t_s` (n,), NaN where it was not, and what it is worth.

    Its knots are where the value changed: half-way between two polls, on average right where polls are the finer grid;
    after a hole in the polls within the last update before the reading, not half-way into the hole. A GPU always draws
    power, so a value that stands still has stopped counting. One value that does not fit between its neighbours is left
    out. A fall is a wrap where one of `WRAPS_J` explains it, else a restart. What a counter that stood still shows
    next tells whether it had counted on (the jump is then the joules of all that time) or not.

    `shape` fills stretches that the counter missed. `known` is what slabs before this one have told: a counter that was
    sound less than half the time so far is none.
    """
    length_s = window_s[1] - window_s[0]
    read = np.isfinite(counter_j)
    if not read.all():
        t_s, counter_j = t_s[read], counter_j[read]
    values, said = _without_spikes(t_s, counter_j)
    if values.e_j.size < 3 and (known.sound_s <= 0 or shape is None):  # one change makes no power
        why = "has no readings" if t_s.size < 2 else "does not move"
        return Counted(np.zeros(0), np.zeros(0), why, (), (), Survey(total_s=length_s))
    course, pace = _course(values, window_s, known)
    if not course.bad.any():
        e_j = values.e_j[1:]
        return Counted(course.t_s, e_j, None, (), said, _survey(course, window_s, shape, pace))
    survey = _survey(course, window_s, shape, pace)
    both = known + survey
    if both.sound_s < SOUND_SHARE * both.total_s:
        return Counted(np.zeros(0), np.zeros(0), _worst(course), (), (), survey)
    return _repaired(course, window_s, shape, both, survey, said)


def _without_spikes(t_s: Floats, counter_j: Floats) -> tuple[_Values, tuple[str, ...]]:
    """The values shown, without single ones that fit neither what was before nor what came after."""
    values, said = _values(t_s, counter_j), []
    e_j = values.e_j
    falls = np.flatnonzero(np.diff(e_j) < 0)
    if not falls.size:
        return values, ()
    after = np.where(falls + 2 < e_j.size, e_j[np.minimum(falls + 2, e_j.size - 1)], -np.inf)
    low = after >= e_j[falls]  # the value after the fall is the odd one
    before = np.where(falls > 0, e_j[np.maximum(falls - 1, 0)], np.inf)
    high = ~low & (e_j[falls + 1] >= before)
    odd = np.concatenate([falls[low] + 1, falls[high]])
    if odd.size:
        kept = ~np.isin(np.searchsorted(values.first_s, t_s, side="right") - 1, odd)
        said = [f"values of the counter left out that fit neither before nor after: {odd.size}"]
        values = _values(t_s[kept], counter_j[kept])
    return values, tuple(said)


def _values(t_s: Floats, counter_j: Floats) -> _Values:
    new = np.flatnonzero(counter_j[1:] != counter_j[:-1]) + 1
    first = np.concatenate([[0], new]) if t_s.size else new
    last = np.concatenate([new - 1, [t_s.size - 1]]) if t_s.size else new
    return _Values(counter_j[first], t_s[first], t_s[last])


def _course(values: _Values, window_s: tuple[float, float], known: Survey) -> tuple[_Course, Survey]:
    """The curve as the counter has it, with what is wrong with it; and the distances of readings and updates.

    The first value's beginning was not seen, so the first change is the first knot.
    """
    if values.e_j.size < 3:
        t_s, nan = np.array(window_s), np.full(1, np.nan)
        return _Course(t_s, nan, np.array([_UNMOVED if values.e_j.size else _UNREAD]), np.zeros(1), 0.0), Survey()
    first_s, last_s = values.first_s, values.last_s
    polled_s = first_s[1:] - last_s[:-1]  # between the last poll of the old value and the first of the new
    pace = Survey(poll_s=known.poll_s or _median(polled_s), update_s=known.update_s or _median(np.diff(first_s[1:])))
    poll_s, update_s = pace.poll_s or 0.0, pace.update_s or 0.0
    knot_s = first_s[1:] - np.minimum(polled_s, update_s) / 2 if update_s > 1.5 * poll_s else first_s[1:]
    step_j, held_s = np.diff(values.e_j[1:]), last_s[1:-1] - first_s[1:-1]
    longest_s = max(EDGE_S, STILL_UPDATES * update_s)
    ceiling_w = max(CEILING_W, CEILING_TIMES * _median(step_j) / max(update_s, 1e-9))
    fault = np.where(polled_s[1:] > longest_s, _HOLE, _SOUND)
    fault[held_s > longest_s] = _FROZEN
    fault[step_j > ceiling_w * (np.diff(knot_s) + update_s)] = _LEAPT
    fault[(fault == _LEAPT) & (held_s > longest_s)] = _FROZEN
    fault[step_j < 0] = _FELL
    course = _Course(knot_s, step_j, fault, held_s, float(values.e_j[1]))
    return _extended(course, window_s, (first_s[0], last_s[-1]), longest_s), pace


def _extended(course: _Course, window_s: tuple[float, float], read_s: tuple[float, float], longest_s: float) -> _Course:
    """`course` with an interval at the window's start or end where the counter, read in `read_s`, missed it."""
    late, early = read_s[0] > window_s[0] + EDGE_S, read_s[1] < window_s[1] - EDGE_S
    start = [window_s[0]] if late or course.t_s[0] > window_s[0] + longest_s else []
    end = [window_s[1]] if early or course.t_s[-1] < window_s[1] - longest_s else []
    if not (start or end):
        return course
    first, last = [_UNREAD if late else _UNMOVED] * len(start), [_UNREAD if early else _STOPPED] * len(end)
    return _Course(
        np.concatenate([start, course.t_s, end]),
        np.concatenate([[np.nan] * len(start), course.step_j, [np.nan] * len(end)]),
        np.concatenate([first, course.fault, last]).astype(np.int64),
        np.concatenate([[0.0] * len(start), course.held_s, [0.0] * len(end)]),
        course.before_j,
    )


def _survey(course: _Course, window_s: tuple[float, float], shape: Shape | None, pace: Survey) -> Survey:
    """How long the counter was sound in the window, and its joules beside the samples' while both were."""
    total_s = window_s[1] - window_s[0]
    if not course.bad.any():
        sound = np.ones(1, bool)
        t_s = course.t_s[[0, -1]]
        step_j = np.array([course.step_j.sum()])
        sound_s = total_s
    else:
        sound, t_s, step_j = course.fault == _SOUND, course.t_s, course.step_j
        clipped_s = np.diff(np.clip(t_s, *window_s))
        lost = course.bad & (course.fault != _HOLE)
        sound_s = total_s - float(clipped_s[lost].sum())
    counter_j = samples_j = 0.0
    if shape is not None:
        shape_j = shape.joules(t_s[:-1], t_s[1:])
        compared = sound & np.isfinite(shape_j)
        counter_j, samples_j = float(step_j[compared].sum()), float(shape_j[compared].sum())
    return Survey(sound_s, total_s, counter_j, samples_j, pace.poll_s, pace.update_s)


def _worst(course: _Course) -> str:
    """The longest fault in words."""
    rows = np.flatnonzero(course.bad)
    row = int(rows[np.argmax(np.diff(course.t_s)[rows])])
    start_s, end_s = course.t_s[row : row + 2]
    return f"{_WORDS[int(course.fault[row])]} for {end_s - start_s:.0f} s at {start_s:.0f} s"


def _repaired(
    course: _Course,
    window_s: tuple[float, float],
    shape: Shape | None,
    known: Survey,
    survey: Survey,
    said: tuple[str, ...],
) -> Counted:
    """The curve with what is wrong in `course` put right."""
    rows = np.flatnonzero(course.bad)
    start_s, end_s = course.t_s[rows], course.t_s[rows + 1]
    span_s = end_s - start_s
    fault, step_j = course.fault[rows], course.step_j[rows]
    expected_j = near_w(course.t_s, course.step_j, ~course.bad, rows) * span_s
    if shape is not None:
        shape_j = known.gain * shape.joules(start_s, end_s)
        expected_j = np.where(np.isnan(shape_j), expected_j, shape_j)
    expected_j = np.maximum(np.nan_to_num(expected_j), 1e-9)
    update_j = expected_j / span_s * (known.update_s or 0.0)
    wrapped, total_j = _unwrapped(np.where(fault == _FELL, step_j, np.nan), expected_j, update_j)
    for name in dict.fromkeys(name for _, name in wrapped):
        at_s = [start_s[i] for i, other in wrapped if other == name]
        wraps = f"the counter wraps at {name}, first at {at_s[0]:.0f} s ({len(at_s)} in all)"
        said = (*said, f"{wraps}: its joules are whole")
    # A counter that stood still and had counted on jumps by all of it, one that had stopped by an update's worth.
    moved_j = np.maximum(expected_j * (1 - course.held_s[rows] / span_s), update_j)
    jump_j = np.maximum(step_j, 1e-9)
    counted_on = np.abs(np.log(jump_j / expected_j)) < np.abs(np.log(jump_j / np.maximum(moved_j, 1e-9)))
    kept = (fault == _HOLE) | ((fault == _FROZEN) & counted_on)
    total_j = np.where(kept, step_j, total_j)
    bad = course.bad.copy()
    steps = course.step_j.copy()
    short = np.array([i for i, _ in wrapped if span_s[i] <= EDGE_S], dtype=np.int64)
    bad[rows[short]], steps[rows[short]] = False, total_j[short]
    left = np.isin(rows, np.flatnonzero(bad))
    t_s, e_j, _ = fill(course.t_s, steps, bad, total_j[left], shape, known.gain)
    e_j += course.before_j - np.interp(course.t_s[0 if course.fault[0] < _UNMOVED else 1], t_s, e_j)
    patches = _patches(course.fault[rows[left]], start_s[left], end_s[left], np.isnan(total_j[left]), window_s, shape)
    return Counted(t_s, e_j, None, tuple(p.measured(t_s, e_j) for p in patches), said, survey)


def _unwrapped(fell_j: Floats, expected_j: Floats, update_j: Floats) -> tuple[list[tuple[int, str]], Floats]:
    """Which of the falls `fell_j` (NaN: none) are wraps, and the joules that were really used; NaN for no wrap.

    A restart from just below a wrap would be taken for one, at a cost below an update's joules.
    """
    names = list(WRAPS_J)
    used_j = fell_j[:, None] + np.array([WRAPS_J[name] for name in names])
    allowed = (used_j > 0) & (np.abs(used_j - expected_j[:, None]) <= expected_j[:, None] + 2 * update_j[:, None])
    off_j = np.where(allowed, np.abs(used_j - expected_j[:, None]), np.inf)
    best = off_j.argmin(axis=1)
    found = np.flatnonzero(allowed.any(axis=1))
    total_j = np.full(fell_j.size, np.nan)
    total_j[found] = used_j[found, best[found]]
    return [(int(i), names[best[i]]) for i in found], total_j


def _patches(
    fault: Ints, start_s: Floats, end_s: Floats, unknown: Bools, window_s: tuple[float, float], shape: Shape | None
) -> list[Patch]:
    """What was filled in within the window, its joules still to be read off the curve."""
    source = "from the power around it" if shape is None else f"from {shape.name}"
    seen = np.zeros(start_s.size, bool) if shape is None else np.isfinite(shape.joules(start_s, end_s))
    result = []
    for i in np.flatnonzero((end_s > window_s[0]) & (start_s < window_s[1])):
        how = source if seen[i] else "from the power around it"
        what = (
            f"its joules are {how}"
            if unknown[i]
            else "its joules are the counter's own" + (f", their course {how}" if seen[i] else "")
        )
        a, b = max(float(start_s[i]), window_s[0]), min(float(end_s[i]), window_s[1])
        result.append(Patch(a, b, 0.0, f"the counter {_WORDS[int(fault[i])]}; {what}"))
    return result


def _median(values: Floats) -> float:
    """Of the values or, where they are many, of as many of them as do."""
    return float(np.median(values[:: max(1, values.size // _MANY)])) if values.size else 0.0
