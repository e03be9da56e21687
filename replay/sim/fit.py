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
# Of the logarithms, either way, for derivatives: a P99 jumps where batches change, over which a small step stumbles.
_STEP = 0.04
_SCALE = 0.1  # of the logarithms: the first step goes about as far
_BREAK_OFF = 1e-3  # relative gain below which the search ends


class Evidence(Protocol):
    """Something measured."""

    def residuals(self, profile: Profile) -> FloatArray:
        """How far `profile` is off, in units of what is expected of a good fit."""


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
    error_rel: tuple[float, ...]  # standard errors, relative; how well the evidence alone tells each constant
    evaluations: int


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
    progress: Callable[[int, float], None] = lambda _evaluations, _cost: None,
    most_rounds: int = 15,
) -> Fitted:
    """Move `constants` of `profile` to where `evidence` is met best. `progress` is told evaluations and best cost."""
    start = np.log([constant.of(profile) for constant in constants])
    low, high = np.full(start.size, -np.log(_REACH)), np.full(start.size, np.log(_REACH))
    for i, constant in enumerate(constants):
        if constant.key in _BOUNDS:
            low[i], high[i] = np.log(_BOUNDS[constant.key]) - start[i]
    seen = [0, np.inf]

    def residuals(moved: FloatArray) -> FloatArray:
        changed = with_constants(profile, constants, np.exp(start + moved))
        found = np.concatenate([item.residuals(changed) for item in evidence])
        found = np.nan_to_num(_softened(found), nan=1e3, posinf=1e3, neginf=-1e3)
        seen[0], seen[1] = seen[0] + 1, min(seen[1], float(found @ found) / 2)
        progress(int(seen[0]), float(seen[1]))
        return np.concatenate([found, moved / _HELD])

    def jacobian(moved: FloatArray) -> FloatArray:
        above, below = np.minimum(moved + _STEP, high), np.maximum(moved - _STEP, low)
        columns = []
        for i in range(start.size):
            up, down = moved.copy(), moved.copy()
            up[i], down[i] = above[i], below[i]
            columns.append((residuals(up) - residuals(down)) / (up[i] - down[i]))
        return np.column_stack(columns)

    inside = np.clip(np.zeros(start.size), low + 1e-9, high - 1e-9)
    best = least_squares(
        residuals, inside, jac=jacobian, bounds=(low, high), x_scale=_SCALE,
        ftol=_BREAK_OFF, xtol=1e-3, max_nfev=most_rounds,
    )  # fmt: skip
    told = np.asarray(best.jac)[: -start.size]
    values = np.exp(start + best.x)
    return Fitted(
        with_constants(profile, constants, values),
        tuple(constants),
        _errors(told, best.fun[: -start.size]),
        int(seen[0]),
    )


def _softened(residuals: FloatArray) -> FloatArray:
    """Residuals whose squares grow linearly beyond 1 (soft L1): single points must not pull the fit."""
    squares: FloatArray = np.sign(residuals) * np.sqrt(2.0 * (np.sqrt(1.0 + residuals**2) - 1.0))
    return squares


def _errors(jacobian: FloatArray, residuals: FloatArray) -> tuple[float, ...]:
    """Standard errors of the fitted logarithms; infinite where the evidence says nothing."""
    freedom = max(1, residuals.size - jacobian.shape[1])
    variance = float(residuals @ residuals) / freedom
    values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
    floor = 1e-12 * max(float(values.max()), 1e-300)
    inverse = np.where(values > floor, 1.0 / np.maximum(values, floor), np.inf)
    with np.errstate(invalid="ignore"):
        parts = np.where(vectors**2 > 1e-12, vectors**2 * inverse, 0.0)
    return tuple(float(error) for error in np.sqrt(variance * parts.sum(axis=1)))
