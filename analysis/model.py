"""What a step's work costs: its duration and its power above idle, fitted on the run itself.

Work is x = (prefill tokens, decode tokens, context tokens read, prefill attention), a row of `Steps.work`. Two models,
both as functions of x with non-negative coefficients:

- `ActivityModel`. Duration = c(x) + (a(x)^p + b(x)^p)^(1/p): overhead, compute and memory time, each linear in x, the
  last two joined by a soft maximum. Power above idle = a sum over the two activities' a/Δ and b/Δ constant, linear,
  root, square and product terms, and over the rates of steps and of work, 1/Δ and x/Δ.
- `LinearModel`. Duration = d0 + d·x, energy above idle = θ0·Δ + θ·x; for thin data, and for pseudo-steps, whose
  durations are no engine's and stay unmodelled.

Durations are fitted on the steps' own (exact); power on sensor windows: a window's features are the means of the
features of the steps inside, so the sensor's smoothing is undone instead of ignored.

A step's energy at zero work is for whoever is there; the rest is priced after Aumann and Shapley,
π_j = ∫₀¹ ∂E/∂x_j(τx) dτ by five Gauss points, so that E(x) = E(0) + π·x.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from analysis.load import Floats
from analysis.steps import Bools, Ints, Steps
from analysis.timeline import Windows

THIN_STEPS, THIN_WINDOWS = 300, 200
FIT_STEPS = 600  # of either kind (with and without prefill); plenty for a dozen coefficients
FIT_WINDOWS = 400_000
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)
GAUSS = tuple(zip((_NODES + 1) / 2, _WEIGHTS / 2, strict=True))
TINY = 1e-12
TERMS = 8  # of the two activities
#                       1  prefill decode context attention
_OVERHEAD = np.array([True, True, True, False, False])
_COMPUTE = np.array([True, True, True, False, True])
_MEMORY = np.array([True, True, True, True, False])


@dataclass(frozen=True)
class Parts:
    """What a step's energy is made of, J: `total` = `shared` + `price`·work, all of them ≥ 0."""

    total: Floats  # (n,)
    shared: Floats  # (n,)
    price: Floats  # (n, 4), J per unit of work


@dataclass(frozen=True)
class Quality:
    """How well a model fits what was measured."""

    model: str
    duration_rel_rms: float | None  # of steps
    power_rel_rms: float | None  # of sensor windows, noise included
    steps: int
    windows: int


@dataclass(frozen=True)
class LinearModel:
    """Duration d·(1, x) in s; energy above idle θ·(Δ, x) in J. `duration` None: durations are taken as given."""

    duration: Floats | None
    energy: Floats

    def features(self, steps: Steps) -> Floats:
        """Power features (n, 5) of each step: rates of work."""
        span_s = np.maximum(steps.end_s - steps.start_s, TINY)
        return np.concatenate([np.ones((len(steps), 1)), steps.work / span_s[:, None]], axis=1)

    def predict_s(self, work: Floats) -> Floats | None:
        """Durations of steps with `work`."""
        return None if self.duration is None else np.asarray(_with_one(work) @ self.duration)

    def energy_j(self, work: Floats, idle_w: Floats, pace: Floats) -> Floats:
        """Energy (m,) of the whole group in steps of `work` (m, 4); see `pace_of`."""
        predicted = self.predict_s(work)
        span_s = pace if predicted is None else pace * predicted
        return np.asarray((idle_w + self.energy[0]) * span_s + work @ self.energy[1:])

    def parts(self, steps: Steps, idle_w: Floats) -> Parts:
        """The energy of each step of the whole group at `idle_w` (n,)."""
        span_s = steps.end_s - steps.start_s
        floor_w = idle_w + self.energy[0]
        predicted = self.predict_s(steps.work)
        if self.duration is None or predicted is None:
            shared, price = floor_w * span_s, np.zeros_like(steps.work)
        else:
            scale = floor_w * span_s / np.maximum(predicted, TINY)
            shared, price = scale * self.duration[0], scale[:, None] * self.duration[1:]
        price = price + self.energy[1:]
        return Parts(shared + (price * steps.work).sum(axis=1), shared, price)


