"""What `replay` says that a run drew: the same counters, but taken otherwise at the ends of the measured window.

`replay` takes each counter in a straight line between the polls around either end, and leaves out the time between
the stretches of a run that was resumed. Attribution takes it from one of the counter's updates to the next, over the
whole window as far as it was read.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import polars as pl

from replay.rundir import Run, read_group, row_groups

NEAR_NS = 1_000_000_000  # polls before and after an end are within it
TOLD_REL = 0.001  # a difference that is worth a word


def polled_j(run: Run, gpus: Sequence[int]) -> float | None:
    """Joules of `gpus` as `replay` counts them, or None where it would not: no window, no counter, several hosts."""
    manifest = run.manifest
    window = start_ns, end_ns = manifest.get("measure_start_ns"), manifest.get("measure_end_ns")
    whole = {"start_ns": start_ns, "end_ns": end_ns}
    stretches = [(entry.get("start_ns"), entry.get("end_ns")) for entry in manifest.get("stretches") or [whole]]
    if len(manifest.get("hosts") or []) > 1 or None in chain(window, *stretches):
        return None
    # What was sent before the window is a warm-up.
    ends = [end for since, until in stretches if until > start_ns for end in (max(since, start_ns), until)]
    if not ends:
        return None
    near = [
        group
        for group in row_groups(run.path, "power", "t_ns")
        if group.low is None or group.high is None
        or any(group.low - NEAR_NS <= end <= group.high + NEAR_NS for end in ends)
    ]  # fmt: skip
    read = [read_group(group, "power", ("t_ns", "gpu", "energy_mj")).drop_nulls() for group in near]
    rows = pl.concat(read).sort("t_ns") if read else pl.DataFrame()
    joules = 0.0
    for gpu in gpus:
        mine = rows.filter(pl.col("gpu") == gpu) if rows.height else rows
        if mine.height < 2 or mine["t_ns"][0] > min(ends) or mine["t_ns"][-1] < max(ends):
            return None
        at = np.interp(ends, mine["t_ns"].to_numpy(), mine["energy_mj"].to_numpy())
        joules += float((at[1::2] - at[::2]).sum()) / 1e3
    return joules


def edge_note(run: Run, measured_j: float, duration_s: float) -> str | None:
    """What to say where `replay` prints another sum than the `measured_j` of the serving GPUs' counters."""
    listed = [int(gpu) for entry in run.manifest.get("instances") or [] for gpu in entry.get("gpus") or []]
    told_j = polled_j(run, listed)
    if told_j is None or not measured_j or abs(told_j / measured_j - 1) <= TOLD_REL:
        return None
    paused_s = float(run.manifest.get("paused_s") or 0.0)
    window_s = (run.manifest["measure_end_ns"] - run.manifest["measure_start_ns"]) / 1e9
    if paused_s:
        why = f"without the {paused_s:.1f} s between its stretches"
    elif window_s - duration_s > TOLD_REL * window_s:
        why = f"with the {window_s - duration_s:.1f} s at the window's ends that were not read"
    else:
        why = "from the polls at the window's ends, not from the counters' updates"
    return f"replay's own sum is {told_j / 1e3:,.2f} kJ ({100 * (told_j / measured_j - 1):+z.2f} %): {why}"
