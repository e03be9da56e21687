"""Idle energy as somebody's: `analysis energy --idle`.

Idle joules, of an engine with no request in it, stand on a line of their own by default: no request caused them. Who
must recover them all from requests can spread them, by time or by head. They stay apart from `energy_j` in a column of
their own, `idle_j`: over the requests whose energy is known, Σ (energy_j + idle_j) = measured_j - other_j to 1e-9.

They are spread over the run's own requests, over all of them whichever instance rested: the machine would have rested
as long without foreign work, and which instance rests is the router's doing. Idle GPUs of scope `node` are among them.
"""

from dataclasses import replace

import polars as pl

from analysis.energy import Energy
from analysis.latency import answered
from analysis.requests import worker_offset_ns
from replay.rundir import Run
from tracegen.errors import AnalysisError

LINE = "line"
BY = ("spread-time", "spread-requests")
CHOICES = (LINE, *BY)


def check_choice(how: str) -> None:
    """Raise `AnalysisError` where `--idle` is none of `CHOICES`."""
    if how not in CHOICES:
        raise AnalysisError(f"--idle '{how}' is unknown; use one of {', '.join(CHOICES)}")


def spread_idle(energy: Energy, how: str) -> Energy:
    """`energy` with `idle_j` of each request in `requests`, and `idle_spread` in `summary`; as it is for `line`.

    `spread-time`: in proportion to the time in the system within the window (`time_in_system`).
    `spread-requests`: equally over the requests that were answered.
    Null for a request whose energy is not known; 0 for one that takes no part. Where no request can take part the
    joules stay nobody's, which a note says.

    Raises `AnalysisError` for an unknown `how`.
    """
    check_choice(how)
    if how == LINE:
        return energy
    table = energy.requests.join(_weights(energy, how), on="request_id", how="left", maintain_order="left")
    known = pl.when(pl.col("energy_j").is_not_null()).then(pl.col("weight").fill_null(0.0))
    weight = table.select(known).to_series()
    total = float(weight.sum())
    summary = dict(energy.summary)
    if total <= 0:
        why = "no request was in the system in the window, so idle energy was not spread"
        return replace(energy, summary={**summary, "notes": [*summary["notes"], why]})
    requests = energy.requests.with_columns((weight / total * summary["idle_j"]).alias("idle_j"))
    summary["idle_spread"] = {
        "by": how.removeprefix("spread-"),
        "requests": int((weight > 0).sum()),
        "idle_j": float(requests["idle_j"].sum()),
        "energy_per_request_with_idle_j": _mean_with_idle(energy.run, requests),
    }
    return replace(energy, requests=requests, summary=summary)


def time_in_system(run: Run, window_ns: tuple[int, int]) -> pl.DataFrame:
    """`request_id`, `begin_ns`, `end_ns` of each request on the replayer's clock, cut to `window_ns`; null: not sent.

    From send to last token; to the end of the response where no token came, and to the window's where nothing did.
    """
    offset = worker_offset_ns(run)
    start, end = window_ns
    gone = pl.coalesce(pl.coalesce("last_token_ns", "done_ns") - offset, pl.lit(end))
    return (
        run.scan("requests", ["request_id", "sent_ns", "last_token_ns", "done_ns", "worker"])
        .select(
            "request_id",
            (pl.col("sent_ns") - offset).clip(start, end).alias("begin_ns"),
            pl.when(pl.col("sent_ns").is_not_null()).then(gone.clip(start, end)).alias("end_ns"),
        )
        .collect()
    )


def _weights(energy: Energy, how: str) -> pl.DataFrame:
    """`request_id` and `weight`."""
    if how == "spread-requests":
        frame = energy.run.scan("requests", ["request_id", "status"])
        return frame.select("request_id", answered().cast(pl.Float64).alias("weight")).collect()
    window = energy.summary["window"]
    times = time_in_system(energy.run, (window["start_ns"], window["end_ns"]))
    inside_ns = (pl.col("end_ns") - pl.col("begin_ns")).clip(0)
    return times.select("request_id", inside_ns.cast(pl.Float64).alias("weight"))


def _mean_with_idle(run: Run, requests: pl.DataFrame) -> float | None:
    """Mean of `energy_j + idle_j` over the answered requests whose energy is known."""
    status = run.scan("requests", ["request_id", "status"]).filter(answered()).select("request_id").collect()
    mean = requests.join(status, on="request_id", how="semi").select((pl.col("energy_j") + pl.col("idle_j")).mean())
    value = mean.item()
    return float(value) if value is not None else None
