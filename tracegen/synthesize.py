"""Synthesize a trace: arrivals from a model, lengths from a mix, each from random streams of its own."""

import math
from typing import Any

import numpy as np
import polars as pl

from tracegen.arrivals import ARRIVALS
from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import TraceError
from tracegen.lengths import load_mix, sample_lengths
from tracegen.schema import check_trace
from tracegen.streams import random_stream

MAX_ROWS = 20_000_000  # at about 250 bytes each while they are made, 5 GB


def synthesize(
    mix: str, rate_rps: float, duration_ns: int, seed: int, *, arrivals: str = "poisson"
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """A trace of `mix` at a mean of `rate_rps` over [0, `duration_ns`), and the metadata to write with it.

    The same arguments give the same rows. Mixes share their arrivals at equal seed, rate and duration, so that a
    comparison of two mixes is not one of two arrival patterns.

    Raises `TraceError` for an unknown mix or arrival model, a rate that is not positive, a negative seed, more rows
    than fit in memory, and when no request happens to arrive.
    """
    lengths = load_mix(mix)
    if arrivals not in ARRIVALS:
        raise TraceError(f"there is no arrival model '{arrivals}'; the models are {', '.join(ARRIVALS)}")
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise TraceError(f"rate {rate_rps:g} is not a positive number of requests per second")
    if duration_ns <= 0:
        raise TraceError(f"duration {duration_ns} ns is not positive")
    expected = rate_rps * duration_ns / NS_PER_S
    if expected > MAX_ROWS:
        raise TraceError(
            f"{expected:.3g} requests would be expected, and at most {MAX_ROWS:,} are made at once; "
            "use a lower rate or a shorter duration"
        )
    arrival_ns = ARRIVALS[arrivals](rate_rps, duration_ns, random_stream(seed, "arrivals"))
    if arrival_ns.size == 0:
        raise TraceError(
            f"no request arrived in {format_duration(duration_ns)} at {rate_rps:g} requests/s "
            f"({expected:.2g} expected); use a longer duration, a higher rate or another seed"
        )
    input_tokens, output_tokens = sample_lengths(lengths, arrival_ns.size, seed)
    frame = pl.DataFrame(
        {
            "request_id": np.arange(arrival_ns.size, dtype=np.uint64),
            "arrival_ns": arrival_ns,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
        }
    ).with_columns(label=pl.lit(mix))
    metadata = {
        "generator": "tracegen synth",
        "seed": seed,
        "parameters": {"mix": mix, "rate_rps": rate_rps, "duration_ns": duration_ns, "arrivals": arrivals},
        "lengths_fitted_to": lengths.source,
    }
    return check_trace(frame, "the synthesized trace"), metadata
