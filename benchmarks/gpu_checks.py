"""What can be checked of energy attribution without a second meter: functions of run directories.

Each gives a plain dict for JSON; a figure that cannot be had is null, beside `why`. Runs of the simulated engine, where
the truth is known, prove the checks themselves (`tests/project/test_real_gpu.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis.added import added_energy, predict_requests
from analysis.energy import Energy, attribute_methods
from analysis.requests import request_table
from replay.rundir import Run
from tracegen.errors import WattraceError


def guarded(check: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `check` finds, or only `why` it cannot."""
    try:
        return {"why": None, **check(*arguments)}
    except WattraceError as error:
        return {"why": str(error)}


def check_singles(mix: Run, singles: Run) -> dict[str, Any]:
    """Do coefficients fitted on `mix`, where requests share steps, predict requests that run alone?

    Predicted over measured joules of each request of `singles` that was alone in the engine. `ratio`: measured by the
    energy curve from its first step to its last; `ratio_wide`: half a second more on either side, less idle power.
    """
    table = predict_requests(mix, singles)
    if table.is_empty():
        return {"requests": 0, "why": "no request was alone in the engine"}
    table = table.with_columns(
        ratio=pl.col("predicted_j") / pl.col("measured_j"),
        ratio_wide=pl.col("predicted_j") / pl.col("measured_wide_j"),
        ratio_s=pl.col("predicted_s") / pl.col("seconds"),
    )
    return {
        "requests": table.height,
        "of": singles.scan("requests").select(pl.len()).collect().item(),
        "measured_j_median": table["measured_j"].median(),
        **{name: _spread(table[name]) for name in ("ratio", "ratio_wide", "ratio_s")},
        "table": table.to_dicts(),
    }


def check_added(alone: Run, both: Run, extra_ids: Sequence[int]) -> dict[str, Any]:
    """Does an added stream raise the measured energy by what the model of `both` says that its requests add?

    `both` has the requests of `alone` and those of the stream. Both windows are stretched to the longer one at the
    idle power measured after the run; `idle_drift_j` is what the runs' difference in idle power alone comes to, and
    there is no ratio to a measured difference that is not above that.
    """
    summaries = [attribute_methods(run, ["equal-time"])["equal-time"].summary for run in (alone, both)]
    lengths_s = [s["window"]["duration_s"] for s in summaries]
    seconds = max(lengths_s)
    idle = [sum(fit["idle_power_w"]["after"] for fit in s["fit"]) for s in summaries]
    mean_idle = [
        sum((fit["idle_power_w"]["before"] + fit["idle_power_w"]["after"]) / 2 for fit in s["fit"]) for s in summaries
    ]
    measured = [
        s["measured_j"] + w * (seconds - length_s) for s, w, length_s in zip(summaries, idle, lengths_s, strict=True)
    ]
    added = added_energy(both, extra_ids)
    difference_j = measured[1] - measured[0]
    drift_j = (mean_idle[1] - mean_idle[0]) * seconds
    why = added.why
    if why is None and difference_j <= abs(drift_j):
        why = f"the meter's difference of {difference_j:.0f} J is lost in {drift_j:+.0f} J of idle power that drifted"
    return {
        "why": why,
        "seconds": seconds,
        "requests_added": added.requests,
        "measured_alone_j": measured[0],
        "measured_both_j": measured[1],
        "measured_difference_j": difference_j,
        "predicted_j": added.meter_j,
        "ratio": added.meter_j / difference_j if added.meter_j is not None and why is None else None,
        "steps_as_they_were_j": added.steps_j - added.freed_j,
        "idle_drift_j": drift_j,
        "played_rel": added.played_rel,
    }


def check_counter(run: Run) -> dict[str, Any]:
    """Do the integral of the power samples and the energy counter agree? Samples over counter, minus 1, by instance."""
    summary = attribute_methods(run, ["equal-time"])["equal-time"].summary
    off = [fit["samples_over_counter_rel"] for fit in summary["fit"] if fit["samples_over_counter_rel"] is not None]
    sources = sorted({fit["energy_source"] for fit in summary["fit"]})
    result = {"energy_source": "+".join(sources), "measured_j": summary["measured_j"]}
    if not off:
        return result | {"samples_over_counter_rel": None, "why": "the GPU has not both, counter and samples"}
    return result | {"samples_over_counter_rel": max(off, key=abs)}


def check_recorder(run: Run) -> dict[str, Any]:
    """What the step recorder costs the engine: its time in a step, and that over the step's own."""
    found = run.manifest["instances"][0].get("recorder") or {}
    cost_us = found.get("overhead_us_mean")
    if cost_us is None or not run.has("steps"):
        return {"overhead_us_mean": None, "why": "the run does not tell what its recorder cost"}
    steps = run.scan("steps").collect()
    step_us = float(np.median((steps["end_ns"] - steps["start_ns"]).to_numpy())) / 1e3
    return {
        "steps": steps.height,
        "overhead_us_mean": cost_us,
        "overhead_us_p99": found.get("overhead_us_p99"),
        "step_us_median": step_us,
        "overhead_rel": cost_us / step_us,
    }


def describe_run(run: Run) -> dict[str, Any]:
    """What a run was and where its joules went, by `shapley` and `marginal`."""
    energies = attribute_methods(run, ["shapley", "marginal"])
    summary = energies["shapley"].summary
    manifest = run.manifest
    keys = ("measured_j", "idle_j", "other_j", "prefill_j", "decode_j", "energy_per_request_j", "fit", "notes")
    kept = {"name", "ok", "value", "bound", "why"}
    return {
        "run_id": manifest.get("run_id"),
        "state": manifest["state"],
        "seconds": summary["window"]["duration_s"],
        "requests": summary["requests"],
        "requests_averaged": summary["requests_averaged"],
        **{key: summary[key] for key in keys},
        "idle_power_w": [
            {"gpu": g["gpu"], "before": g.get("idle_power_w"), "after": g.get("idle_power_after_w")}
            for g in manifest["gpus"]
            if g["gpu"] in manifest["instances"][0]["gpus"]
        ],
        "marginal_attributed_j": energies["marginal"].summary["attributed_j"],
        "marginal_per_request_j": energies["marginal"].summary["energy_per_request_j"],
        "buckets": _buckets(run, energies),
        "verdicts": [{k: v for k, v in verdict.items() if k in kept} for verdict in manifest.get("verdicts") or []],
    }


def _buckets(run: Run, energies: dict[str, Energy]) -> list[dict[str, Any]]:
    """Mean joules of a request by size, of those that were answered."""
    table = request_table(run, energies["shapley"].requests)
    marginal = energies["marginal"].requests.select("request_id", marginal_j="energy_j")
    rows = table.join(marginal, on="request_id").filter(pl.col("status").is_in(["ok", "length_mismatch"]))
    means = pl.col("energy_j", "prefill_j", "decode_j", "marginal_j").mean()
    return rows.group_by("bucket").agg(pl.len().alias("requests"), means).sort("bucket").to_dicts()


def _spread(ratio: pl.Series) -> dict[str, float]:
    """Median and spread over requests."""
    values = ratio.drop_nulls().to_numpy()
    return {
        "median": float(np.median(values)),
        "p10": float(np.quantile(values, 0.1)),
        "p90": float(np.quantile(values, 0.9)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