@dataclass(frozen=True)
class ActivityModel:
    """Overhead, compute and memory time (5,) in s, the soft maximum's exponent, and power."""

    overhead: Floats
    compute: Floats
    memory: Floats
    exponent: float
    power: Floats  # (13,): W of the terms in `_terms`, then J a step and J per unit of work

    def features(self, steps: Steps) -> Floats:
        """Power features (n, 13) of each step."""
        return self._features(steps.work)[0]

    def predict_s(self, work: Floats) -> Floats:
        """Durations of steps with `work`."""
        c, a, b = self._times(work)
        return c + _soft_max(a, b, self.exponent)

    def energy_j(self, work: Floats, idle_w: Floats, pace: Floats) -> Floats:
        """Energy (m,) of the whole group in steps of `work` (m, 4); see `pace_of`."""
        features, span_s = self._features(work)
        return np.asarray((idle_w + features @ self.power) * span_s * pace)

    def parts(self, steps: Steps, idle_w: Floats) -> Parts:
        """The energy of each step of the whole group at `idle_w` (n,), scaled to the step's own duration."""
        nothing = np.zeros_like(steps.work)
        c0, a0, b0 = self._times(nothing)
        c1, a1, b1 = (t1 - t0 for t1, t0 in zip(self._times(steps.work), (c0, a0, b0), strict=True))
        price = nothing + self.power[TERMS + 1 :]
        for node, weight in GAUSS:
            slopes = self._slopes(c0 + node * c1, a0 + node * a1, b0 + node * b1, idle_w)
            for slope, coefficients in zip(slopes, (self.overhead, self.compute, self.memory), strict=True):
                price = price + weight * slope[:, None] * coefficients[1:]
        price = np.maximum(price, 0.0)  # a quadratic power term may make a kind of work seem to save energy
        span_s = np.maximum(c0 + _soft_max(a0, b0, self.exponent), TINY)
        at_zero_w = _terms(a0 / span_s, b0 / span_s) @ self.power[:TERMS]
        shared = (idle_w + at_zero_w) * span_s + self.power[TERMS]
        total = shared + (price * steps.work).sum(axis=1)
        modelled = (idle_w + self.features(steps) @ self.power) * (steps.end_s - steps.start_s)
        # Quadrature and the clipped prices miss the model's own energy a little, its duration the measured one.
        scale = np.where(total > 0, modelled / np.maximum(total, TINY), 0.0)
        return Parts(modelled, shared * scale, price * scale[:, None])

    def _features(self, work: Floats) -> tuple[Floats, Floats]:
        """Power features (m, 13) of steps with `work`, and their durations."""
        c, a, b = self._times(work)
        span_s = np.maximum(c + _soft_max(a, b, self.exponent), TINY)
        return np.concatenate([_terms(a / span_s, b / span_s), _with_one(work) / span_s[:, None]], axis=1), span_s

    def _times(self, work: Floats) -> tuple[Floats, Floats, Floats]:
        x = _with_one(work)
        return x @ self.overhead, x @ self.compute, x @ self.memory

    def _slopes(self, c: Floats, a: Floats, b: Floats, idle_w: Floats) -> tuple[Floats, Floats, Floats]:
        """∂E/∂c, ∂E/∂a and ∂E/∂b of E = Δ·(idle + θ·f(a/Δ, b/Δ))."""
        soft = np.maximum(_soft_max(a, b, self.exponent), TINY)
        span = np.maximum(c + soft, TINY)
        u, v = a / span, b / span
        power_w = idle_w + _terms(u, v) @ self.power[:TERMS]
        du_w, dv_w = (t @ self.power[:TERMS] for t in _term_slopes(u, v))
        # With Δ' the slope of Δ: E' = Δ'·(P - u·P_u - v·P_v), plus P_u for a and P_v for b themselves.
        common = power_w - u * du_w - v * dv_w
        in_a = common * (a / soft) ** (self.exponent - 1) + du_w
        in_b = common * (b / soft) ** (self.exponent - 1) + dv_w
        return common, in_a, in_b


Model = LinearModel | ActivityModel


def pace_of(model: Model, steps: Steps) -> Floats:
    """How each step's own duration, pause included, relates to the model's; untimed steps: the duration itself.

    `model.energy_j(work, idle_w, pace)` is then what the step would have cost with `work`, at the pace it had.
    """
    predicted = model.predict_s(steps.work)
    span_s = steps.end_s - steps.start_s
    return span_s if predicted is None else np.asarray(span_s / np.maximum(predicted, TINY))


