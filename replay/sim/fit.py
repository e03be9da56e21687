"""Fit the constants of a profile to evidence: bounded least squares over their logarithms, with a robust loss.

Evidence says how far off a profile is; which constants it can tell shows in their standard errors. What the evidence
does not tell stays where it was: every constant is held, weakly, by where it started.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.optimize import least_squares

from replay.sim.physics import FloatArray
from replay.sim.profile import Profile

# Known from data sheets, or not visible in step times and power at the clocks that are measured.
_KNOWN = {
    "time": {"peak_flops", "boost_mhz", "sustained_mhz", "memory_bytes_per_s", "sync_reduce_share"},
    "power": {"cap_w", "idle_unloaded_w", "idle_loaded_w", "idle_exponent"},
}
_BOUNDS = {"compute_efficiency": (0.2, 1.0), "memory_efficiency": (0.3, 1.0)}
_REACH = 4.0  # other constants may change by this factor either way
_HELD = 1.0  # prior standard deviation of a constant's logarithm: what is told moves freely, what is not stays
_STEP = 1e-4  # of the logarithms, for derivatives
_NEAR = 0.15  # of the logarithms, in one round
_PATIENCE = 2  # rounds without a better one, and the search ends
_STILL = 1e-3  # a round that moves no constant by more is the last
_INSIDE = 1e-9  # the search starts this far from its bounds
UNTOLD = 1.0  # a standard error as large as the constant: the evidence does not tell it

_Residuals = Callable[[FloatArray], FloatArray]


class Evidence(Protocol):
    """Something measured."""

    def residuals(self, profile: Profile) -> FloatArray:
        """How far `profile` is off, in units of what is expected of a good fit."""

    def near(self, profile: Profile) -> Callable[[Profile], FloatArray]:
        """A smooth stand-in for `residuals`, equal to them at `profile`: derivatives are taken of it."""


class Constant(NamedTuple):
    """A constant that is fitted."""

    section: str
    key: str

    @property
    def name(self) -> str:
        """As errors and tables name it."""
        return f"{self.section}.{self.key}"

    def of(self, profile: Profile) -> float:
        """Its value in `profile`."""
        return float(getattr(getattr(profile, self.section), self.key))


class Fitted(NamedTuple):
    """The outcome of a fit."""

    profile: Profile
    constants: tuple[Constant, ...]
    error_rel: tuple[float, ...]  # standard errors, relative; from `UNTOLD` on the constant is where it started
    cost: float  # half the sum of squared, softened residuals


def constants_of(profile: Profile) -> tuple[Constant, ...]:
    """The constants of `profile` that can be fitted: those above 0 that no data sheet gives."""
    return tuple(
        Constant(section, key)
        for section, known in _KNOWN.items()
        for key, value in asdict(getattr(profile, section)).items()
        if key not in known and value > 0
    )


def with_constants(profile: Profile, constants: Iterable[Constant], values: Iterable[float]) -> Profile:
    """`profile` with `constants` set to `values`."""
    changed: dict[str, dict[str, float]] = {}
    for constant, value in zip(constants, values, strict=True):
        changed.setdefault(constant.section, {})[constant.key] = float(value)
    sections: dict[str, Any] = {name: replace(getattr(profile, name), **keys) for name, keys in changed.items()}
    return replace(profile, **sections)


def fit(
    profile: Profile,
    evidence: Sequence[Evidence],
    constants: Sequence[Constant],
    *,
    progress: Callable[[int, float], None] = lambda _round, _cost: None,
    rounds: int = 8,
) -> Fitted:
    """Move `constants` of `profile` to where `evidence` is met best.

    What the evidence does not tell (see `_told`) goes back to where it started, and the others are fitted once more
    without it. `progress` is told each round's cost.
    """
    errors = dict.fromkeys(constants, np.inf)
    told, best = tuple(constants), profile
    while told:
        found = _search(profile, evidence, told, best, progress, rounds)
        best, fitted = found.profile, told
        now = _told(fitted, found)
        errors |= now
        told = tuple(constant for constant in fitted if now[constant] < UNTOLD)
        if told == fitted:
            return Fitted(best, tuple(constants), tuple(errors.values()), found.cost)
    residuals = _composed([item.residuals for item in evidence], lambda _moved: profile)(np.zeros(0))
    return Fitted(profile, tuple(constants), tuple(errors.values()), float(residuals @ residuals) / 2)


class _Found(NamedTuple):
    """Where a search ended: softened residuals there, and their derivatives by the constants' logarithms."""

    profile: Profile
    cost: float
    residuals: FloatArray
    jacobian: FloatArray


def _told(constants: Sequence[Constant], found: _Found) -> dict[Constant, float]:
    """The standard error of each constant; of those from `UNTOLD` on, when the worse ones are known already.

    The worst told is taken out first, one after the other: of two that show only together, one is told by the other.
    """
    errors: dict[Constant, float] = {}
    places = [*range(len(constants))]
    while places:
        now = _errors(found.jacobian[:, places], found.residuals)
        worst = int(np.argmax(now))
        if now[worst] < UNTOLD:
            return errors | {constants[place]: error for place, error in zip(places, now, strict=True)}
        errors[constants[places.pop(worst)]] = now[worst]
    return errors


