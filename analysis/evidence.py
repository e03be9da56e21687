"""What `analysis check` looks at, collected once, and the shape of what it finds."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.saved import ensure_energy
from analysis.stretches import Meter, Survey, meters, survey
from replay.rundir import Run

OK, DOUBT, UNKNOWN = "ok", "doubt", "unknown"
# What a doubt's joules are: how far the figures may be off, or what was spent while it held.
ERROR, CONCERNED = "error at most", "spent in it"
NOTICE_REL = 0.001  # of the measured energy; attribution's own error is larger (docs/concepts.md)
_REQUESTS = (
    "request_id", "status", "scheduled_ns", "sent_ns", "input_tokens", "output_tokens", "output_tokens_wanted",
    "cached_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Doubt:
    """One question about a run's figures, its answer and its size."""

    name: str
    status: str
    why: str
    joules: float | None = None  # None: it has no size in joules, or none is known
    joules_are: str | None = None
    do: str = ""  # what to do about it
    counted: bool = True  # whether a large one makes the check fail


@dataclass(frozen=True)
class Evidence:
    """A run, its energy and its readings; None where the run does not have them."""

    run: Run
    summary: dict[str, Any]  # of the attribution; empty where there is none
    why: str | None  # why there is none
    remark: str | None  # for the user, of `ensure_energy`
    gpus: tuple[Meter, ...]
    readings: Survey | None
    requests: pl.DataFrame | None  # _REQUESTS, energy_j, prefill_j, energy_se_j

    @property
    def measured_j(self) -> float | None:
        """The joules that shares are of: the attribution's, else the sum of the readings."""
        if self.summary:
            return float(self.summary["measured_j"])
        return self.readings.whole.joules if self.readings is not None and self.readings.whole.count else None

    @property
    def mean_w(self) -> float | None:
        """Mean power of all the GPUs looked at."""
        window = self.summary.get("window")
        if not window or not window["duration_s"] or self.measured_j is None:
            return None
        return self.measured_j / float(window["duration_s"])

    @property
    def fits(self) -> list[dict[str, Any]]:
        """The summary's documents of the instances."""
        return list(self.summary.get("fit") or [])

    def sized(self, name: str, joules: float, are: str, why: str, do: str) -> Doubt:
        """A doubt of so many joules; `ok` below `NOTICE_REL` of the measured energy."""
        large = bool(joules > NOTICE_REL * (self.measured_j or 0.0))
        return Doubt(name, DOUBT if large else OK, why, joules, are, do if large else "")

    def verdict(self, name: str) -> dict[str, Any]:
        """What the run says of itself; empty where it does not."""
        return next((v for v in self.run.manifest.get("verdicts") or [] if v.get("name") == name), {})


def gather(run: Run) -> Evidence:
    """Read what there is; energy is attributed and kept where it was not yet. Raises `RunError` for a broken table."""
    known = ensure_energy(run)
    summary = known.summary or {}
    gpus: tuple[Meter, ...] = ()
    readings = None
    if run.has("power"):
        gpus = tuple(meters(run, summary.get("scope", "gpu")))
        window_ns = _window_ns(run, summary)
        readings = survey(run, gpus, window_ns) if gpus and window_ns else None
    return Evidence(run, summary, known.why, known.remark(run), gpus, readings, _requests(run, known.requests))


def _window_ns(run: Run, summary: dict[str, Any]) -> tuple[int, int] | None:
    """The window that was accounted for, else the one that the manifest gives."""
    window = summary.get("window")
    if window:
        return int(window["start_ns"]), int(window["end_ns"])
    start, end = run.manifest.get("measure_start_ns"), run.manifest.get("measure_end_ns")
    return (start, end) if isinstance(start, int) and isinstance(end, int) and end > start else None


def _requests(run: Run, energy: pl.DataFrame | None) -> pl.DataFrame | None:
    """requests.parquet, as far as doubts are about it, with the energy of each; null where none is known."""
    if not run.has("requests"):
        return None
    frame = run.scan("requests", _REQUESTS).select(_REQUESTS).collect()
    names = ("energy_j", "prefill_j", "energy_se_j")
    if energy is None:
        return frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in names)
    return frame.join(energy.select("request_id", *names), on="request_id", how="left", maintain_order="left")
