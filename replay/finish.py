"""After the last request: make each table one file, compute a simulated run's truth, judge the run."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from replay import verdicts
from replay.compaction import Key, Merge, compact
from replay.engines.base import Engine
from replay.judge import judge
from replay.prepare import clear_helpers
from replay.resume import end_stretch
from replay.rundir import Run, write_manifest
from replay.summary import ENDED, rows_of
from replay.tables import TABLES
from tracegen.schema import write_parquet

_SORT = {
    "requests": ["scheduled_ns", "request_id"],
    "warmup": ["scheduled_ns", "request_id"],
    "steps": ["instance", "step"],
    "segments": ["instance", "first_step", "request_id"],
    "arrivals": ["instance", "arrival_ns"],
    "power": ["t_ns", "gpu"],
    "cpu_energy": ["t_ns", "domain"],
    "server_metrics": ["t_ns"],
}
_ALIKE = ["instance", "request_id", "kind", "tokens_per_step"]


def finish_killed(run_dir: Path, manifest: dict[str, Any], engine: Engine) -> None:
    """Finish a run that was killed when all its requests were on record; `manifest` as `take_up` has left it.

    Idle power after the run stays unknown where it was not measured before the kill, and so do the client's delays.
    """
    if "measure_end_ns" not in manifest:  # it was killed before it had noted how the sending ended
        count = rows_of(Run(run_dir, manifest), "trace")
        manifest |= end_stretch(manifest, manifest["stretches"][-1]["end_ns"])
        manifest["requests"] = {"planned": count, "sent": count, "ended": count}
    if manifest["state"] not in ENDED:
        manifest["state"] = "finishing"
    clear_helpers(run_dir)
    finish_run(run_dir, manifest, engine, None)


def finish_run(run_dir: Path, manifest: dict[str, Any], engine: Engine, late_ns: Sequence[int] | None) -> None:
    """Turn the parts in `run_dir` into whole tables and write the last manifest.

    `manifest["state"]` becomes `complete`, unless it says that the run was interrupted or failed. `late_ns` are the
    event loop's delays; None where they are not known any more.
    """
    for table in TABLES:
        compact(run_dir, table, _SORT.get(table, ()), _MERGED.get(table))
    # An engine that died took its last steps along, and with them what they truly cost.
    unwanted = manifest["state"] == "failed" or manifest["arguments"].get("truth") is False
    truth = None if unwanted else engine.truth(run_dir)
    if truth is not None:
        write_parquet(truth.to_arrow(compat_level=pl.CompatLevel.oldest()), run_dir / "truth.parquet")
    judged = judge(run_dir, manifest, late_ns)
    if manifest["state"] == "finishing":
        manifest["state"] = "complete"
    manifest["verdicts"] = [asdict(verdict) for verdict in judged]
    manifest |= verdicts.validity(manifest["state"], judged, manifest.get("failure"))
    write_manifest(run_dir, manifest)


def merge_segments(segments: pl.DataFrame) -> pl.DataFrame:
    """`segments` with rows joined where one goes on as the other left off.

    A recorder cuts open segments at each flush, so that a killed run can be read; a whole run needs no cuts. Rows of
    foreign requests (null `request_id`) stay: which of them belong together is not known.
    """
    ours = segments.filter(pl.col("request_id").is_not_null()).sort([*_ALIKE[:2], "first_step"])
    steps = (pl.col("last_step") - pl.col("first_step") + 1) * pl.col("tokens_per_step")
    goes_on = (
        pl.all_horizontal(pl.col(name) == _above(name) for name in _ALIKE)
        & (pl.col("first_step") == _above("last_step") + 1)
        & (pl.col("context_start") == _above("context_start") + steps.shift(1))
    ).fill_null(value=False)
    merged = (
        ours.with_columns((~goes_on).cum_sum().alias("run"))
        .group_by("run", maintain_order=True)
        .agg(pl.all().exclude("last_step").first(), pl.col("last_step").last())
        .select(segments.columns)
    )
    foreign = segments.filter(pl.col("request_id").is_null())
    return pl.concat([merged, foreign])


def _whole_before(segments: pl.DataFrame, before: Key) -> Key:
    """The first of the segments that may go on in others that come, at the instance and step `before` or later."""
    instance, step = before
    reach = (pl.col("instance") == instance) & (pl.col("last_step").cast(pl.Int64) + 1 >= step)
    first = segments.filter(reach & pl.col("request_id").is_not_null())["first_step"].to_numpy()
    return min([before, *([(instance, int(first.min()))] if first.size else [])])


def _above(name: str) -> pl.Expr:
    """Column `name` of the row before."""
    return pl.col(name).shift(1)


_MERGED = {"segments": Merge(merge_segments, _whole_before)}
