"""After the last request: make each table one file, compute a simulated run's truth, judge the run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from replay import verdicts
from replay.compaction import compact_requests
from replay.counters import Window
from replay.engines.base import Engine
from replay.prepare import clear_helpers
from replay.resume import end_stretch
from replay.rundir import Run, compact, has_table, table_batches, write_manifest
from replay.summary import ENDED, measured, rows_of, stretches
from replay.tables import TABLES
from tracegen.errors import RunError
from tracegen.schema import write_parquet

_SORT = {
    "steps": ["instance", "step"],
    "segments": ["instance", "first_step", "request_id"],
    "arrivals": ["instance", "arrival_ns"],
    "power": ["t_ns", "gpu"],
    "cpu_energy": ["t_ns", "domain"],
    "server_metrics": ["t_ns"],
}
_JUDGED = {
    "requests": [
        "request_id", "scheduled_ns", "sent_ns", "first_token_ns", "done_ns", "input_tokens", "output_tokens",
        "output_tokens_wanted", "cached_tokens", "status", "http_status", "error",
    ],
    "trace": ["request_id", "input_tokens"],
    "steps": ["instance", "step"],
    "segments": ["request_id", "first_step", "last_step", "tokens_per_step"],
    "power": [
        "t_ns", "gpu", "power_instant_mw", "power_average_mw", "energy_mj", "sm_clock_mhz", "throttle_reasons"
    ],
}  # fmt: skip
_TIMES = ["scheduled_ns", "sent_ns", "first_token_ns", "done_ns"]
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
    for table in ("requests", "warmup"):
        compact_requests(run_dir, table)
    for table in TABLES:
        compact(run_dir, table, sort_by=_SORT.get(table, []), merge=merge_segments if table == "segments" else None)
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


def _held_mhz(manifest: Mapping[str, Any]) -> float | None:
    """The highest clock that a simulated GPU holds under load, MHz; None where the GPUs are real."""
    profile = manifest["simulated_profile"]
    return None if profile is None else float(profile["constants"]["time"]["sustained_mhz"])


def _above(name: str) -> pl.Expr:
    """Column `name` of the row before."""
    return pl.col(name).shift(1)


def _within(column: str, windows: Sequence[Window]) -> pl.Expr:
    """Whether a time is in one of `windows`."""
    return pl.any_horizontal(pl.col(column).is_between(*window) for window in windows)


def judge(run_dir: Path, manifest: dict[str, Any], late_ns: Sequence[int] | None) -> list[verdicts.Verdict]:
    """Every verdict on the run in `run_dir`; where it was resumed and a pause would tell, on its worst stretch."""

    def table(name: str) -> pl.DataFrame | None:
        if not has_table(run_dir, name):
            return None
        columns = _JUDGED[name]  # and no more: of lists and texts a run can have more than fits into memory
        batches = [TABLES[name].to_frame().select(columns), *table_batches(run_dir, name, columns)]
        texts = pl.col(pl.String).cast(pl.Categorical)  # a few, each many times
        return pl.concat([batch.with_columns(texts) for batch in batches])

    requests, trace, power = table("requests"), table("trace"), table("power")
    if requests is None or trace is None:
        raise RunError(f"{run_dir}: no request was recorded")
    windows = measured(manifest, None) or stretches(manifest, None)  # of one that ended in its warm-up, that
    gpus, freq_mhz = manifest["gpus"], manifest["instances"][0]["freq_mhz"]
    serving = [gpu for entry in manifest["instances"] for gpu in entry["gpus"]]
    mine = [gpu for gpu in gpus if gpu["gpu"] in serving]
    before, after = ([gpu.get(key, {}) for gpu in mine] for key in ("idle_power_w", "idle_power_after_w"))
    arguments = manifest["arguments"]
    capped = arguments["max_concurrency"] is not None or arguments["max_rate_rps"] is not None
    during = None if power is None else power.filter(_within("t_ns", windows))
    each = [requests.filter(_within("sent_ns", [window])) for window in windows] if len(windows) > 1 else [requests]
    return [
        verdicts.error_rate(
            requests.select("status", "http_status", "error"), trace.height - rows_of(Run(run_dir, manifest), "warmup")
        ),
        verdicts.open_loop(arguments["max_concurrency"], arguments["max_rate_rps"]),
        verdicts.dispatch_lag(requests),
        verdicts.loop_stall(late_ns),
        verdicts.clock_offset(manifest["hosts"], manifest["clock_anchors"]),
        verdicts.lengths_exact(requests.drop(_TIMES), trace),
        verdicts.worst([verdicts.saturated(sent, capped=capped) for sent in each]),
        verdicts.steps_complete(table("steps"), table("segments"), requests),
        verdicts.clocks_held(during, serving, freq_mhz, _held_mhz(manifest)),
        verdicts.worst([verdicts.sensor_alive(power, serving, *window) for window in windows]),
        verdicts.worst([verdicts.counter_agrees(power, serving, *window) for window in windows]),
        verdicts.idle_measured(before, after),
    ]
