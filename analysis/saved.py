"""Energy that is there already, or is computed and kept: what every command but `analysis energy` starts from."""

import json
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis.buckets import bucket_table
from analysis.energy import ENERGY_DIR, SUMMARY, Energy, attribute, write_energy
from analysis.requests import CORE, beside, request_table
from analysis.split import DEFAULT_METHOD
from replay.rundir import MANIFEST, Run
from tracegen.errors import AnalysisError, RunError


@dataclass(frozen=True)
class RunEnergy:
    """A run's energy by request and its summary, or `why` there is none.

    `fresh`: computed just now; `unsaved`: why it could not be kept.
    """

    requests: pl.DataFrame | None
    summary: dict[str, Any] | None
    fresh: bool = False
    why: str | None = None
    unsaved: str | None = None

    def remark(self, run: Run) -> str | None:
        """What to tell a user who asked for something else."""
        if self.why:
            return f"{run.name}: no energy: {self.why}"
        if self.unsaved:
            return f"{run.name}: energy attributed, but not kept: {self.unsaved}"
        return f"{run.name}: energy attributed and saved in {run.path / ENERGY_DIR}" if self.fresh else None


def save(energy: Energy) -> None:
    """Write `energy/requests.parquet`, `buckets.parquet` and `summary.json` into the run directory.

    Raises `AnalysisError` where the file system refuses.
    """
    table = request_table(energy.run, None, CORE).select("request_id", pl.col("bucket", "label").cast(pl.String))
    requests = energy.requests.hstack(beside(energy.requests["request_id"], table))
    write_energy(energy, {"requests": requests, "buckets": bucket_table(energy.run, energy.requests)})


def ensure_energy(run: Run) -> RunEnergy:
    """The saved attribution of a complete `run` where it is newer than its manifest, else a new one, saved.

    A run that cannot be attributed (no power) still has latencies: it comes back with `why`.
    """
    summary_path = run.path / ENERGY_DIR / SUMMARY
    whole = run.manifest.get("state") == "complete"  # a run that goes on, or was cut off, may have grown since
    if whole and summary_path.is_file() and summary_path.stat().st_mtime >= (run.path / MANIFEST).stat().st_mtime:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        if summary.get("method") == DEFAULT_METHOD:
            return RunEnergy(pl.read_parquet(run.path / ENERGY_DIR / "requests.parquet"), summary)
    try:
        energy = attribute(run)
    except (AnalysisError, RunError) as error:
        return RunEnergy(None, None, why=str(error))
    try:
        save(energy)
    except AnalysisError as error:  # a run that may only be read is still answered
        return RunEnergy(energy.requests, energy.summary, fresh=True, unsaved=str(error))
    return RunEnergy(energy.requests, energy.summary, fresh=True)
