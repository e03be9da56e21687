"""The traces that cells replay: one a rate and repeat, the same for every setting, so that differences are paired."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from replay.sweep.plan import DEFAULT_DURATION_NS, Cell, SweepPlan
from tracegen.durations import NS_PER_S
from tracegen.schema import file_sha256, read_trace, write_trace
from tracegen.synthesize import synthesize_file
from tracegen.transform.files import scale_trace, slice_trace
from tracegen.workload import Workload, make_plan

TRACES = "traces"
_WHOLE = "trace.parquet"  # the trace that was given, or as much of it as was asked for


def trace_path(plan: SweepPlan, cell: Cell, folder: Path) -> Path:
    """What `cell` of the sweep in `folder` replays."""
    whole = plan.mix is None and cell.rate_rps is None
    return folder / TRACES / (_WHOLE if whole else f"{cell.trace_name}.parquet")


def source(plan: SweepPlan) -> dict[str, Any]:
    """What the traces are made of, as `sweep.json` says it.

    Raises `TraceError` for a trace that cannot be read, and a mix that cannot be synthesized at one of the rates.
    """
    if plan.trace is not None:
        read_trace(plan.trace)  # what is wrong with it is said before anything is written
        return {"path": str(plan.trace), "sha256": file_sha256(plan.trace), "duration_ns": plan.duration_ns}
    for rate in plan.rates():
        make_plan(_workload(plan, rate, plan.seed))
    return {"mix": plan.mix, "duration_ns": plan.duration_ns or DEFAULT_DURATION_NS, "arrivals": plan.arrivals}


def _workload(plan: SweepPlan, rate: float | None, seed: int) -> Workload:
    """The mix at one rate."""
    assert plan.mix is not None
    return Workload(plan.mix, rate, plan.duration_ns or DEFAULT_DURATION_NS, seed, plan.arrivals)


def make_trace(plan: SweepPlan, cell: Cell, folder: Path, say: Callable[[str], None]) -> Path:
    """The trace of `cell`, made when it is not there yet; the same plan gives the same bytes.

    A mix is synthesized at the cell's rate with the repeat's seed. A trace is brought to it with that seed, by thinning
    or superposing (`tracegen.transform.rates.scale`), which `say` is told. Raises `TraceError` when it cannot be.
    """
    path, seed = trace_path(plan, cell, folder), plan.seed + cell.repeat
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if plan.mix is not None:
        synthesize_file(path, _workload(plan, cell.rate_rps, seed))
        return path
    whole = _whole(plan, folder)
    if cell.rate_rps is not None:
        frame, metadata = scale_trace(whole, cell.rate_rps, seed)
        write_trace(frame, path, metadata)
        done = metadata["parameters"]
        say(
            f"{path.name}: {whole.name} from {done['rate_before_rps']:.4g} to {cell.rate_rps:.4g} requests/s by "
            f"{done['method']}, seed {seed}; its time is not warped"
        )
    return path


def _whole(plan: SweepPlan, folder: Path) -> Path:
    """The trace that was given, in the sweep's own folder."""
    assert plan.trace is not None
    path = folder / TRACES / _WHOLE
    if path.exists():
        return path
    if plan.duration_ns is not None:
        frame, metadata = slice_trace(plan.trace, 0, plan.duration_ns)
        write_trace(frame, path, metadata)
    else:
        partial = path.with_name(f".{path.name}.partial")
        shutil.copyfile(plan.trace, partial)
        partial.replace(path)
    return path


def span_s(plan: SweepPlan) -> float:
    """How long the requests of one cell take to arrive, s; for a trace, its own span."""
    if plan.mix is not None:
        return (plan.duration_ns or DEFAULT_DURATION_NS) / NS_PER_S
    assert plan.trace is not None
    last_ns = int(read_trace(plan.trace)["arrival_ns"][-1])
    return min(last_ns, plan.duration_ns or last_ns) / NS_PER_S
