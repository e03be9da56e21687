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
from replay.hold import held
from replay.rundir import MANIFEST, Run
from replay.tables import REQUESTS
from replay.verdicts import Verdict, validity
from tracegen.errors import RunError

_NEEDED = ("status", "scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns", "output_tokens")
_KEYS = (
    "state", "engine", "arguments", "trace_sha256", "instances", "gpus", "clock_anchors", "versions", "verdicts"
)  # fmt: skip
ENDED = {"complete", "interrupted", "failed"}
_PERCENTS = (50, 90, 99)
ANSWERED = ("ok", "length_mismatch")  # one of another length was answered too: its times are true (docs/latency.md)


def summarize(run_dir: Path) -> dict[str, Any]:
    """Counts, latencies in ms, power in W and energy in J of the run in `run_dir`; None where nothing was measured.

    Of requests that were due in the warm-up there is a count only, and of those that a cap held back until after it.
    Latencies and tokens are of `ANSWERED` requests.
    A run that was killed or still goes on has no verdicts yet; its window ends with the last that is on record. Rates
    and mean power are over the time that it was measured, without pauses (`paused_s`) of one that was resumed.
    Raises `RunError` where `run_dir` has no run that `replay` made, or a table that cannot be read.
    """
    run = open_run(run_dir)
    manifest, requests = run.manifest, _requests(run)
    windows = measured(manifest, None if "measure_end_ns" in manifest else last_on_record(run))
    warmups, planned, killed = rows_of(run, "warmup"), _planned(run), was_killed(run)
    seconds = (windows[-1][1] - windows[0][0]) / NS_PER_S if windows else None
    output_tokens = requests.output_tokens()
    gpus = [gpu for instance in manifest["instances"] for gpu in instance["gpus"]]
    energy_j, energy_why = counted_j(run, gpus, windows) if windows else (None, _why_no_window(manifest))
    paused_s = manifest.get("paused_s", 0.0)
    active_s = None if seconds is None else seconds - paused_s
    rate = None if output_tokens is None or not active_s else output_tokens / active_s
    return {
        "run": str(run_dir),
        "state": manifest["state"],
        "killed": killed,
        "simulated": run.simulated,
        **_what(manifest),
        "seconds": seconds,
        "paused_s": paused_s,
        "warmup_s": manifest["arguments"].get("warmup_ns", 0) / NS_PER_S,
        "warmup_requests": warmups,
        "warmup_held_back": _held_back(run),
        "requests_planned": None if planned is None else planned - warmups,
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
        "what_now": what_now(run) if killed else None,
    }


def open_run(run_dir: Path) -> Run:
    """A run that `replay` made. Raises `RunError` for what is none, or was made by another program."""
    run = Run.open(run_dir)
    missing = [key for key in _KEYS if key not in run.manifest]
    if missing:
        raise RunError(f"{run_dir / MANIFEST}: has no {', '.join(missing)}, which every run that replay made has")
    return run


def was_killed(run: Run) -> bool:
    """Whether a run has not ended, and nobody writes into it any more."""
    return run.manifest["state"] not in ENDED and not held(run.path)


def not_begun(run: Run) -> bool:
    """Whether nothing was measured yet: a run that was killed then can begin anew."""
    return not (run.manifest["state"] != "starting" or run.manifest.get("stretches") or run.has("requests"))


def what_now(run: Run) -> str:
    """What to do with a run that was killed."""
    if run.manifest.get("clock") == "virtual":
        return "a run in virtual time does not go on: repeat it"
    if not_begun(run):
        return f"no request was due yet: 'replay run --resume {run.path}' begins it anew"
    return f"'replay run --resume {run.path}' goes on"


def judged(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`valid` and `invalid_because` of a run, from its state and its verdicts; both None before it was judged."""
    if not manifest["verdicts"]:
        return {"valid": None, "invalid_because": None}
    verdicts = [Verdict(**verdict) for verdict in manifest["verdicts"]]
    return validity(manifest["state"], verdicts, manifest.get("failure"))


def measured(manifest: Mapping[str, Any], last_ns: int | None) -> list[Window]:
    """The `stretches` of a run without its warm-up; none before that has ended."""
    start_ns = manifest.get("measure_start_ns", 0)
    return [(max(a_ns, start_ns), b_ns) for a_ns, b_ns in stretches(manifest, last_ns) if b_ns > start_ns]


def stretches(manifest: Mapping[str, Any], last_ns: int | None) -> list[Window]:
    """The stretches of time in which requests were sent; one, unless it was resumed; none before it has begun.

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
        for table, columns in (
            ("requests", ["sent_ns", "done_ns"]),
            ("warmup", ["sent_ns", "done_ns"]),
            ("steps", ["end_ns"]),
        )
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
    return rows_of(run, "trace") if run.has("trace") else None


def rows_of(run: Run, table: str) -> int:
    """How many rows a table has that is made of requests; none where it is not there."""
    return sum(batch.height for batch in run.batches(table, ["request_id"])) if run.has(table) else 0


def _held_back(run: Run) -> int | None:
    """How many requests of the warm-up were sent after it; None where no cap held requests back."""
    asked, start_ns = run.manifest["arguments"], run.manifest.get("measure_start_ns")
    if start_ns is None or not (asked.get("max_concurrency") or asked.get("max_rate_rps")) or not run.has("warmup"):
        return None
    return sum(batch.filter(pl.col("sent_ns") >= start_ns).height for batch in run.batches("warmup", ["sent_ns"]))


def _why_no_window(manifest: Mapping[str, Any]) -> str:
    """Why nothing was measured."""
    return "the run has not begun" if "measure_start_ns" not in manifest else "its warm-up was not over"


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
        answered = batch.filter(pl.col("status").is_in(ANSWERED))
        if set(CHUNK_COLUMNS) <= set(answered.columns):
            self.gaps.add(answered)
        decoding_ns = pl.col("last_token_ns") - pl.col("first_token_ns")
        self.answered.append(
            answered.select(
                "output_tokens",
                (pl.col("first_token_ns") - pl.col("sent_ns")).alias("ttft_ns"),
                (pl.col("last_token_ns") - pl.col("sent_ns")).alias("e2el_ns"),
                (decoding_ns / (pl.col("output_tokens").cast(pl.Int64) - 1)).alias("tpot_ns"),
            )
        )

    def output_tokens(self) -> int | None:
        """Of all answers; None where the server did not count."""
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
