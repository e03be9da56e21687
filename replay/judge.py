"""Every verdict on a run, from its tables and its manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from replay import verdicts
from replay.meters import Gauge
from replay.rundir import Run, has_table, table_batches
from replay.summary import measured, rows_of, stretches
from replay.sums import Backlog, Batches, Errors, Lag, Lookup, Steps, Tokens, add_up
from replay.verdicts import Verdict
from tracegen.errors import RunError


def judge(run_dir: Path, manifest: Mapping[str, Any], late_ns: Sequence[int] | None) -> list[Verdict]:
    """Every verdict on the run in `run_dir`; where it was resumed and a pause would tell, on its worst stretch.

    `late_ns`: the event loop's delays; None where they are not known any more.
    """
    if not (has_table(run_dir, "requests") and has_table(run_dir, "trace")):
        raise RunError(f"{run_dir}: no request was recorded")
    windows = measured(manifest, None) or stretches(manifest, None)  # of one that ended in its warm-up, that
    arguments = manifest["arguments"]
    caps = arguments["max_concurrency"], arguments["max_rate_rps"]
    capped = any(cap is not None for cap in caps)
    stepped = has_table(run_dir, "steps") and has_table(run_dir, "segments")
    about = ("request_id", "first_step", "last_step", "tokens_per_step")
    tokens = Tokens(
        Lookup(run_dir, "trace", ("request_id", "input_tokens")),
        Lookup(run_dir, "segments", about) if stepped else None,
    )
    errors, lag, steps = Errors(), Lag(), Steps()
    backlogs = [Backlog(w, capped=capped) for w in (windows if len(windows) > 1 else [None])]

    def rows_in(table: str) -> Batches:
        return lambda columns: table_batches(run_dir, table, columns)

    add_up([errors, lag, *backlogs], rows_in("requests"))
    add_up([tokens], rows_in("requests"))
    if stepped:
        add_up([steps], rows_in("steps"))
    serving = [gpu for entry in manifest["instances"] for gpu in entry["gpus"]]
    powered = has_table(run_dir, "power")
    gauge = Gauge(serving if powered else (), windows, manifest["instances"][0]["freq_mhz"], _held_mhz(manifest))
    if powered:
        add_up([gauge], rows_in("power"))
    mine = [gpu for gpu in manifest["gpus"] if gpu["gpu"] in serving]
    before, after = ([gpu.get(key, {}) for gpu in mine] for key in ("idle_power_w", "idle_power_after_w"))
    run = Run(run_dir, dict(manifest))
    return [
        errors.verdict(rows_of(run, "trace") - rows_of(run, "warmup")),
        verdicts.open_loop(*caps),
        lag.verdict(),
        verdicts.loop_stall(late_ns),
        verdicts.clock_offset(manifest["hosts"], manifest["clock_anchors"]),
        tokens.lengths(),
        verdicts.worst([backlog.verdict() for backlog in backlogs]),
        verdicts.completeness(steps.count, steps.missing, tokens.short, tokens.ok) if stepped else verdicts.no_steps(),
        gauge.clocks(),
        gauge.coverage(),
        gauge.counter(),
        verdicts.idle_measured(before, after),
    ]


def _held_mhz(manifest: Mapping[str, Any]) -> float | None:
    """The highest clock that a simulated GPU holds under load, MHz; None where the GPUs are real."""
    profile = manifest["simulated_profile"]
    return None if profile is None else float(profile["constants"]["time"]["sustained_mhz"])
