"""The arrival models that users name, with their parameters: `poisson`, `gamma:cv=3`, `log-ou:sigma=0.3,tau=2m`.

A model is a process of unit rate (`points`) on a clock that runs at the rate: the asked one, times random ones
(`modulation`). The default parameters are fits to public traces; the table `MODELS` says which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegen.arrivals.modulation import LogOu, Modulation, Switching
from tracegen.arrivals.points import (
    CV_RANGE,
    constant_points,
    gamma_points,
    poisson_arrivals_ns,
    poisson_points,
    weibull_points,
)
from tracegen.durations import NS_PER_S, parse_duration_ns
from tracegen.errors import TraceError
from tracegen.rates import Floats, RatePath
from tracegen.streams import random_stream

Values = tuple[float, ...]


# The models and their parameters' defaults.
MODELS: dict[str, Mapping[str, Values]] = {
    "poisson": {},
    "constant": {},
    # Of gaps: half of the volume of ServeGen's m-mid comes from clients with less (Xiang et al. 2025).
    "gamma": {"cv": (2.04,)},
    "weibull": {"cv": (2.04,)},
    # Relative rates and mean stays, as many as one likes: an example, fitted to nothing.
    "mmpp": {"levels": (1.0, 3.0), "holds": (60.0, 20.0)},
    # Azure 2023 conversation: moments of simulated counts matched to the index of dispersion at 0.5 to 120 s. The cv is
    # that of a gamma shape of 0.95.
    "log-ou": {"sigma": (0.246,), "tau": (127.2,), "cv": (1.026,)},
    # Azure 2023 code, likewise: bursts and silence, in bursts batches at a rate that wanders.
    "on-off": {
        "on": (23.9972,), "on-shape": (1.14919,), "off": (51.4691,), "off-shape": (0.599117,), "floor": (0.01,),
        "sigma": (0.826554,), "tau": (2.89752,), "batch": (1.7,), "spacing": (0.002,),
    },
    # As many as ServeGen's deepseek-r1 has; the first has 0.27 of the volume, the first five 0.56 (there 0.29, 0.52).
    "clients": {"n": (73.0,), "zipf": (1.15,)},
}  # fmt: skip
_TIMES = frozenset({"tau", "on", "off", "holds", "spacing"})
# What part of the volume of ServeGen's deepseek-r1 comes from clients with a smaller CV of gaps.
_CLIENT_CV = ((0.1, 0.25, 0.5, 0.75, 0.9), (0.738066, 0.942062, 1.02036, 1.86359, 5.557))
_RANGES = {
    "cv": CV_RANGE, "n": (1, 100_000), "batch": (1, 1e6), "floor": (0, 1), "sigma": (0, 5), "zipf": (0, 10),
    "levels": (0, 1e9),
}  # fmt: skip
_ABOVE_ZERO = (1e-6, 1e9)


@dataclass(frozen=True)
class Arrivals:
    """A model with all its parameters."""

    kind: str
    parameters: Mapping[str, Values] = field(default_factory=dict)

    def __str__(self) -> str:
        """As users type it; what is left at its default is left out."""
        changed = [
            f"{name}={'/'.join(f'{v:g}' if float(f'{v:g}') == v else repr(v) for v in values)}"
            for name, values in self.parameters.items()
            if values != MODELS[self.kind][name]
        ]
        return self.kind + (":" + ",".join(changed) if changed else "")

    def _one(self, name: str) -> float:
        return self.parameters[name][0]

    @property
    def modulations(self) -> tuple[Modulation, ...]:
        """The random rates that multiply the asked one, independent of each other."""
        if self.kind == "mmpp":
            levels = self.parameters["levels"]
            return (Switching(levels, self.parameters["holds"], (1.0,) * len(levels)),)
        if self.kind not in {"log-ou", "on-off"}:
            return ()
        wander = LogOu(self._one("sigma"), self._one("tau"))
        if self.kind == "log-ou":
            return (wander,)
        holds = (self._one("on"), self._one("off"))
        floor, share = self._one("floor"), holds[0] / sum(holds)
        levels = ((1 - floor) / share + floor, floor)
        return wander, Switching(levels, holds, (self._one("on-shape"), self._one("off-shape")))

    def arrivals_ns(
        self, rate: RatePath, before: float, seed: int, window: int, suffix: str = ""
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64] | None]:
        """The arrivals in one window, ascending from its start, and whose each is, where the model has clients.

        `rate` is the whole rate over the window, `before` what was expected up to its start. Windows are independent
        given their rates: gap processes start anew in each, in equilibrium.
        """
        stream = random_stream(seed, f"arrivals{suffix}", window)
        length_s = float(rate.at_s[-1])
        length_ns = round(length_s * NS_PER_S)
        if self.kind == "poisson" and rate.start_rps.size == 1 and rate.start_rps[0] == rate.end_rps[0]:
            return poisson_arrivals_ns(float(rate.start_rps[0]), length_ns, stream), None
        expected, client = float(rate.expected[-1]), None
        if self.kind == "clients":
            points, client = self._client_points(expected, seed, stream)
        elif self.kind == "on-off":
            points = poisson_points(expected / self._one("batch"), stream) * self._one("batch")
        elif self.kind == "constant":
            points = constant_points(expected, before)
        elif self.kind == "weibull":
            points = weibull_points(expected, stream, self._one("cv"))
        elif self.kind in {"gamma", "log-ou"}:
            points = gamma_points(expected, stream, self._one("cv"))
        else:
            points = poisson_points(expected, stream)
        times_s = rate.times_s(points[points < expected])
        if self.kind == "on-off":
            times_s = self._batches(times_s, stream)
        # The last nanosecond takes what rounding, or the end of a batch, would put behind the window.
        return np.minimum((times_s * NS_PER_S).astype(np.int64), length_ns - 1), client

    def _batches(self, times_s: Floats, stream: np.random.Generator) -> Floats:
        """A geometric number of arrivals, `spacing` apart, at each of `times_s`."""
        sizes = stream.geometric(1 / self._one("batch"), times_s.size)
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.sort(np.repeat(times_s, sizes) + place * self._one("spacing"))

    def _client_points(
        self, expected: float, seed: int, stream: np.random.Generator
    ) -> tuple[Floats, NDArray[np.uint64]]:
        """The points of all clients, and the number of the client of each; 0 sends most."""
        shares = zipf_shares(int(self._one("n")), self._one("zipf"))
        cvs = np.interp(random_stream(seed, "client_cv").random(shares.size), *_CLIENT_CV)
        each = [gamma_points(expected * share, stream, cv) / share for share, cv in zip(shares, cvs, strict=True)]
        client = np.repeat(np.arange(shares.size, dtype=np.uint64), [points.size for points in each])
        points = np.concatenate(each)
        order = np.argsort(points, kind="stable")
        keep = points[order] < expected
        return points[order][keep], client[order][keep]


def zipf_shares(count: int, exponent: float) -> Floats:
    """Shares of `count` clients, the n-th in proportion to n to the power of -`exponent`."""
    weights: Floats = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


ARRIVALS = tuple(MODELS)


def parse_arrivals(text: str) -> Arrivals:
    """The model that `text` names, `kind` or `kind:name=value,...`; several values are parted by `/`.

    Times may have units. Raises `TraceError` that lists the models or the parameters.
    """
    kind, _, rest = text.partition(":")
    pairs = (item.partition("=") for item in rest.split(",") if item)
    return make_arrivals(kind, {name: value.split("/") for name, _, value in pairs})


def make_arrivals(kind: str, given: Mapping[str, Any]) -> Arrivals:
    """The model `kind` with the parameters `given` as text or numbers, one or several, the others at their defaults."""
    if kind not in MODELS:
        raise TraceError(f"there is no arrival model '{kind}'; the models are {', '.join(MODELS)}")
    parameters = dict(MODELS[kind])
    for name, values in given.items():
        if name not in parameters:
            names = ", ".join(parameters) or "none"
            raise TraceError(f"arrival model '{kind}' has no parameter '{name}'; it has {names}")
        several = values if isinstance(values, (list, tuple)) else [values]
        parameters[name] = tuple(_number(kind, name, value) for value in several)
        if len(parameters[name]) != 1 and kind != "mmpp":
            raise TraceError(f"arrival model '{kind}': {name} is one number")
    if kind == "mmpp" and not 2 <= len(parameters["levels"]) == len(parameters["holds"]):
        raise TraceError(
            "arrival model 'mmpp': give as many holds as levels, two or more, as in levels=1/3,holds=60/20"
        )
    if kind == "mmpp" and max(parameters["levels"]) == 0:
        raise TraceError("arrival model 'mmpp': one of the levels must be above 0")
    return Arrivals(kind, parameters)


def _number(kind: str, name: str, value: Any) -> float:
    """One parameter within its range; times in seconds."""
    low, high = _RANGES.get(name, _ABOVE_ZERO)
    try:
        in_words = isinstance(value, str) and name in _TIMES
        number = parse_duration_ns(value) / NS_PER_S if in_words else float(value)
    except (ValueError, TraceError):
        number = float("nan")
    if not low <= number <= high:
        raise TraceError(f"arrival model '{kind}': {name} is '{value}', not a number from {low:g} to {high:g}")
    return number
