"""Going on with a run that was cut short: what is left of it, and its directory made ready for another stretch.

Tables of the stretches before stay where they are, as parts with names of their own, so the directory can be read at
any moment and those who write parts begin anew. Times of all stretches are of one clock, which is why a run cannot go
on after its machine was booted again; one that had all its answers can be finished.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.again import OPTIONS, find_trace, options_of
from replay.clock import NS_PER_S
from replay.hold import hold
from replay.plan import RunOptions
from replay.records import recover
from replay.rundir import Run, read_manifest
from replay.source import Survey, TraceSource
from replay.summary import last_on_record, not_begun, rows_of, stretches
from replay.tables import TABLES
from tracegen.console import plural
from tracegen.errors import ReplayError
from tracegen.schema import write_parquet

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# What a run that has ended says of its end.
_ENDED = {
    "measure_end_ns", "requests", "valid", "invalid_because", "client_error", "failure", "not_restored", "no_steps",
    "gpus_shared_with",
}  # fmt: skip
_BEFORE = "before-{:06d}.parquet"  # a part of the stretches before
# What a command may give beside --resume.
_FREE = {"trace", "resume", "output", "api_key"}


def boot_id() -> str | None:
    """What tells this boot of the machine from others; None where the system does not say."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else None


def resumed_options(given: RunOptions) -> RunOptions:
    """The options that the run at `given.resume` was begun with, reading what it was to send from its own trace.

    A run that was killed before a request was due begins anew, in the same directory, which is emptied. Raises
    `ReplayError` when `given` asks for anything else, or the run cannot go on.
    """
    run_dir = given.resume
    assert run_dir is not None
    plain = RunOptions(given.trace)
    names = [field.name for field in fields(RunOptions) if field.name not in _FREE]
    changed = [name for name in names if getattr(given, name) != getattr(plain, name)]
    if changed:
        option = OPTIONS[changed[0]]
        name = option if isinstance(option, str) else " or ".join(filter(None, option))
        raise ReplayError(f"{name} with --resume: a run goes on as it was begun; leave it out, or begin another run")
    if given.output is not None and given.output.resolve() != run_dir.resolve():
        raise ReplayError(f"-o {given.output} with --resume: a run goes on in its own directory, {run_dir}")
    manifest = read_manifest(run_dir)
    begun = options_of(manifest)
    run = Run(run_dir, manifest)
    if not_begun(run):
        return replace(_anew(run, begun), output=run_dir, api_key=given.api_key)
    _check(run_dir, manifest)
    # The run's own trace was cut when it was begun.
    own = replace(begun, trace=run_dir / "trace.parquet", duration_ns=None, num_prompts=None, time_scale=1.0, ramp_ns=0)
    return replace(own, output=run_dir, resume=run_dir, api_key=given.api_key)


def _anew(run: Run, begun: RunOptions) -> RunOptions:
    """Remove what a run has prepared that was killed before it was measured; its options, with its trace found again.

    Raises `ReplayError` where it still goes on, or its trace is not there.
    """
    trace = find_trace(run, begun)
    if trace is None:
        raise ReplayError(f"{run.path}: no request was due yet, and {begun.trace} is not there to begin it anew")
    with hold(run.path):
        for path in run.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return replace(begun, trace=trace, resume=None)


