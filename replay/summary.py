"""What a run says of itself, finished or not, for machines; every figure comes from its tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from replay.clock import NS_PER_MS, NS_PER_S
from replay.counters import Window, counted_j
from replay.gaps import CHUNK_COLUMNS, GapHistogram
from replay.rundir import MANIFEST, REQUESTS, Run
from replay.verdicts import Verdict, validity
from tracegen.errors import RunError

_NEEDED = ("status", "scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns", "output_tokens")
_KEYS = (
    "state", "engine", "arguments", "trace_sha256", "instances", "gpus", "clock_anchors", "versions", "verdicts"
)  # fmt: skip
_PERCENTS = (50, 90, 99)


def summarize(run_dir: Path) -> dict[str, Any]:
    """Counts, latencies in ms, power in W and energy in J of the run in `run_dir`; None where nothing was measured.

    A run that was killed or still goes on has no verdicts yet; its window ends with the last that is on record. Rates
    and mean power are over the time that it was measured, without pauses (`paused_s`) of one that was resumed.
    Raises `RunError` where `run_dir` has no run that `replay` made, or a table that cannot be read.
    """
    run = open_run(run_dir)
    manifest, requests = run.manifest, _requests(run)
    windows = stretches(manifest, None if "measure_end_ns" in manifest else last_on_record(run))
    seconds = (windows[-1][1] - windows[0][0]) / NS_PER_S if windows else None
    output_tokens = requests.output_tokens()
    gpus = [gpu for instance in manifest["instances"] for gpu in instance["gpus"]]
    energy_j, energy_why = counted_j(run, gpus, windows) if windows else (None, "the run has not begun")
    paused_s = manifest.get("paused_s", 0.0)
    active_s = None if seconds is None else seconds - paused_s
    rate = None if output_tokens is None or not active_s else output_tokens / active_s
    return {
        "run": str(run_dir),
        "state": manifest["state"],
        "simulated": run.simulated,
        **_what(manifest),
        "seconds": seconds,
        "paused_s": paused_s,
        "requests_planned": _planned(run),
        "requests_sent": requests.departed.number,
        "requests_ok": requests.statuses.get("ok", 0),
        "statuses": dict(requests.statuses.most_common()),
        "target_rps": requests.scheduled.rate(paused_s),
        "sent_rps": requests.departed.rate(paused_s),
        "output_tokens": output_tokens,
        "output_tokens_per_s": rate,
        **requests.latencies(),
        "client_error": manifest.get("client_error"),
        "gpus": gpus,
        "energy_j": energy_j,
        "energy_why": energy_why,
        "mean_power_w": None if energy_j is None or not active_s else energy_j / active_s,
        "idle_power_w": _idle_w(manifest, gpus, "idle_power_w"),
        "idle_power_after_w": _idle_w(manifest, gpus, "idle_power_after_w"),
        "verdicts": manifest["verdicts"],
        **judged(manifest),
    }


def open_run(run_dir: Path) -> Run:
    """A run that `replay` made. Raises `RunError` for what is none, or was made by another program."""
    run = Run.open(run_dir)
    missing = [key for key in _KEYS if key not in run.manifest]
    if missing:
        raise RunError(f"{run_dir / MANIFEST}: has no {', '.join(missing)}, which every run that replay made has")
    return run


def judged(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`valid` and `invalid_because` of a run, from its state and its verdicts; both None before it was judged."""
    if not manifest["verdicts"]:
        return {"valid": None, "invalid_because": None}
    verdicts = [Verdict(**verdict) for verdict in manifest["verdicts"]]
    return validity(manifest["state"], verdicts, manifest.get("failure"))


def stretches(manifest: Mapping[str, Any], last_ns: int | None) -> list[Window]:
    """The stretches of time in which the run was measured; one, unless it was resumed; none before it has begun.

    `last_ns`: the last moment on record, which ends a run that did not come to its own end.
    """
    if "measure_start_ns" not in manifest:
        return []
    whole = {"start_ns": manifest["measure_start_ns"], "end_ns": manifest.get("measure_end_ns")}
    windows = [(s["start_ns"], s["end_ns"] or last_ns) for s in manifest.get("stretches") or [whole]]
    return [(start_ns, max(end_ns or 0, start_ns + 1)) for start_ns, end_ns in windows]


def last_on_record(run: Run) -> int | None:
    """The last moment on record, by requests and steps; None where there is none."""
    last = [
        moment
        for table, columns in (("requests", ["sent_ns", "done_ns"]), ("steps", ["end_ns"]))
        if run.has(table)
        for batch in run.batches(table, columns)
        for column in columns
        if (moment := batch[column].drop_nulls().to_numpy().max(initial=-1)) >= 0
    ]
    return int(max(last)) if last else None


