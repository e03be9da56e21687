"""What a step's work costs: its duration and its power above idle, as functions of the work, and what each part pays.

Work is x = (prefill tokens, decode tokens, context tokens read, prefill attention), a row of `Steps.work`; z = (1, x,
W) with W = w·⌈T/w⌉ - T, what a wave of w tokens is padded by at T tokens (0 where the engine has no waves).

- Duration = c(z) + (a(z)^p + b(z)^p)^(1/p): overhead, compute and memory time, each linear in z with coefficients ≥ 0,
  the last two joined by a soft maximum; what overlaps only in part has a share in c.
- Power above idle = a sum over the two activities' u = a/Δ and v = b/Δ constant, linear, product, convex and concave
  terms, u² and 2u - u², and over the rates of steps and of work, 1/Δ and x/Δ, with coefficients ≥ 0. What pads a wave
  takes time; whether it draws power as work does, or is left out of u, the run decides. A concave term with no slope
  of infinity at 0, as a root has, says little of what was never measured: steps of nearly no work.
- Under a power cap, power is the least of that and the cap P, and a(z) takes (power / P)^s times as long (`capped.py`).

The linear model is the case a = b = 0: duration d·(1, x), energy above idle θ·(Δ, x). `duration.py` and `fit.py`
fit them, `pricing.py` shares a step's energy among its parts.
"""

from dataclasses import dataclass

import numpy as np

from analysis.load import Floats
from analysis.steps import Steps

TINY = 1e-12
TERMS = 8  # of the two activities
COLUMNS = 6  # of z: 1, prefill, decode, context, attention, wave
POWERS = TERMS + 5  # W of the terms in `terms`, then J a step and J per unit of work


@dataclass(frozen=True)
class Model:
    """Overhead, compute and memory time (6,) in s, the soft maximum's exponent, the wave in tokens, and power (13,).

    `timed` False: durations are no engine's own and are taken as given, only power is modelled.
    """

    overhead: Floats
    compute: Floats
    memory: Floats
    exponent: float
    wave: float
    power: Floats  # of the whole group
    timed: bool = True
    pad_draws: bool = True  # power, as work does; else padding only takes time
    cap_w: float = np.inf  # what the whole group is held to, above idle power,
    slows: float = 0.0  # and the exponent of what its compute is slowed by for it

    @property
    def linear(self) -> bool:
        """Whether the model is linear in work."""
        return not (self.compute.any() or self.memory.any() or self.overhead[-1])

    def columns(self, work: Floats) -> Floats:
        """The columns z (m, 6) of `work` (m, 4)."""
        z = np.empty((work.shape[0], COLUMNS))
        z[:, 0] = 1.0
        z[:, 1:5] = work
        z[:, 5] = padding(work[:, 0] + work[:, 1], self.wave)
        return z

    def times(self, z: Floats) -> tuple[Floats, Floats, Floats]:
        """Overhead, compute and memory time, s, of steps with the columns `z`."""
        return z @ self.overhead, z @ self.compute, z @ self.memory

    def features(self, steps: Steps) -> Floats:
        """Power features (n, 13) of each step."""
        z = self.columns(steps.work)
        span_s = None if self.timed else steps.end_s - steps.start_s
        return self._features(z, span_s)[0]

    def predict_s(self, work: Floats) -> Floats | None:
        """Durations of steps with `work`; None where durations are taken as given."""
        return self.durations(work) if self.timed else None

    def durations(self, work: Floats) -> Floats:
        """Durations of steps with `work`, s, as the engine's own."""
        z = self.columns(work)
        c, a, b = self.times(z)
        if np.isfinite(self.cap_w):
            a = a * np.maximum(self.watts(z) / self.cap_w, 1.0) ** self.slows
        return c + soft_max(a, b, self.exponent)

    def watts(self, z: Floats) -> Floats:
        """Power above idle, W, of steps with the columns `z` if no cap held them."""
        return np.asarray(self._features(z, None)[0] @ self.power)

    def energy_j(self, work: Floats, idle_w: Floats, pace: Floats) -> Floats:
        """Energy (m,) of the whole group in steps of `work` (m, 4); see `pace_of`."""
        z, span_s = self.columns(work), self.predict_s(work)
        if span_s is None:
            features, span_s = self._features(z, pace)
            return np.asarray((idle_w + features @ self.power) * span_s)
        return np.asarray((idle_w + np.minimum(self.watts(z), self.cap_w)) * np.maximum(span_s, TINY) * pace)

    def _features(self, z: Floats, span_s: Floats | None) -> tuple[Floats, Floats]:
        c, a, b = self.times(z)
        if span_s is None:
            span_s = c + soft_max(a, b, self.exponent)
        span_s = np.maximum(span_s, TINY)
        if not self.pad_draws:
            a = a - self.compute[-1] * z[:, -1]
        return np.concatenate([terms(a / span_s, b / span_s), z[:, :5] / span_s[:, None]], axis=1), span_s


def linear_model(duration: Floats | None, energy: Floats) -> Model:
    """Duration d·(1, x) in s; energy above idle θ·(Δ, x) in J. `duration` None: durations are taken as given."""
    nothing = np.zeros(COLUMNS)
    power = np.zeros(POWERS)
    power[0], power[TERMS + 1 :] = energy[0], energy[1:]
    overhead = nothing if duration is None else np.append(duration, 0.0)
    return Model(overhead, nothing, nothing, 2.0, 0.0, power, timed=duration is not None)


def pace_of(model: Model, steps: Steps) -> Floats:
    """How each step's own duration, pause included, relates to the model's; untimed steps: the duration itself.

    `model.energy_j(work, idle_w, pace)` is then what the step would have cost with `work`, at the pace it had.
    """
    predicted = model.predict_s(steps.work)
    span_s = steps.end_s - steps.start_s
    return span_s if predicted is None else np.asarray(span_s / np.maximum(predicted, TINY))


def padding(tokens: Floats, wave: float) -> Floats:
    """Tokens that waves of `wave` tokens are padded by; 0 without waves."""
    return np.asarray(wave * np.ceil(tokens / wave) - tokens) if wave > 0 else np.zeros_like(tokens)


def soft_max(a: Floats, b: Floats, p: float) -> Floats:
    """(a^p + b^p)^(1/p) without overflow."""
    high = np.maximum(np.maximum(a, b), TINY)
    low = np.minimum(a, b) / high
    return np.asarray(np.where(high > TINY, high * (1 + low**p) ** (1 / p), a + b))


def terms(u: Floats, v: Floats) -> Floats:
    """The power terms of the two activities, (n, TERMS); the first is there whenever the engine runs."""
    return np.stack([np.ones_like(u), u, v, (2 - u) * u, (2 - v) * v, u * u, v * v, u * v], axis=1)