def fit_model(
    steps: Steps, windows: Sequence[tuple[Windows, Floats]], *, linear: bool = False
) -> tuple[Model, Quality]:
    """Fit a model of one instance; `windows` are per GPU the sensor's, with idle power (W, one a window).

    The power coefficients are of the whole group: one GPU's, times their number. Steps that ended before the window are
    left out: they warm the engine up, and its first steps take longer than any later ones of the same work.
    """
    inside = steps.end_s > 0
    steps = steps if inside.all() or not inside.any() else steps_at(steps, inside)
    thin = not steps.timed or len(steps) < THIN_STEPS or sum(w.watts.size for w, _ in windows) < THIN_WINDOWS
    straight = _fit_linear_duration(steps) if steps.timed else None
    model: Model = LinearModel(straight, np.zeros(5))
    if not (thin or linear):
        curved = _fit_duration(steps)
        if _rel_rms(curved.predict_s(steps.work), steps.measured_s) <= _rel_rms(
            np.asarray(model.predict_s(steps.work)), steps.measured_s
        ):
            model = curved
    power, power_rms, count = _fit_power(model.features(steps), steps, windows)
    group = power * len(windows)
    if isinstance(model, LinearModel):
        model = LinearModel(model.duration, group)
    else:
        model = ActivityModel(model.overhead, model.compute, model.memory, model.exponent, group)
    predicted = model.predict_s(steps.work)
    return model, Quality(
        model="linear" if isinstance(model, LinearModel) else "activity",
        duration_rel_rms=None if predicted is None else _rel_rms(predicted, steps.measured_s),
        power_rel_rms=power_rms,
        steps=len(steps),
        windows=count,
    )


def steps_at(steps: Steps, rows: Bools) -> Steps:
    """The steps at `rows`."""
    arrays = {name: value[rows] for name, value in vars(steps).items() if name != "timed"}
    return Steps(**arrays, timed=steps.timed)


def _with_one(work: Floats) -> Floats:
    return np.concatenate([np.ones((work.shape[0], 1)), work], axis=1)


def _soft_max(a: Floats, b: Floats, p: float) -> Floats:
    """(a^p + b^p)^(1/p) without overflow."""
    high = np.maximum(np.maximum(a, b), TINY)
    return np.asarray(high * ((a / high) ** p + (b / high) ** p) ** (1 / p))


def _terms(u: Floats, v: Floats) -> Floats:
    """The power terms of the two activities, (n, TERMS); the first is there whenever the engine runs."""
    return np.stack([np.ones_like(u), u, v, np.sqrt(u), np.sqrt(v), u * u, v * v, u * v], axis=1)