def _what(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, and on what."""
    first, arguments, profile = manifest["instances"][0], manifest["arguments"], manifest.get("simulated_profile")
    anchors = manifest["clock_anchors"]
    return {
        "trace": arguments["trace"],
        "engine": manifest["engine"],
        "model": first["model"],
        "hardware": profile and profile["hardware"],
        "tp": first["tp"],
        "replicas": len(manifest["instances"]),
        "freq_mhz": first["freq_mhz"],
        "freq_asked_mhz": first["freq_asked_mhz"],
        "power_cap_w": first["power_cap_w"],
        "virtual_time": manifest.get("clock") == "virtual",
        "begun": f"{datetime.fromtimestamp(anchors[0]['unix_ns'] // NS_PER_S, UTC):%F %T} UTC" if anchors else None,
        "version": manifest["versions"].get("wattrace"),
        "failure": manifest.get("failure"),
    }


def _planned(run: Run) -> int | None:
    """How many requests the run was to send; None before that was known."""
    if "requests" in run.manifest:
        return int(run.manifest["requests"]["planned"])
    return run.scan("trace", ["request_id"]).collect().height if run.has("trace") else None


def _idle_w(manifest: Mapping[str, Any], gpus: Sequence[int], key: str) -> float | None:
    """Idle power of all `gpus`, by the counter where there is one; None where it is not known of each."""
    idle_w = {entry["gpu"]: entry.get(key) or {} for entry in manifest["gpus"]}
    each = [(idle := idle_w.get(gpu, {})).get("counter") or idle.get("instant") or idle.get("average") for gpu in gpus]
    known = [watts for watts in each if watts is not None]
    return sum(known) if known and len(known) == len(each) else None


class _Span(NamedTuple):
    """How many moments there were, the first and the last."""

    number: int = 0
    first_ns: int | None = None
    last_ns: int | None = None

    def add(self, ns: pl.Series) -> "_Span":
        """With more moments, in any order; nulls are none."""
        known = ns.drop_nulls().to_numpy()
        if not known.size:
            return self
        both = np.array([known.min(), known.max(), *[ns for ns in self[1:] if ns is not None]])
        return _Span(self.number + known.size, int(both.min()), int(both.max()))

    def rate(self, paused_s: float) -> float | None:
        """Moments a second, from the first to the last but for a pause between; None where that tells nothing."""
        if self.first_ns is None or self.last_ns is None:
            return None
        lasted_s = (self.last_ns - self.first_ns) / NS_PER_S
        # All moments of a killed run's first stretch may be lost: then the pause is not between them.
        lasted_s -= paused_s if lasted_s > paused_s else 0.0
        return (self.number - 1) / lasted_s if lasted_s > 0 else None


@dataclass
class _Requests:
    """What the rows of requests.parquet add up to, read in batches: a run in virtual time can have millions."""

    statuses: Counter[str] = field(default_factory=Counter)
    scheduled: _Span = field(default_factory=_Span)
    departed: _Span = field(default_factory=_Span)
    gaps: GapHistogram = field(default_factory=GapHistogram)
    answered: list[pl.DataFrame] = field(default_factory=list)

    def add(self, batch: pl.DataFrame) -> None:
        """More rows."""
        self.statuses.update(dict(batch["status"].value_counts().iter_rows()))
        self.scheduled, self.departed = self.scheduled.add(batch["scheduled_ns"]), self.departed.add(batch["sent_ns"])
        ok = batch.filter(pl.col("status") == "ok")
        if set(CHUNK_COLUMNS) <= set(ok.columns):
            self.gaps.add(ok)
        decoding_ns = pl.col("last_token_ns") - pl.col("first_token_ns")
        self.answered.append(
            ok.select(
                "output_tokens",
                (pl.col("first_token_ns") - pl.col("sent_ns")).alias("ttft_ns"),
                (pl.col("last_token_ns") - pl.col("sent_ns")).alias("e2el_ns"),
                (decoding_ns / (pl.col("output_tokens").cast(pl.Int64) - 1)).alias("tpot_ns"),
            )
        )

    def output_tokens(self) -> int | None:
        """Of all good answers; None where the server did not count."""
        each = pl.concat([frame["output_tokens"] for frame in self.answered])
        return int(each.sum()) if each.null_count() < len(each) else None

    def latencies(self) -> dict[str, dict[str, float] | None]:
        """Percentiles in ms; ITL only where the times of chunks were kept."""
        of = pl.concat(self.answered)
        return {
            "ttft_ms": _percentiles(of["ttft_ns"]),
            "itl_ms": self.gaps.percentiles(_PERCENTS),
            "tpot_ms": _percentiles(of["tpot_ns"]),
            "e2el_ms": _percentiles(of["e2el_ns"]),
        }


def _requests(run: Run) -> _Requests:
    """The rows of requests.parquet, none where the run has no such table yet."""
    result = _Requests()
    result.add(REQUESTS.to_frame().select(_NEEDED))
    for batch in run.batches("requests", [*_NEEDED, *CHUNK_COLUMNS]) if run.has("requests") else ():
        result.add(batch)
    return result


def _percentiles(ns: pl.Series) -> dict[str, float] | None:
    """p50, p90 and p99 in ms; None without a value. A TPOT of a single token is no number and is left out."""
    ms = (ns.cast(pl.Float64) / NS_PER_MS).drop_nulls()
    ms = ms.filter(ms.is_finite())
    if ms.is_empty():
        return None
    return {f"p{q}": float(ms.quantile(q / 100, "linear") or 0.0) for q in _PERCENTS}
