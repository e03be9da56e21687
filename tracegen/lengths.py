"""Input and output lengths, sampled from a mix: a mixture of bivariate lognormals fitted to a public trace."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracegen.errors import TraceError
from tracegen.streams import random_stream


@dataclass(frozen=True)
class Component:
    """One bivariate lognormal: ln(input) and ln(output) are normal with correlation `rho`."""

    weight: float
    mu_in: float
    sigma_in: float
    mu_out: float
    sigma_out: float
    rho: float


@dataclass(frozen=True)
class Mix:
    """A mixture of components, the range its lengths are clipped to, and where it comes from."""

    name: str
    description: str
    components: tuple[Component, ...]
    low: tuple[int, int]  # input and output, tokens
    high: tuple[int, int]  # input and output, tokens
    source: dict[str, Any]  # dataset, file, licence, rows
    goodness: dict[str, Any]  # Kolmogorov-Smirnov distances to the source, error of bucket shares
    source_buckets: dict[str, float]  # share of the source's rows in each size bucket


def mix_names() -> list[str]:
    """The names of all mixes."""
    names = (entry.name for entry in files("tracegen.mixes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def all_mixes() -> list[Mix]:
    """Every mix, by name."""
    return [load_mix(name) for name in mix_names()]


def load_mix(name: str) -> Mix:
    """The mix called `name`. Raises `TraceError` that lists the mixes when there is none."""
    if name not in mix_names():
        raise TraceError(f"there is no mix '{name}'; the mixes are {', '.join(mix_names())}")
    document = tomllib.loads((files("tracegen.mixes") / f"{name}.toml").read_text(encoding="utf-8"))
    return Mix(
        name=name,
        description=document["description"],
        components=tuple(Component(**component) for component in document["components"]),
        low=tuple(document["low"]),
        high=tuple(document["high"]),
        source=document["source"],
        goodness=document["goodness"],
        source_buckets=document["source_buckets"],
    )


def sample_lengths(mix: Mix, count: int, seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """`count` input and output lengths in tokens, independent from row to row.

    Component, input and output draw from streams of their own, so the two lengths of a row depend on each other only
    through their component and its `rho`.
    """
    weight, mu_in, sigma_in, mu_out, sigma_out, rho = np.array(
        [(c.weight, c.mu_in, c.sigma_in, c.mu_out, c.sigma_out, c.rho) for c in mix.components]
    ).T
    k = random_stream(seed, "component").choice(len(weight), count, p=weight / weight.sum())
    z_in = random_stream(seed, "input_tokens").standard_normal(count)
    z_own = random_stream(seed, "output_tokens").standard_normal(count)
    z_out = rho[k] * z_in + np.sqrt(1 - rho[k] ** 2) * z_own
    return (
        _tokens(mu_in[k] + sigma_in[k] * z_in, mix.low[0], mix.high[0]),
        _tokens(mu_out[k] + sigma_out[k] * z_out, mix.low[1], mix.high[1]),
    )


def _tokens(log_tokens: NDArray[np.float64], low: int, high: int) -> NDArray[np.uint32]:
    """Logarithms of lengths as whole tokens in [low, high]."""
    return np.clip(np.rint(np.exp(log_tokens)), low, high).astype(np.uint32)
