"""Input and output lengths, sampled from a mix: a mixture of bivariate lognormals fitted to a public trace."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracegen.errors import TraceError
from tracegen.streams import random_stream

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Tokens = NDArray[np.uint32]


@dataclass(frozen=True)
class Component:
    """One bivariate lognormal: ln(input) and ln(output) are normal with correlation `rho`; a sigma may be 0."""

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
    arrivals: dict[str, Any] = field(default_factory=dict)  # `model`, `rate_rps`, the model's parameters, `profile`
    structure: dict[str, Any] = field(default_factory=dict)  # fields of `tracegen.sessions.Structure`
    file: str | None = None  # of a mix that did not come with the program


def mix_names() -> list[str]:
    """The names of all mixes that come with the program."""
    names = (entry.name for entry in files("tracegen.mixes").iterdir())
    stems = (name.removesuffix(".toml") for name in names if name.endswith(".toml"))
    return sorted(stems, key=lambda stem: (stem.isupper(), stem))  # the pure buckets SS to LL last


def all_mixes() -> list[Mix]:
    """Every mix that comes with the program, by name."""
    return [load_mix(name) for name in mix_names()]


def load_mix(name: str) -> Mix:
    """The mix called `name`, or in the file `name`, which then ends in `.toml`.

    Raises `TraceError` that lists the mixes when there is none, or names what is wrong in the file.
    """
    path: Traversable = Path(name)
    if not name.endswith(".toml"):
        if name not in mix_names():
            raise TraceError(f"there is no mix '{name}'; the mixes are {', '.join(mix_names())}, or name a .toml file")
        path = files("tracegen.mixes") / f"{name}.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise TraceError(f"{name}: no such mix file; make one with 'tracegen fit', or use {mix_names()[0]}") from None
    except ValueError as error:
        raise TraceError(f"{name}: not a mix file ({error}); see the files of tracegen/mixes") from None
    return _mix(name.removesuffix(".toml").rpartition("/")[2], document, name)


def _mix(name: str, document: Mapping[str, Any], where: str) -> Mix:
    """The mix that `document` describes. Raises `TraceError` naming `where` and the key."""
    try:
        mix = Mix(
            name=name,
            description=document["description"],
            components=tuple(Component(**component) for component in document["components"]),
            low=tuple(document["low"]),
            high=tuple(document["high"]),
            source=document.get("source", {}),
            goodness=document.get("goodness", {}),
            source_buckets=document.get("source_buckets", {}),
            arrivals=document.get("arrivals", {}),
            structure=document.get("structure", {}),
            file=where if where.endswith(".toml") else None,
        )
        sound = all(
            all(map(math.isfinite, astuple(c))) and min(c.weight, c.sigma_in, c.sigma_out) >= 0 and abs(c.rho) <= 1
            for c in mix.components
        ) and all(1 <= low <= high < 2**32 for low, high in zip(mix.low, mix.high, strict=True))
    except KeyError as error:
        raise TraceError(f"{where}: key {error} is missing; see the files of tracegen/mixes") from None
    except (TypeError, ValueError) as error:
        raise TraceError(f"{where}: not a mix file ({error}); see the files of tracegen/mixes") from None
    if not (sound and len(mix.low) == 2 and sum(c.weight for c in mix.components) > 0):
        raise TraceError(f"{where}: a weight, sigma, rho, low or high is out of range; see the files of tracegen/mixes")
    return mix


def parse_mixes(text: str) -> tuple[tuple[Mix, float], ...]:
    """The mixes that `text` names with their shares, which sum to 1: `chat`, `chat:0.7,code:0.3`, `my.toml:2,chat:1`.

    Raises `TraceError` for an unknown mix, a share that is no positive number, and a mix that comes twice.
    """
    names, weights = [], []
    for part in [text] if _is_file(text) else text.split(","):
        name, _, weight = (part, "", "") if _is_file(part) else part.partition(":")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            weights.append(0.0)
        if not 0 < weights[-1] < float("inf"):
            raise TraceError(f"mix '{part}': '{weight}' is not a positive share; use for example chat:0.7,code:0.3")
        names.append(name.strip())
    mixes = [load_mix(name) for name in names]
    labels = [mix.name for mix in mixes]
    if len(set(labels)) < len(labels):
        raise TraceError(f"mix '{text}': a mix comes twice; name each once")
    return tuple((mix, weight / sum(weights)) for mix, weight in zip(mixes, weights, strict=True))


def _is_file(text: str) -> bool:
    """Whether `text` names a mix file that is there, commas and colons being part of its name."""
    return text.endswith(".toml") and Path(text).is_file()


def sample_lengths(mix: Mix, count: int, seed: int, window: int = 0, suffix: str = "") -> tuple[Tokens, Tokens]:
    """`count` input and output lengths in tokens, independent from row to row.

    Component, input and output draw from streams of their own, so the two lengths of a row depend on each other only
    through their component and its `rho`. Other windows, and other suffixes of the streams' names, are independent.
    """
    weight, mu_in, sigma_in, mu_out, sigma_out, rho = np.array(
        [(c.weight, c.mu_in, c.sigma_in, c.mu_out, c.sigma_out, c.rho) for c in mix.components]
    ).T
    k = random_stream(seed, f"component{suffix}", window).choice(len(weight), count, p=weight / weight.sum())
    z_in = random_stream(seed, f"input_tokens{suffix}", window).standard_normal(count)
    z_own = random_stream(seed, f"output_tokens{suffix}", window).standard_normal(count)
    z_out = rho[k] * z_in + np.sqrt(1 - rho**2)[k] * z_own
    return (
        _tokens(mu_in[k] + sigma_in[k] * z_in, mix.low[0], mix.high[0]),
        _tokens(mu_out[k] + sigma_out[k] * z_out, mix.low[1], mix.high[1]),
    )


def _tokens(log_tokens: NDArray[np.float64], low: int, high: int) -> Tokens:
    """Logarithms of lengths as whole tokens in [low, high]."""
    return np.clip(np.rint(np.exp(log_tokens)), low, high).astype(np.uint32)