def _check(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `ReplayError` for a run that cannot go on."""
    if manifest.get("clock") == "virtual":
        raise ReplayError(f"{run_dir}: a run in virtual time does not go on; repeat it, it takes minutes")
    if not manifest.get("stretches") or not (run_dir / "trace.parquet").is_file():
        raise ReplayError(f"{run_dir}: no request was due yet (state: {manifest['state']}); begin another run")
    if manifest["state"] != "finishing" and _booted_since(manifest):  # to finish a run takes no clock
        raise _other_clock(run_dir)


def _booted_since(manifest: Mapping[str, Any]) -> bool:
    """Whether the machine was booted since a run was cut short, or is another, as far as can be told."""
    before = manifest["stretches"][-1]["boot_id"]
    return before is None or before != boot_id()


def _other_clock(run_dir: Path) -> ReplayError:
    """The refusal to send more of a run after another boot."""
    return ReplayError(
        f"{run_dir}: this is another machine, or it was booted since the run was cut short; times of both cannot "
        "be put together, so begin another run"
    )


UNANSWERED = ("aborted", "connect_error")  # statuses of requests that are sent again
_NONE = np.zeros(0, np.uint64)
RECORDED = ("requests", "warmup")  # the tables that have the records of requests


@dataclass(frozen=True)
class TakenUp:
    """A run that goes on."""

    manifest: dict[str, Any]  # as it was left, its stretches closed
    source: TraceSource  # of the requests that remain
    remaining: Survey  # of these
    recorded: int  # requests that are on record and stay so
    unanswered: int  # of those that remain, how many were on record: aborted, or the server was not there
    first_steps: dict[int, int]  # of each instance, the number of its next step
    counters: dict[int, tuple[int, int]]  # of each GPU: when its energy counter was read last, ns; what it showed, mJ

    def goes_on(self, fresh: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest to go on with; of `fresh`, a new run's, what is found out anew."""
        kept = {key: value for key, value in self.manifest.items() if key not in _ENDED}
        anew = {key: fresh[key] for key in ("state", "instances", "gpus", "workers", "versions", "verdicts")}
        return {**kept, **anew, "clock_anchors": [*kept["clock_anchors"], *fresh["clock_anchors"]]}

    def keep_idle(self, manifest: Mapping[str, Any]) -> None:
        """Idle power before the run is that before its first stretch, where it was measured."""
        before = {entry["gpu"]: entry["idle_power_w"] for entry in self.manifest["gpus"] if entry.get("idle_power_w")}
        for entry in manifest["gpus"]:
            if entry["gpu"] in before:
                entry["idle_power_w"] = before[entry["gpu"]]

    @property
    def news(self) -> str:
        """What is left, for the first line."""
        if not self.remaining.requests:
            all_ = plural(self.recorded, "request")
            return f"all {all_} on record: what is left is to put the tables together and to judge the run"
        again = f", {self.unanswered:,} of them sent before and not answered" if self.unanswered else ""
        return f"going on: {plural(self.recorded, 'request')} on record, {self.remaining.requests:,} left{again}"


def take_up(run_dir: Path) -> TakenUp:
    """Make the run in `run_dir`, which nobody writes into now, ready to go on.

    What its workers had logged is stored; its tables become parts; rows of requests that were aborted or found no
    server are dropped, and the engine's work for requests that are sent again is nobody's. Nothing remains of a run
    that was killed while it was finished. Raises `ReplayError` when a run that was judged has nothing left to send.
    """
    _restore(run_dir)
    recover(run_dir)
    run = Run.open(run_dir)
    booted = _booted_since(run.manifest)  # then what is on record is final
    resent = pl.lit(value=False) if booted else pl.col("status").is_in(UNANSWERED)
    source = TraceSource(run_dir / "trace.parquet", without=_ended(run, resent))
    remaining, planned = source.survey(), rows_of(run, "trace")
    if booted and remaining.requests:
        raise _other_clock(run_dir)
    if not remaining.requests and run.manifest["verdicts"]:
        why = "" if run.manifest["state"] == "complete" else "; its tables can be read as they are"
        raise ReplayError(f"{run_dir}: nothing is left to send: all {planned:,} requests are on record{why}")
    manifest = {**run.manifest, "stretches": closed(run)}
    first_steps, counters = _next_steps(run), _last_counters(run)
    for table in TABLES:
        if table not in {"trace", "truth"}:
            _set_aside(run_dir, table)
    (run_dir / "truth.parquet").unlink(missing_ok=True)  # of a run that had ended: it is computed anew
    again = pl.Series(
        np.concatenate([_NONE, *(batch["request_id"].to_numpy() for batch in source.batches())])
    ).implode()
    unanswered = sum(_rewrite(run_dir, table, resent, drop=True) for table in RECORDED)
    for table in ("segments", "arrivals"):
        _rewrite(run_dir, table, pl.col("request_id").is_in(again), drop=False)
    return TakenUp(manifest, source, remaining, planned - remaining.requests, unanswered, first_steps, counters)


def _ended(run: Run, resent: pl.Expr) -> npt.NDArray[np.uint64]:
    """The ids of requests on record but for those that are `resent`, in order: 8 bytes of each are held."""
    tables = [run.batches(table, ["request_id", "status"]) for table in RECORDED if run.has(table)]
    ids = [rows.filter(~resent)["request_id"].to_numpy() for batches in tables for rows in batches]
    return np.sort(np.concatenate([_NONE, *ids]))


def begin_stretch(manifest: dict[str, Any], start_ns: int, warm_ns: int = 0) -> int:
    """Note in `manifest` that requests are sent from `start_ns` on; since when they are measured.

    That is from `warm_ns` on, the end of the warm-up, unless a stretch before has come to what is measured.
    """
    mine = {"start_ns": start_ns, "end_ns": None, "boot_id": boot_id()}
    before = manifest.get("stretches", [])
    manifest |= {"state": "running", "stretches": [*before, mine]}
    measured = [stretch for stretch in before if stretch["end_ns"] > manifest["measure_start_ns"]]
    if not measured:
        manifest["measure_start_ns"] = max(start_ns, warm_ns)
    if before:
        manifest["paused_s"] = _paused_s([*measured, mine])
    return int(manifest["measure_start_ns"])


def end_stretch(manifest: Mapping[str, Any], end_ns: int) -> dict[str, Any]:
    """What of the manifest changes when the stretch that was begun ends, at `end_ns` or as soon as it had begun.

    A run that ends within its warm-up has measured nothing: its window is empty.
    """
    *before, mine = manifest["stretches"]
    end_ns = max(end_ns, mine["start_ns"] + 1)
    start_ns = min(manifest["measure_start_ns"], end_ns)
    return {
        "measure_start_ns": start_ns, "measure_end_ns": end_ns, "stretches": [*before, {**mine, "end_ns": end_ns}]
    }  # fmt: skip


def closed(run: Run) -> list[dict[str, Any]]:
    """The manifest's stretches; the last one of a run that was killed ends with the last that is on record."""
    windows = stretches(run.manifest, last_on_record(run))
    return [{**s, "end_ns": end_ns} for s, (_, end_ns) in zip(run.manifest["stretches"], windows, strict=True)]


def _paused_s(parts: Sequence[Mapping[str, Any]]) -> float:
    """How long a run lay between its stretches, s."""
    return float(sum(after["start_ns"] - before["end_ns"] for before, after in pairwise(parts))) / NS_PER_S


def _next_steps(run: Run) -> dict[int, int]:
    """The number of each instance's next step: one more than its last on record."""
    last: dict[int, int] = {}
    for batch in run.batches("steps", ["instance", "step"]) if run.has("steps") else ():
        for instance, step in batch.group_by("instance").agg(pl.col("step").max()).iter_rows():
            last[instance] = max(step, last.get(instance, 0))
    return {instance: step + 1 for instance, step in last.items()}


def _last_counters(run: Run) -> dict[int, tuple[int, int]]:
    """When each GPU's energy counter was read last, and what it showed."""
    last: dict[int, tuple[int, int]] = {}
    for batch in run.batches("power", ["t_ns", "gpu", "energy_mj"]) if run.has("power") else ():
        for gpu, t_ns, energy_mj in (
            batch.drop_nulls("energy_mj")
            .sort("t_ns")
            .group_by("gpu")
            .last()
            .select("gpu", "t_ns", "energy_mj")
            .iter_rows()
        ):
            last[gpu] = max((t_ns, energy_mj), last.get(gpu, (t_ns, energy_mj)))
    return last


def _staged(run_dir: Path, table: str) -> Path:
    """The folder of a table's parts, while it cannot have its name yet."""
    return run_dir / f".{table}.parts-before"


def _restore(run_dir: Path) -> None:
    """Mend what a kill left in the middle of `_set_aside`, or while parts were made one table."""
    for table in TABLES:
        path, parts = run_dir / f"{table}.parquet", run_dir / f".{table}.parts"
        for folder in (_staged(run_dir, table), parts):
            if not path.exists() and folder.is_dir():
                folder.rename(path)
        shutil.rmtree(parts, ignore_errors=True)
        (run_dir / f".{table}.whole.parquet").unlink(missing_ok=True)


def _set_aside(run_dir: Path, table: str) -> None:
    """Give the parts of `table` names that no writer uses; a table that is one file becomes a part.

    The names sort before those of writers, so rows stay in the order in which they were written.
    """
    path, folder = run_dir / f"{table}.parquet", _staged(run_dir, table)
    if path.is_file():
        folder.mkdir(exist_ok=True)
        part = folder / _BEFORE.format(0)
        part.unlink(missing_ok=True)
        os.link(path, part)
        path.unlink()
        folder.rename(path)
    elif path.is_dir():
        parts = sorted(path.glob("*-*.parquet"))
        before = [part for part in parts if part.name.startswith("before-")]
        for number, part in enumerate(parts[len(before) :], len(before)):
            part.rename(path / _BEFORE.format(number))


def _rewrite(run_dir: Path, table: str, which: pl.Expr, *, drop: bool) -> int:
    """Drop the rows of `table` that are `which`, or make their `request_id` null, part by part; how many they were."""
    count = 0
    for part in sorted((run_dir / f"{table}.parquet").glob("*-*.parquet")):
        frame = pl.read_parquet(part)
        found = frame.filter(which.fill_null(value=False)).height
        if found and drop:
            frame = frame.filter(~which.fill_null(value=False))
        elif found:
            unowned = pl.when(which.fill_null(value=False)).then(None).otherwise("request_id")
            frame = frame.with_columns(unowned.alias("request_id").cast(frame.schema["request_id"]))
        if found and frame.is_empty():
            part.unlink()
        elif found:
            write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), part)
        count += found
    return count