def _search(
    profile: Profile,
    evidence: Sequence[Evidence],
    constants: Sequence[Constant],
    begin: Profile,
    progress: Callable[[int, float], None],
    rounds: int,
) -> _Found:
    """The constants, held by those of `profile`, that meet `evidence` best, searched for from those of `begin` on.

    In each round the smooth stand-ins of the evidence near the constants of the round before are fitted; of all rounds
    the one counts that meets the evidence itself best.
    """
    start = np.log([constant.of(profile) for constant in constants])
    low, high = np.full(start.size, -np.log(_REACH)), np.full(start.size, np.log(_REACH))
    for i, constant in enumerate(constants):
        if constant.key in _BOUNDS:
            low[i], high[i] = np.log(_BOUNDS[constant.key]) - start[i]
    ahead = np.log([constant.of(begin) for constant in constants]) - start
    moved = np.clip(ahead, low + _INSIDE, high - _INSIDE)

    def at(moved: FloatArray) -> Profile:
        return with_constants(profile, constants, np.exp(start + moved))

    whole = _composed([item.residuals for item in evidence], at)
    best, best_round = _Found(profile, np.inf, np.zeros(0), np.zeros((0, start.size))), 0
    for number in range(rounds + 1):
        found = whole(moved)
        cost = float(found @ found + (moved / _HELD) @ (moved / _HELD)) / 2
        smooth = _composed([item.near(at(moved)) for item in evidence], at)
        if cost < best.cost:
            best, best_round = _Found(at(moved), cost, found, _slopes(smooth, moved, low, high)), number
        progress(number, best.cost)
        if number == rounds or number - best_round == _PATIENCE:
            break
        # Batches change where constants do: stay near.
        near_low, near_high = np.maximum(low, moved - _NEAR), np.minimum(high, moved + _NEAR)
        before, moved = moved, _fit_near(smooth, moved, near_low, near_high)
        if np.abs(moved - before).max() < _STILL:
            break
    return best


def _fit_near(residuals: _Residuals, start: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """The logarithms between `low` and `high` at which smooth `residuals`, and the hold, are least."""

    def held(moved: FloatArray) -> FloatArray:
        return np.concatenate([residuals(moved), moved / _HELD])

    def slopes(moved: FloatArray) -> FloatArray:
        return np.vstack([_slopes(residuals, moved, low, high), np.eye(start.size) / _HELD])

    inside = np.clip(start, low + _INSIDE, high - _INSIDE)
    found = least_squares(
        held, inside, jac=slopes, bounds=(low, high), x_scale=_NEAR, ftol=1e-4, xtol=1e-4, max_nfev=12
    )
    return np.asarray(found.x)


def _slopes(residuals: _Residuals, at: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """The Jacobian of `residuals` at logarithms `at`, by differences that stay between `low` and `high`."""
    here = residuals(at)
    columns = []
    for i in range(at.size):
        step = _STEP if at[i] + _STEP <= high[i] else -_STEP
        there = at.copy()
        there[i] = max(low[i], at[i] + step)
        columns.append((residuals(there) - here) / step)
    return np.column_stack(columns)


def _composed(parts: Sequence[Callable[[Profile], FloatArray]], at: Callable[[FloatArray], Profile]) -> _Residuals:
    """All residuals, softened, of the constants' logarithms."""

    def residuals(moved: FloatArray) -> FloatArray:
        profile = at(moved)
        return _softened(np.concatenate([part(profile) for part in parts]))

    return residuals


def _softened(residuals: FloatArray) -> FloatArray:
    """Residuals whose squares grow linearly beyond 1 (soft L1): single points must not pull the fit."""
    residuals = np.nan_to_num(residuals, nan=1e3, posinf=1e3, neginf=-1e3)
    squares: FloatArray = np.sign(residuals) * np.sqrt(2.0 * (np.sqrt(1.0 + residuals**2) - 1.0))
    return squares


def _errors(jacobian: FloatArray, residuals: FloatArray) -> tuple[float, ...]:
    """Standard errors of the fitted logarithms; infinite where the evidence says nothing."""
    freedom = max(1, residuals.size - jacobian.shape[1])
    variance = float(residuals @ residuals) / freedom
    values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
    floor = max(1e-12 * float(values.max()), 1e-300)  # whose inverse is still a number
    inverse = np.where(values > floor, 1.0 / np.maximum(values, floor), np.inf)
    with np.errstate(invalid="ignore"):
        parts = np.where(vectors**2 > 1e-12, vectors**2 * inverse, 0.0)
    return tuple(float(error) for error in np.sqrt(variance * parts.sum(axis=1)))