def _term_slopes(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    """Slopes of `_terms` by u and by v."""
    one, none = np.ones_like(u), np.zeros_like(u)
    root_u, root_v = 0.5 / np.sqrt(np.maximum(u, 1e-9)), 0.5 / np.sqrt(np.maximum(v, 1e-9))
    return (
        np.stack([none, one, none, root_u, none, 2 * u, none, v], axis=1),
        np.stack([none, none, one, none, root_v, none, 2 * v, u], axis=1),
    )


def _rel_rms(predicted: Floats, measured: Floats) -> float:
    """Root mean square of the difference, over the mean."""
    return float(np.sqrt(np.mean((predicted - measured) ** 2)) / max(float(np.mean(measured)), TINY))


def _scaled_nnls(matrix: Floats, target: Floats) -> Floats:
    """Non-negative least squares with columns of equal size, on the triangle that a QR leaves of a tall matrix."""
    size = np.maximum(np.sqrt((matrix**2).mean(axis=0)), TINY)
    triangle = np.asarray(np.linalg.qr(np.column_stack([matrix / size, target]), mode="r"))
    solution, _ = nnls(triangle[:, :-1], triangle[:, -1])
    return np.asarray(solution / size, dtype=np.float64)


def _sample(steps: Steps) -> Ints:
    """Rows to fit durations on: up to FIT_STEPS with and without prefill, evenly spread over the run."""
    with_prefill = steps.work[:, 0] > 0
    rows = [np.flatnonzero(with_prefill), np.flatnonzero(~with_prefill)]
    return np.concatenate([r[:: max(1, -(-r.size // FIT_STEPS))] for r in rows])


def _fit_linear_duration(steps: Steps) -> Floats:
    rows = _sample(steps)
    measured_s = steps.measured_s[rows]
    weight = 1 / np.sqrt(np.maximum(measured_s, 1e-4))
    return _scaled_nnls(_with_one(steps.work[rows]) * weight[:, None], measured_s * weight)


def _fit_duration(steps: Steps) -> ActivityModel:
    """The soft-maximum duration by bounded least squares, from half the linear fit on either side of the maximum."""
    rows = _sample(steps)
    work, measured_s = steps.work[rows], steps.measured_s[rows]
    weight = 1 / np.sqrt(np.maximum(measured_s, 1e-4))
    scale = np.maximum(_with_one(work).mean(axis=0), TINY)
    typical_s = float(np.median(measured_s))
    masks = np.concatenate([_OVERHEAD, _COMPUTE, _MEMORY])
    scales = np.tile(scale, 3)[masks] / typical_s

    def build(parameters: Floats) -> ActivityModel:
        coefficients = np.zeros(15)
        coefficients[masks] = parameters[:-1] / scales
        return ActivityModel(
            coefficients[:5], coefficients[5:10], coefficients[10:], 1 + parameters[-1], np.zeros(TERMS + 5)
        )

    def residuals(parameters: Floats) -> Floats:
        return np.asarray((build(parameters).predict_s(work) - measured_s) * weight / np.sqrt(typical_s))

    straight = np.tile(_fit_linear_duration(steps), 3) * np.repeat([0.1, 0.6, 0.6], 5)
    start = np.append(np.maximum(straight[masks] * scales, 1e-3), 2.0)
    upper = np.append(np.full(start.size - 1, np.inf), 11.0)
    fit = least_squares(residuals, start, bounds=(np.zeros(start.size), upper), loss="soft_l1", f_scale=0.1)
    return build(fit.x)


def _fit_power(
    features: Floats, steps: Steps, windows: Sequence[tuple[Windows, Floats]]
) -> tuple[Floats, float | None, int]:
    """Coefficients of one GPU's power above idle on sensor windows, the residuals' relative rms, and the count."""
    edges_s, integral = _integrate(features, steps)
    blocks, targets, levels = [], [], []
    for window, idle_w in windows:
        inside = (window.start_s >= edges_s[0] - 1.0) & (window.end_s <= edges_s[-1] + 1.0)
        rows = np.flatnonzero(inside)
        rows = rows[:: max(1, -(-rows.size * len(windows) // FIT_WINDOWS))]
        start_s, end_s = window.start_s[rows], window.end_s[rows]
        blocks.append(_means(edges_s, integral, start_s, end_s))
        targets.append(window.watts[rows] - idle_w[rows])
        levels.append(window.watts[rows])
    matrix, target, level = np.concatenate(blocks), np.concatenate(targets), np.concatenate(levels)
    busy = matrix.any(axis=1)
    matrix, target, level = matrix[busy], target[busy], level[busy]
    if target.size < 2:
        return np.zeros(features.shape[1]), None, int(target.size)
    power = _scaled_nnls(matrix, target)
    return power, float(np.sqrt(np.mean((matrix @ power - target) ** 2)) / max(level.mean(), TINY)), int(target.size)


def _integrate(features: Floats, steps: Steps) -> tuple[Floats, Floats]:
    """Times, and the integral of the features up to them: zero between steps."""
    edges_s = np.stack([steps.start_s, steps.end_s], axis=1).ravel()
    pieces = np.zeros((edges_s.size, features.shape[1]))
    pieces[1::2] = features * (steps.end_s - steps.start_s)[:, None]
    return edges_s, np.cumsum(pieces, axis=0)


def _means(edges_s: Floats, integral: Floats, start_s: Floats, end_s: Floats) -> Floats:
    """Mean features over each window."""
    columns = [np.interp(end_s, edges_s, column) - np.interp(start_s, edges_s, column) for column in integral.T]
    return np.stack(columns, axis=1) / np.maximum(end_s - start_s, TINY)[:, None]
