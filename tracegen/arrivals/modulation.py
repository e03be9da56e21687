"""Random rates: how a process's rate wanders, as multiples of its mean, window after window.

Each takes a window's length, a random stream and the state in which the window before ended (None: start as in
equilibrium), and returns the rate's path and the state for the next.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tracegen.rates import RatePath, linear_path, steps_path

STEPS_A_TAU = 100  # knots a correlation time: linear between them, the variance lost is 1/300 of the whole


class Modulation(Protocol):
    """A random rate."""

    @property
    def knot_s(self) -> float:
        """About how far its knots are apart."""
        ...

    def path(self, length_s: float, stream: np.random.Generator, state: Any) -> tuple[RatePath, Any]:
        """The rate over [0, `length_s`] as multiples of the mean, and the state at its end."""
        ...


@dataclass(frozen=True)
class LogOu:
    """exp(x - sigma²/2) with x an Ornstein-Uhlenbeck process: deviation `sigma`, correlation time `tau_s`."""

    sigma: float
    tau_s: float

    @property
    def knot_s(self) -> float:
        """A hundredth of the correlation time."""
        return self.tau_s / STEPS_A_TAU

    def path(self, length_s: float, stream: np.random.Generator, state: Any) -> tuple[RatePath, Any]:
        """Exact at its knots (an autoregression of order one), linear between; the state is x."""
        from scipy.signal import lfilter

        count = math.ceil(length_s / self.knot_s)
        keep = math.exp(-length_s / count / self.tau_s)
        start = stream.normal(0, self.sigma) if state is None else state
        kicks = stream.standard_normal(count) * (self.sigma * math.sqrt(1 - keep**2))
        x = np.concatenate(([start], lfilter([1.0], [1.0, -keep], kicks, zi=np.array([keep * start]))[0]))
        return linear_path(np.exp(x - self.sigma**2 / 2), np.linspace(0, length_s, count + 1)), float(x[-1])


@dataclass(frozen=True)
class Switching:
    """A rate that stays at one of `levels` for a gamma time (`holds_s` its means, `shapes`), then goes to another.

    The next level is any other, with equal chance; with shapes of 1 that is a Markov chain. Levels count by their ratio
    only: they are divided by their mean over time.
    """

    levels: tuple[float, ...]
    holds_s: tuple[float, ...]
    shapes: tuple[float, ...]

    @property
    def knot_s(self) -> float:
        """The mean stay."""
        return sum(self.holds_s) / len(self.holds_s)

    def path(self, length_s: float, stream: np.random.Generator, state: Any) -> tuple[RatePath, Any]:
        """The steps of the rate; the state is the level's number and how long it still lasts."""
        holds, shapes = np.array(self.holds_s), np.array(self.shapes)
        level, left_s = self._start(stream) if state is None else state
        numbers, ends_s = np.array([level]), np.array([left_s])
        while ends_s[-1] < length_s:
            count = math.ceil((length_s - ends_s[-1]) / self.knot_s * 1.2) + 10
            jumps = stream.integers(1, len(self.levels), count)
            following = (numbers[-1] + np.cumsum(jumps)) % len(self.levels)
            stays_s = stream.standard_gamma(shapes[following]) * (holds / shapes)[following]
            numbers = np.concatenate((numbers, following))
            ends_s = np.concatenate((ends_s, ends_s[-1] + np.cumsum(stays_s)))
        last = int(np.searchsorted(ends_s, length_s))
        relative = np.array(self.levels) / (np.dot(self.levels, holds) / holds.sum())
        at_s = np.concatenate(([0.0], ends_s[:last], [length_s]))
        rates = relative[numbers[: last + 1]]
        wide = np.append(np.diff(at_s[:-1]) > 0, True)  # a stay too short for a double's digits is none
        at_s = np.append(at_s[:-1][wide], length_s)
        return steps_path(rates[wide], at_s), (int(numbers[last]), float(ends_s[last] - length_s))

    def _start(self, stream: np.random.Generator) -> tuple[int, float]:
        """A level by its share of time, and a uniform part of a length-biased stay."""
        holds = np.array(self.holds_s)
        level = int(stream.choice(holds.size, p=holds / holds.sum()))
        shape = self.shapes[level]
        return level, float(stream.random() * stream.standard_gamma(shape + 1) * holds[level] / shape)
