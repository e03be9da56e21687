"""Fitting how long a step takes to the durations of a run's own steps, which are exact."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls

from analysis.load import Floats
from analysis.model import COLUMNS, POWERS, TINY, Model, linear_model, padding, soft_max
from analysis.steps import Bools, Ints, Steps

FIT_STEPS = 800  # of either kind (with and without prefill); plenty for twenty coefficients
WAVES = (16.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)  # tile heights of matrix kernels, in tokens
MOST_EVALUATIONS = 300  # 60 left soft maxima near a plain sum unfinished, and requests ten times as far off
LARGEST_EXPONENT = 30.0  # of the soft maximum: as good as hard
#                       1     prefill decode context attention wave
COMPUTE = np.array([True, True, True, False, True, True])
MEMORY = np.array([True, True, True, True, False, False])
FEW = np.array([True, True, True, False, False, False])  # of the overhead, where all overlaps
ALL = np.array([True, True, True, True, True, True])


@dataclass(frozen=True)
class Sample:
    """Steps to fit durations on, in order of time."""

    work: Floats
    measured_s: Floats
    slowed: Floats  # how many times as long compute took, since a clock was held down; 1 where none was

    def take(self, rows: Bools | Ints) -> "Sample":
        """The steps at `rows`."""
        return Sample(self.work[rows], self.measured_s[rows], self.slowed[rows])

    def predict_s(self, model: Model) -> Floats:
        """How long `model` says that they take."""
        c, a, b = model.times(model.columns(self.work))
        return np.asarray(c + soft_max(a * self.slowed, b, model.exponent))


def sample_of(steps: Steps, slowed: Floats | None = None) -> Sample:
    """Up to FIT_STEPS steps with and without prefill, evenly spread over the run."""
    with_prefill = steps.work[:, 0] > 0
    rows = [np.flatnonzero(with_prefill), np.flatnonzero(~with_prefill)]
    chosen = np.sort(np.concatenate([r[:: max(1, -(-r.size // FIT_STEPS))] for r in rows]))
    return Sample(
        steps.work[chosen], steps.measured_s[chosen], (np.ones(len(steps)) if slowed is None else slowed)[chosen]
    )


def fit_linear(sample: Sample) -> Model:
    """Duration linear in work, coefficients ≥ 0."""
    x = np.concatenate([np.ones((sample.work.shape[0], 1)), sample.work], axis=1)
    weight = 1 / np.sqrt(np.maximum(sample.measured_s, 1e-4))
    return linear_model(scaled_nnls(x * weight[:, None], sample.measured_s * weight), np.zeros(5))


def misfit(model: Model, sample: Sample) -> Floats:
    """Relative errors of the model's durations."""
    return np.asarray(sample.predict_s(model) / np.maximum(sample.measured_s, 1e-6) - 1)


def fit_soft(
    sample: Sample, start: Model, overhead: Bools, wave: float, most_evaluations: int = MOST_EVALUATIONS
) -> Model:
    """The soft-maximum duration by bounded least squares, from `start` on."""
    masks = np.concatenate([overhead, COMPUTE, MEMORY])
    if wave <= 0:
        masks[[5, 11, 17]] = False
    blank = replace(start, wave=wave)
    z = blank.columns(sample.work)
    typical_s = float(np.median(sample.measured_s))
    weight = 1 / np.sqrt(np.maximum(sample.measured_s, 1e-4) * typical_s)
    scales = np.tile(np.maximum(z.mean(axis=0), TINY), 3)[masks] / typical_s

    def build(parameters: Floats) -> Model:
        flat = np.zeros(3 * COLUMNS)
        flat[masks] = parameters[:-1] / scales
        return Model(flat[:6], flat[6:12], flat[12:], 1 + parameters[-1], wave, np.zeros(POWERS))

    def residuals(parameters: Floats) -> Floats:
        model = build(parameters)
        c, a, b = model.times(z)
        return np.asarray((c + soft_max(a * sample.slowed, b, model.exponent) - sample.measured_s) * weight)

    def jacobian(parameters: Floats) -> Floats:
        model = build(parameters)
        _, a, b = model.times(z)
        a, p = a * sample.slowed, model.exponent
        s = np.maximum(soft_max(a, b, p), TINY)
        u, v = np.maximum(a / s, TINY), np.maximum(b / s, TINY)
        by_a, by_b = u ** (p - 1), v ** (p - 1)
        # s is homogeneous: with u^p + v^p = 1, ∂s/∂p = s·(u^p ln u + v^p ln v)/p.
        by_p = s * (u**p * np.log(u) + v**p * np.log(v)) / p
        on_compute = z * (by_a * sample.slowed)[:, None]
        columns = np.concatenate([z, on_compute, z * by_b[:, None]], axis=1)[:, masks] / scales
        return np.asarray(np.column_stack([columns, by_p]) * weight[:, None])

    first = np.concatenate([start.overhead, start.compute, start.memory])[masks] * scales
    first = np.append(np.maximum(first, 1e-3), np.clip(start.exponent - 1, 0.1, LARGEST_EXPONENT - 2))
    upper = np.append(np.full(first.size - 1, np.inf), LARGEST_EXPONENT - 1)
    fit = least_squares(
        residuals,
        first,
        jac=jacobian,
        bounds=(np.zeros(first.size), upper),
        loss="soft_l1",
        f_scale=0.1,
        max_nfev=most_evaluations,
    )
    return build(fit.x)


def halves_of(straight: Model) -> Model:
    """Where the search starts: the linear fit on either side of the maximum, and some of it as overhead."""
    line = straight.overhead
    return replace(straight, overhead=0.1 * line, compute=0.6 * line, memory=0.6 * line, exponent=3.0)


def likely_wave(model: Model, sample: Sample) -> float:
    """The wave whose padding explains most of what `model` misses."""
    _, a, b = model.times(model.columns(sample.work))
    a = a * sample.slowed
    s = np.maximum(soft_max(a, b, model.exponent), TINY)
    on_compute = np.minimum(a / s, 1.0) ** (model.exponent - 1)
    tokens = sample.work[:, 0] + sample.work[:, 1]
    missed = sample.measured_s - sample.predict_s(model)
    left = []
    for wave in WAVES:
        pad = padding(tokens, wave)
        x = np.stack([np.ones_like(pad), tokens, tokens * on_compute, on_compute, pad, pad * on_compute], axis=1)
        left.append(float(np.sum((missed - x @ np.linalg.lstsq(x, missed, rcond=None)[0]) ** 2)))
    return WAVES[int(np.argmin(left))]


def scaled_nnls(matrix: Floats, target: Floats) -> Floats:
    """Non-negative least squares with columns of equal size, on the triangle that a QR leaves of a tall matrix."""
    size = np.maximum(np.sqrt((matrix**2).mean(axis=0)), TINY)
    triangle = np.asarray(np.linalg.qr(np.column_stack([matrix / size, target]), mode="r"))
    solution, _ = nnls(triangle[:, :-1], triangle[:, -1])
    return np.asarray(solution / size, dtype=np.float64)
