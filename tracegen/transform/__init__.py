"""Make a trace from a trace: another rate, a part of it, several in one. Each row stays a whole request."""

from tracegen.transform.files import (
    chain,
    clamp_trace,
    merge_traces,
    relabel_trace,
    repeat_trace,
    sample_trace,
    scale_trace,
    slice_trace,
    warp_trace,
)
from tracegen.transform.rates import scale, warp
from tracegen.transform.rows import clamp, cut, relabel, sample
from tracegen.transform.several import merge, repeat

__all__ = [
    "chain",
    "clamp",
    "clamp_trace",
    "cut",
    "merge",
    "merge_traces",
    "relabel",
    "relabel_trace",
    "repeat",
    "repeat_trace",
    "sample",
    "sample_trace",
    "scale",
    "scale_trace",
    "slice_trace",
    "warp",
    "warp_trace",
]
