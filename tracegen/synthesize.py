"""Synthesize a trace: arrivals from a model, lengths from mixes, and what ties requests together."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from tracegen.durations import NS_PER_S, format_duration
from tracegen.errors import TraceError
from tracegen.prefixes import HitTally
from tracegen.schema import check_trace
from tracegen.sessions import Structure
from tracegen.windows import windows
from tracegen.workload import Plan, Workload, make_plan
from tracegen.writer import TraceWriter

MAX_ROWS = 100_000_000  # in memory, 2.4 GB of them without sessions; files have no bound but their disk
BYTES_A_ROW = 10  # in a file without prefixes


def synthesize(
    mix: str,
    rate_rps: float | str | None,
    duration_ns: int,
    seed: int,
    *,
    arrivals: str = "poisson",
    profile: str | None = None,
    structure: Structure | None = None,
    shard: tuple[int, int] = (1, 1),
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """A trace of `mix` at a mean of `rate_rps` over [0, `duration_ns`), and the metadata to write with it.

    The arguments are those of `Workload`, and the same ones give the same rows. Mixes share their arrivals at equal
    seed, rate and duration, so that a comparison of two mixes is not one of two arrival patterns.

    Raises `TraceError` for what is unknown or out of range, a negative seed, and when no request happens to arrive.
    """
    plan = make_plan(Workload(mix, rate_rps, duration_ns, seed, arrivals, profile, structure, shard))
    if (expected := _expected(plan)) > MAX_ROWS:
        raise TraceError(
            f"{expected:.3g} requests are expected, and at most {MAX_ROWS:,} are made in memory; "
            "use a lower rate, a shorter duration, or a file ('tracegen synth', synthesize_file)"
        )
    tally = HitTally(plan.structure.block_tokens)
    parts = list(windows(plan, tally))
    if not parts:
        raise _nothing(plan)
    return check_trace(pl.concat(parts), "the synthesized trace"), {**plan.metadata, **_hits(plan, tally)}


def synthesize_file(
    path: str | Path, workload: Workload, *, on_progress: Callable[[int, float], None] = lambda _rows, _expected: None
) -> dict[str, Any]:
    """Write the trace of `workload` to `path`, in memory for a window of it; what is there is replaced.

    `on_progress` is called with the rows that are written and those that are expected.

    Returns its figures as `tracegen.render.headline` takes them, and its metadata. Raises what `synthesize` does, and
    `TraceError` when `path` cannot be written.
    """
    plan = make_plan(workload)
    expected = _expected(plan)
    needed, free = expected * BYTES_A_ROW, _free_bytes(Path(path))
    if needed > free:
        raise TraceError(
            f"{path}: {expected:.3g} requests are expected, about {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free there; use a lower rate, a shorter duration or another disk"
        )
    tally = HitTally(plan.structure.block_tokens)
    with TraceWriter(path, plan.metadata) as writer:
        for part in windows(plan, tally):
            writer.write(part)
            on_progress(writer.rows, expected)
        if not writer.rows:
            raise _nothing(plan)
        writer.add_metadata(_hits(plan, tally))
    span_s = (writer.last_ns - writer.first_ns) / NS_PER_S
    return {
        "requests": writer.rows,
        "span_s": span_s,
        "rate_rps": (writer.rows - 1) / span_s if span_s else None,
        "input_tokens": {"mean": writer.input_tokens / writer.rows},
        "output_tokens": {"mean": writer.output_tokens / writer.rows},
        "metadata": {**plan.metadata, **_hits(plan, tally)},
    }


def _hits(plan: Plan, tally: HitTally) -> dict[str, Any]:
    """What is known of prefixes at the end only."""
    return {"prefix_hit_rate": tally.rate} if plan.structure.has_prefixes else {}


def _expected(plan: Plan) -> float:
    """How many requests are expected in the plan's shard."""
    start_s, end_s = (ns / NS_PER_S for ns in plan.shard_ns)
    return plan.rate.cut(start_s, end_s).mean_rps * (end_s - start_s) if end_s > start_s else 0.0


def _free_bytes(path: Path) -> int:
    """How much fits on the disk that `path` is to be on."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return shutil.disk_usage(folder).free


def _nothing(plan: Plan) -> TraceError:
    """The error that no request arrived."""
    expected = _expected(plan)
    start_ns, end_ns = plan.shard_ns
    rate_rps = expected / max(end_ns - start_ns, 1) * NS_PER_S
    return TraceError(
        f"no request arrived in {format_duration(end_ns - start_ns)} at {rate_rps:g} requests/s "
        f"({expected:.2g} expected); use a longer duration, a higher rate or another seed"
    )
