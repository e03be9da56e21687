"""Compare two traces: how far their lengths, gaps, buckets, dependence and bursts are apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tracegen.describe import DISPERSION_WINDOWS_S, describe
from tracegen.durations import NS_PER_S
from tracegen.prefixes import hit_blocks, hit_shares
from tracegen.schema import read_metadata, read_trace

Sorted = NDArray[np.float64]
QUARTILES = (25, 50, 75)
SAMPLES = ("input_tokens", "output_tokens", "gaps_s")


@dataclass(frozen=True)
class Facts:
    """What is compared of a trace; a figure that it is too short or too uniform for is None."""

    requests: int
    figures: dict[str, float | None]
    dispersion: dict[str, float | None]  # by window, as `1s`
    buckets: dict[str, float]  # shares
    samples: dict[str, Sorted]  # of each of `SAMPLES`, in order


def facts(frame: pl.DataFrame, metadata: Mapping[str, Any]) -> Facts:
    """The facts of the checked trace `frame`; `metadata` say how many tokens a block of its prefix hashes has."""
    found = describe(frame, {})
    hashed = "prefix_hashes" in frame.columns and "block_tokens" in metadata
    return Facts(
        requests=frame.height,
        figures={
            "rate_rps": found["rate_rps"],
            "gap_cv": found["interarrival_s"]["cv"],
            "mean_input_tokens": found["input_tokens"]["mean"],
            "mean_output_tokens": found["output_tokens"]["mean"],
            "spearman": found["spearman"],
            **_hits(frame, int(metadata["block_tokens"]) if hashed else None),
        },
        dispersion=found["index_of_dispersion"],
        buckets={name: cell["share"] for name, cell in found["buckets"].items()},
        samples={
            "input_tokens": np.sort(frame["input_tokens"].to_numpy()).astype(np.float64),
            "output_tokens": np.sort(frame["output_tokens"].to_numpy()).astype(np.float64),
            "gaps_s": np.sort(np.diff(frame["arrival_ns"].to_numpy())) / NS_PER_S,
        },
    )


def _hits(frame: pl.DataFrame, block_tokens: int | None) -> dict[str, float | None]:
    """The prefix hit rate of all input tokens, and quartiles of the share of each input that is known."""
    names = [f"hit_share_p{q}" for q in QUARTILES]
    if block_tokens is None:
        return dict.fromkeys(["hit_rate", *names])
    inputs = frame["input_tokens"].cast(pl.Int64).to_numpy()
    hits = hit_blocks(frame)
    shares = np.quantile(hit_shares(hits, inputs, block_tokens), [q / 100 for q in QUARTILES]).tolist()
    return {"hit_rate": float(hits.sum() * block_tokens / inputs.sum()), **dict(zip(names, shares, strict=True))}


def ks_distance(a: Sorted, b: Sorted) -> float | None:
    """Kolmogorov-Smirnov: the largest difference of two samples' distribution functions; None where one is empty."""
    if not (a.size and b.size):
        return None
    at = np.concatenate((a, b))
    below = [np.searchsorted(x, at, side="right") / x.size for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def differences(a: Facts, b: Facts) -> dict[str, Any]:
    """How far `b` is from `a`.

    `ks` of each sample, `dispersion_ratio` b/a by window, `bucket_shares` b - a with the `worst_bucket_error`, and
    `spearman` and `hit_rate` b - a. What either lacks is None.
    """

    def less(name: str) -> float | None:
        x, y = a.figures[name], b.figures[name]
        return None if x is None or y is None else y - x

    ratios = {w: (a.dispersion[w], b.dispersion[w]) for w in a.dispersion}
    shares = {name: b.buckets[name] - a.buckets[name] for name in a.buckets}
    return {
        "ks": {name: ks_distance(a.samples[name], b.samples[name]) for name in SAMPLES},
        "dispersion_ratio": {w: y / x if x and y is not None else None for w, (x, y) in ratios.items()},
        "bucket_shares": shares,
        "worst_bucket_error": max(abs(share) for share in shares.values()),
        "spearman": less("spearman"),
        "hit_rate": less("hit_rate"),
    }


def compare(a: Facts, b: Facts) -> dict[str, Any]:
    """Both traces' figures and their differences, ready for JSON."""
    sides = {
        key: {"requests": x.requests, **x.figures, "index_of_dispersion": x.dispersion, "buckets": x.buckets}
        for key, x in (("a", a), ("b", b))
    }
    return {**sides, "differences": differences(a, b)}


def compare_traces(a: str | Path, b: str | Path) -> dict[str, Any]:
    """`compare` for the traces at `a` and `b`; raises `TraceError` when one cannot be read or breaks a rule."""
    first, second = (facts(read_trace(path), read_metadata(path)) for path in (a, b))
    return {"files": {"a": str(a), "b": str(b)}, **compare(first, second)}


@dataclass(frozen=True)
class Bounds:
    """How far apart two traces may be; None: as far as they like. `dispersion` is a factor, up or down."""

    ks: float | None = None
    bucket: float | None = None
    spearman: float | None = None
    dispersion: float | None = None


def beyond(found: Mapping[str, Any], bounds: Bounds) -> list[str]:
    """One line for each of the `differences` in `found` that `bounds` do not allow; what is None is beyond, too.

    Gaps are held to no bound: a rate apart from the other says enough.
    """
    checks: list[tuple[str, float | None, float | None]] = [
        (f"KS of {name}", found["ks"][name], bounds.ks) for name in ("input_tokens", "output_tokens")
    ]
    checks.append(("worst bucket", found["worst_bucket_error"], bounds.bucket))
    checks.append(("Spearman", found["spearman"], bounds.spearman))
    for window in (f"{w}s" for w in DISPERSION_WINDOWS_S):
        ratio = found["dispersion_ratio"][window]
        apart = max(ratio, 1 / ratio) if ratio else None
        checks.append((f"dispersion {window}, as a factor", apart, bounds.dispersion))
    return [
        f"{name}: " + ("not known" if value is None else f"{abs(value):.4g}") + f", and {bound:g} is allowed"
        for name, value, bound in checks
        if bound is not None and (value is None or abs(value) > bound)
    ]
