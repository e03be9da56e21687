"""Describe a trace: when its requests arrive and how long they are, as one JSON document and as text."""

import functools
import math
import operator
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.buckets import BUCKETS, bucket_expr
from tracegen.durations import NS_PER_S
from tracegen.schema import read_metadata, read_trace

DISPERSION_WINDOWS_S = (1, 10, 60)
MIN_WINDOWS = 10  # the standard error of a variance from 10 counts is already half its value
TIME_BINS = 60
_NAMED_ROWS = 2**20  # at a time: a bucket's name takes five times what its lengths do

# Why a figure can be missing, by its dotted name.
WHY_NONE = {
    "rate_rps": "fewer than two arrivals differ",
    "interarrival_s.mean": "a single request has no gap",
    "interarrival_s.cv": "fewer than two gaps, or all of them zero",
    **{
        f"index_of_dispersion.{w}s": f"fewer than {MIN_WINDOWS} full windows of {w} s in the trace"
        for w in DISPERSION_WINDOWS_S
    },
    "input_tokens.cv": "a single request has no variance",
    "output_tokens.cv": "a single request has no variance",
    "spearman": "all inputs or all outputs are of one length",
}


def span_ns(frame: pl.DataFrame) -> int:
    """The time from first to last arrival."""
    return int(frame["arrival_ns"][-1] - frame["arrival_ns"][0])


def rate_rps(frame: pl.DataFrame) -> float | None:
    """The trace's mean rate in requests/s: (n - 1) gaps over the time from first to last arrival.

    That is the reciprocal of the mean gap. n over that time would count one gap too many, which at 10 requests is
    10 %. None when fewer than two arrivals differ.
    """
    elapsed_ns = span_ns(frame)
    return (frame.height - 1) / (elapsed_ns / NS_PER_S) if elapsed_ns else None


def describe(frame: pl.DataFrame, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say about the checked trace `frame`, ready for JSON.

    A figure that the trace is too short or too uniform for is None, and `reasons` says why under its dotted name. CV is
    the coefficient of variation (n - 1 in the variance), quantiles interpolate linearly, Spearman's correlation gives
    ties their mean rank. `index_of_dispersion` is variance over mean of the counts in full windows from the first
    arrival on; a Poisson process has 1.
    """
    gaps_ns = frame["arrival_ns"].diff().drop_nulls()
    mean_ns = gaps_ns.mean()
    figures = {
        "requests": frame.height,
        "span_s": span_ns(frame) / NS_PER_S,
        "rate_rps": rate_rps(frame),
        "interarrival_s": {"mean": None if mean_ns is None else mean_ns / NS_PER_S, "cv": _cv(gaps_ns)},  # type: ignore[operator]
        "index_of_dispersion": {f"{w}s": dispersion(frame["arrival_ns"], w) for w in DISPERSION_WINDOWS_S},
        "input_tokens": _lengths(frame["input_tokens"]),
        "output_tokens": _lengths(frame["output_tokens"]),
        "spearman": spearman(frame),
        "buckets": {b: {"requests": n, "share": n / frame.height} for b, n in bucket_counts(frame).items()},
    }
    return {
        **figures,
        "reasons": {name: why for name, why in WHY_NONE.items() if _look_up(figures, name) is None},
        "histograms": {
            "input_tokens": _doubling_bins(frame["input_tokens"]),
            "output_tokens": _doubling_bins(frame["output_tokens"]),
            "arrivals": _time_bins(frame),
        },
        "metadata": dict(metadata),
    }


def describe_trace(path: str | Path) -> dict[str, Any]:
    """`describe` for the trace at `path`; raises `TraceError` when it cannot be read or breaks a rule."""
    return describe(read_trace(path), read_metadata(path))


def _look_up(document: Mapping[str, Any], name: str) -> Any:
    """The value at a dotted name."""
    return functools.reduce(operator.getitem, name.split("."), document)


def _cv(values: pl.Series) -> float | None:
    """Standard deviation over mean; None for fewer than two values or a mean of zero."""
    mean, deviation = values.cast(pl.Float64).mean(), values.cast(pl.Float64).std()
    return float(deviation / mean) if mean and deviation is not None else None  # type: ignore[operator,arg-type]


def _lengths(tokens: pl.Series) -> dict[str, float | None]:
    """Moments and quantiles of one side's lengths."""
    quantiles = {f"p{q}": tokens.quantile(q / 100, interpolation="linear") for q in (10, 50, 90, 99)}
    return {"mean": float(tokens.mean()), "cv": _cv(tokens), **quantiles, "max": int(tokens.max())}  # type: ignore[arg-type]


def dispersion(arrival_ns: pl.Series, window_s: int) -> float | None:
    """Variance over mean of the requests in each full window of `window_s`; None when there are too few windows."""
    since_ns = arrival_ns - arrival_ns[0]
    windows = int(since_ns[-1]) // (window_s * NS_PER_S)
    if windows < MIN_WINDOWS:
        return None
    index = since_ns // (window_s * NS_PER_S)
    # Whole numbers, so exact in any order; empty windows add nothing, and a sparse trace may have a great many.
    counts = index.filter(index < windows).value_counts()["count"].to_list()
    total, squares = sum(counts), sum(count**2 for count in counts)
    return float((windows * squares - total**2) / ((windows - 1) * total))


def spearman(frame: pl.DataFrame) -> float | None:
    """Rank correlation of input and output length; None where either does not vary."""
    if frame["input_tokens"].n_unique() == 1 or frame["output_tokens"].n_unique() == 1:
        return None
    ranks = frame.select(pl.col("input_tokens", "output_tokens").rank("average"))
    return float(ranks.select(pl.corr("input_tokens", "output_tokens")).item())


def bucket_counts(frame: pl.DataFrame) -> dict[str, int]:
    """The requests in each bucket, all twelve, in order."""
    name = bucket_expr(pl.col("input_tokens"), pl.col("output_tokens")).alias("bucket")
    counts: Counter[str] = Counter()
    for part in frame.iter_slices(_NAMED_ROWS):
        counts.update(dict(part.select(name)["bucket"].value_counts().iter_rows()))
    return {bucket: counts[bucket] for bucket in BUCKETS}


def _doubling_bins(tokens: pl.Series) -> list[dict[str, int]]:
    """How many lengths lie in [1, 2), [2, 4), [4, 8) ... from the first bin used to the last; bounds inclusive."""
    power = 31 - tokens.bitwise_leading_zeros().cast(pl.Int64)  # of UInt32: the whole part of log2, exactly
    counts = dict(power.value_counts().iter_rows())
    return [
        {"from": 2**k, "to": 2 ** (k + 1) - 1, "requests": counts.get(k, 0)}
        for k in range(min(counts), max(counts) + 1)
    ]


def _time_bins(frame: pl.DataFrame) -> list[dict[str, float]]:
    """Requests and rate in each of `TIME_BINS` equal parts of the span; none where the span is zero."""
    elapsed_ns = span_ns(frame)
    if not elapsed_ns:
        return []
    width_ns = math.ceil((elapsed_ns + 1) / TIME_BINS)
    counts = dict(((frame["arrival_ns"] - frame["arrival_ns"][0]) // width_ns).value_counts().iter_rows())
    width_s = width_ns / NS_PER_S
    return [
        {"from_s": k * width_s, "requests": counts.get(k, 0), "rate_rps": counts.get(k, 0) / width_s}
        for k in range(elapsed_ns // width_ns + 1)
    ]
