"""The step model of one instance: its form chosen and its coefficients fitted on the run itself.

The form is chosen by cross-validation in blocks of time: of durations by the error on held-out steps, of power by the
error on held-out sensor windows. A simpler form of durations wins within one standard error of the best. Durations are
exact; power is fitted on sensor windows: a window's features are the means of the features of the steps inside, so the
sensor's smoothing is undone instead of ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from analysis.capped import FREE, HELD, LEAST_HELD, Holding, windows_within, with_cap
from analysis.duration import (
    ALL,
    FEW,
    fit_linear,
    fit_soft,
    halves_of,
    likely_wave,
    misfit,
    sample_of,
    scaled_nnls,
)
from analysis.kernels import compiled
from analysis.load import Floats
from analysis.model import POWERS, TERMS, TINY, Model, linear_model
from analysis.regimes import regime_of
from analysis.steps import Ints, Steps, steps_at
from analysis.timeline import Windows

FEW_EVALUATIONS = 40  # where a fit starts from one that is nearly its own
THIN_STEPS, THIN_WINDOWS = 300, 200  # fewer tell a dozen coefficients nothing: the linear model then
FIT_WINDOWS = 100_000  # of all GPUs: with 2 % noise each, what they average to is known to 1e-4
BLOCKS = 10  # of cross-validation: stretches of time, every other one held out in turn
RATES = np.array([i == 0 or i >= TERMS for i in range(POWERS)])  # a constant, and so much a step and unit of work
EVERY = np.ones(POWERS, dtype=bool)


@dataclass(frozen=True)
class Quality:
    """How well a model fits what was measured."""

    model: str
    duration_rel_rms: float | None  # of steps
    power_rel_rms: float | None  # of sensor windows, noise included
    steps: int
    windows: int
    independent: float  # windows that would tell as much and do not overlap
    capped: int = 0  # steps in which a power cap was seen to hold clocks down


def fit_model(
    steps: Steps, windows: Sequence[tuple[Windows, Floats]], *, linear: bool = False, holding: Holding | None = None
) -> tuple[Model, Quality]:
    """Fit a model of one instance; `windows` are per GPU the sensor's, with idle power (W, one a window).

    The power coefficients are of the whole group: one GPU's, times their number. Steps that ended before the window are
    left out: they warm the engine up, and its first steps take longer than any later ones of the same work.
    `linear`: the simplest form, unasked. `holding`: which steps a power cap held back.
    """
    inside = steps.end_s > 0
    if inside.any() and not inside.all():
        steps, holding = steps_at(steps, inside), None if holding is None else holding.at(inside)
    if holding is not None and steps.timed and not linear and (fit := _fit_capped(steps, windows, holding)) is not None:
        return fit
    thin = not steps.timed or len(steps) < THIN_STEPS or sum(w.watts.size for w, _ in windows) < THIN_WINDOWS
    with threadpool_limits(1, "blas"):  # its matrices are small: threads would only wait for each other
        model = _duration_model(steps, simple=thin or linear)
        model, power_rms, count = _fit_power(model, steps, windows)
    model = replace(model, power=model.power * len(windows))
    predicted = model.predict_s(steps.work)
    return model, Quality(
        model="linear" if model.linear else "activity",
        duration_rel_rms=None if predicted is None else _rel_rms(predicted, steps.measured_s),
        power_rel_rms=power_rms,
        steps=len(steps),
        windows=count,
        independent=min(sum(_apart(window) for window, _ in windows), float(count)),
    )


def _fit_capped(
    steps: Steps, windows: Sequence[tuple[Windows, Floats]], holding: Holding
) -> tuple[Model, Quality] | None:
    """A model of steps that ran free, and of the cap that held others; None where too few did either."""
    free, held = holding.state == FREE, holding.state == HELD
    if np.count_nonzero(free) < THIN_STEPS or np.count_nonzero(held) < LEAST_HELD:
        return None
    own, hot = ([windows_within(window, idle_w, steps, rows) for window, idle_w in windows] for rows in (free, held))
    if sum(w.watts.size for w, _ in own) < THIN_WINDOWS or any(not w.watts.size for w, _ in hot):
        return None
    cap_w = sum(float(np.median(window.watts - idle_w)) for window, idle_w in hot)
    some = free | held
    known, capped = steps_at(steps, some), steps_at(steps, held)
    with threadpool_limits(1, "blas"):
        model = _duration_model(known, slowed=1 / holding.clock_rel[some])
        if model.linear:
            return None
        model, power_rms, count = _fit_power(model, steps_at(steps, free), own)
        model = with_cap(replace(model, power=model.power * len(windows)), capped, cap_w)
    return model, Quality(
        model="activity",
        duration_rel_rms=_rel_rms(model.durations(known.work), known.measured_s),
        power_rel_rms=power_rms,
        steps=len(known),
        windows=count,
        independent=min(sum(_apart(window) for window, _ in own), float(count)),
        capped=len(capped),
    )


def fit_regimes(
    steps: Steps,
    windows: Sequence[tuple[Windows, Floats]],
    changes: Floats,
    *,
    linear: bool = False,
    holding: Holding | None = None,
) -> list[tuple[Model, Quality]]:
    """`fit_model` for each stretch between `changes` (s, of the GPUs' clock), by its own steps and windows."""
    if not changes.size:
        return [fit_model(steps, windows, linear=linear, holding=holding)]
    fits = []
    step_regime = regime_of(steps.end_s, changes)
    for regime in range(changes.size + 1):
        own = []
        for window, idle_w in windows:
            rows = regime_of(window.end_s, changes) == regime
            arrays = (window.start_s[rows], window.end_s[rows], window.watts[rows])
            own.append((Windows(window.source, *arrays), idle_w[rows]))
        here = step_regime == regime
        of_here = None if holding is None else holding.at(here)
        fits.append(fit_model(steps_at(steps, here), own, linear=linear, holding=of_here))
    return fits


def main_fit(fits: Sequence[tuple[Model, Quality]]) -> tuple[Model, Quality]:
    """The model of the regime with most steps, and how well all of them fit together."""
    if len(fits) == 1:
        return fits[0]
    model, most = max(fits, key=lambda fit: fit[1].steps)
    steps, windows, independent, capped = (
        sum(getattr(quality, name) for _, quality in fits) for name in ("steps", "windows", "independent", "capped")
    )

    def together(name: str, count: str) -> float | None:
        known = [(getattr(q, name), getattr(q, count)) for _, q in fits if getattr(q, name) is not None]
        total = sum(n for _, n in known)
        return float(np.sqrt(sum(n * rms**2 for rms, n in known) / total)) if total else None

    return model, replace(
        most,
        duration_rel_rms=together("duration_rel_rms", "steps"),
        power_rel_rms=together("power_rel_rms", "windows"),
        steps=steps,
        windows=windows,
        independent=independent,
        capped=capped,
    )


def choose(errors: Sequence[Floats]) -> int:
    """The first of several forms, the preferred first, that is within one standard error of the best.

    `errors`: for each form the mean squared held-out errors by block. The standard error is that of the difference
    from the best, block by block, since blocks that are hard are so for every form.
    """
    means = [float(e.mean()) for e in errors]
    best = int(np.argmin(means))
    for form, error in enumerate(errors):
        difference = error - errors[best]
        if means[form] - means[best] <= float(np.std(difference)) / np.sqrt(max(difference.size - 1, 1)):
            return form
    return best


def _duration_model(steps: Steps, *, simple: bool = False, slowed: Floats | None = None) -> Model:
    """The model of durations, without power: linear, or the soft maximum in the form that predicts best."""
    if not steps.timed:
        return linear_model(None, np.zeros(5))
    sample = sample_of(steps, slowed)
    if simple:
        return fit_linear(sample)
    straight = fit_linear(sample)
    whole = fit_soft(sample, halves_of(straight), ALL, 0.0)
    wave = likely_wave(whole, sample)
    forms = [(FEW, 0.0), (ALL, 0.0), (ALL, wave)]
    fitted = [fit_soft(sample, halves_of(straight), FEW, 0.0), whole]
    fitted.append(fit_soft(sample, halves_of(straight), ALL, wave))
    block = np.arange(sample.measured_s.size) * BLOCKS // sample.measured_s.size
    errors = [np.zeros(BLOCKS) for _ in range(len(forms) + 1)]
    for parity in (0, 1):
        train, test = sample.take(block % 2 != parity), sample.take(block % 2 == parity)
        # Starting from the fit to all steps saves most of the time, and the data decide where it ends.
        held_out = [fit_linear(train)] + [
            fit_soft(train, start, overhead, w, FEW_EVALUATIONS)
            for start, (overhead, w) in zip(fitted, forms, strict=True)
        ]
        for form, model in enumerate(held_out):
            errors[form] += _by_block(misfit(model, test) ** 2, block[block % 2 == parity])
    return [straight, *fitted][choose(errors)]


def _by_block(squares: Floats, block: Ints) -> Floats:
    """Mean of `squares` in each block; 0 where it has none."""
    count = np.bincount(block, minlength=BLOCKS)
    return np.asarray(np.bincount(block, weights=squares, minlength=BLOCKS) / np.maximum(count, 1))


def _rel_rms(predicted: Floats, measured: Floats) -> float:
    """Root mean square of the difference, over the mean."""
    return float(np.sqrt(np.mean((predicted - measured) ** 2)) / max(float(np.mean(measured)), TINY))


def _fit_power(
    model: Model, steps: Steps, windows: Sequence[tuple[Windows, Floats]]
) -> tuple[Model, float | None, int]:
    """`model` with the power above idle of one GPU by sensor windows, the residuals' relative rms, and the count."""
    matrix, target, level, end_s = _window_rows(model, steps, windows)
    if target.size < 2:
        return replace(model, power=np.zeros(POWERS)), None, int(target.size)
    forms = [(model, matrix, RATES)]
    if not model.linear:
        # Whole steps hardly tell the two apart, but what part of a step would have cost does: the activities' terms are
        # the better guess there, unless held-out windows speak against them.
        forms.insert(0, (model, matrix, EVERY))
        if model.compute[-1] > 0:
            still = replace(model, pad_draws=False)
            forms.insert(1, (still, _window_rows(still, steps, windows)[0], EVERY))
    errors = [_held_out(rows[:, used], target, level, end_s) for _, rows, used in forms]
    model, matrix, used = forms[choose(errors)]
    power = np.zeros(POWERS)
    power[used] = scaled_nnls(matrix[:, used], target)
    missed = matrix @ power - target
    return replace(model, power=power), float(np.sqrt(np.mean(missed**2)) / max(level.mean(), TINY)), int(target.size)


def _held_out(matrix: Floats, target: Floats, level: Floats, end_s: Floats) -> Floats:
    """Mean squared error of power on windows that were held out, relative, by block of time."""
    block = np.minimum((end_s - end_s.min()) / max(float(np.ptp(end_s)), TINY) * BLOCKS, BLOCKS - 1).astype(np.int64)
    errors = np.zeros(BLOCKS)
    for parity in (0, 1):
        test = block % 2 == parity
        if test.any() and not test.all():
            missed = matrix[test] @ scaled_nnls(matrix[~test], target[~test]) - target[test]
            errors += _by_block((missed / level.mean()) ** 2, block[test])
    return errors


def _window_rows(
    model: Model, steps: Steps, windows: Sequence[tuple[Windows, Floats]]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean features (m, 13) of the windows that saw steps, their power above idle, power and ends."""
    features, (from_s, to_s) = model.features(steps), _busy(steps)
    blocks = []
    for window, idle_w in windows:
        inside = (window.start_s >= from_s[0] - 1.0) & (window.end_s <= to_s[-1] + 1.0)
        rows = np.flatnonzero(inside)
        rows = rows[:: max(1, -(-rows.size * len(windows) // FIT_WINDOWS))]
        start_s, end_s = window.start_s[rows], window.end_s[rows]
        watts = window.watts[rows]
        blocks.append((_means(from_s, to_s, features, start_s, end_s), watts - idle_w[rows], watts, end_s))
    matrix, target, level, ends_s = (np.concatenate(part) for part in zip(*blocks, strict=True))
    busy = matrix.any(axis=1)
    return matrix[busy], target[busy], level[busy], ends_s[busy]


def _apart(window: Windows) -> float:
    """How many windows of the same length cover the same time without overlap."""
    span_s = window.end_s - window.start_s
    new_s = np.minimum(span_s, np.diff(window.end_s, prepend=-np.inf))
    return float(np.sum(new_s / np.maximum(span_s, TINY)))


def _busy(steps: Steps) -> tuple[Floats, Floats]:
    """From when to when each step was at work: without the pause before it."""
    span_s = steps.end_s - steps.start_s
    busy_s = np.minimum(steps.measured_s, span_s) if steps.timed else span_s
    return steps.end_s - busy_s, steps.end_s


@compiled
def _means(from_s: Floats, to_s: Floats, features: Floats, start_s: Floats, end_s: Floats) -> Floats:
    """Mean over each window of the features of what ran `from_s` to `to_s`, one after the other; 0 in between."""
    means = np.zeros((start_s.size, features.shape[1]))
    for i in range(start_s.size):
        k = np.searchsorted(to_s, start_s[i])
        while k < to_s.size and from_s[k] < end_s[i]:
            part = (min(to_s[k], end_s[i]) - max(from_s[k], start_s[i])) / max(end_s[i] - start_s[i], TINY)
            for j in range(features.shape[1]):
                means[i, j] += part * features[k, j]
            k += 1
    return means
