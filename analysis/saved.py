"""Energy that is there already, or is computed and kept: what every command but `analysis energy` starts from."""

import json
from dataclasses import dataclass, replace
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

    @property
    def scope(self) -> str | None:
        """Whose joules these are: `gpu` or `node`, as they were attributed; None where there are none."""
        return None if self.summary is None else str(self.summary.get("scope", "gpu"))

    def remark(self, run: Run) -> str | None:
        """What to tell a user who asked for something else."""
        said = [f"left out, for they were not written to their ends: {', '.join(torn)}"] if (torn := run.torn()) else []
        if self.why:
            said.append(f"no energy: {self.why}")
        elif self.unsaved:
            said.append(f"energy attributed, but not kept: {self.unsaved}")
        elif self.fresh:
            said.append(f"energy attributed and saved in {run.path / ENERGY_DIR}")
        return "\n".join(f"{run.name}: {text}" for text in said) or None


def save(energy: Energy) -> None:
    """Write `energy/requests.parquet`, `buckets.parquet` and `summary.json` into the run directory.

    Raises `AnalysisError` where the file system refuses.
    """
    table = request_table(energy.run, None, CORE).select("request_id", pl.col("bucket", "label").cast(pl.String))
    requests = energy.requests.hstack(beside(energy.requests["request_id"], table))
    write_energy(energy, {"requests": requests, "buckets": bucket_table(energy.run, energy.requests)})


def ensure_energy(run: Run, scope: str | None = None) -> RunEnergy:
    """The saved attribution of a complete `run` where it is newer than the run's files, else a new one, saved.

    `scope`: whose joules these are to be, `gpu` or `node`; one of `node` that is saved serves both. None: as it was
    saved, else `gpu`.
    One that was saved by another method is what somebody asked for: it stays, and the new one is not kept. A run that
    cannot be attributed (no power) still has latencies: it comes back with `why`.
    """
    known = _saved(run)
    method = DEFAULT_METHOD if known is None or known.summary is None else known.summary.get("method")
    if known is not None and method == DEFAULT_METHOD and scope in {None, "gpu", known.scope}:
        return known if scope is None else _of_scope(known, scope)
    try:
        energy = attribute(run, scope=scope or "gpu")
    except (AnalysisError, RunError) as error:
        return RunEnergy(None, None, why=str(error))
    if method != DEFAULT_METHOD:
        kept = f"{ENERGY_DIR}/ is by method {method}, and stays so"
        return RunEnergy(energy.requests, energy.summary, fresh=True, unsaved=kept)
    try:
        save(energy)
    except AnalysisError as error:  # a run that may only be read is still answered
        return RunEnergy(energy.requests, energy.summary, fresh=True, unsaved=str(error))
    return RunEnergy(energy.requests, energy.summary, fresh=True)


def _of_scope(energy: RunEnergy, scope: str) -> RunEnergy:
    """`energy` with the joules of `scope`; of those of a node the GPUs that nothing ran on, which were idle, go."""
    if energy.summary is None or energy.scope == scope:
        return energy
    fits = energy.summary["fit"]
    unused_j = sum(float(fit["measured_j"]) for fit in fits if fit["instance"] is None)
    narrowed = {
        "scope": scope,
        "measured_j": energy.summary["measured_j"] - unused_j,
        "idle_j": energy.summary["idle_j"] - unused_j,
        "fit": [fit for fit in fits if fit["instance"] is not None],
    }
    return replace(energy, summary={**energy.summary, **narrowed})


def _saved(run: Run) -> RunEnergy | None:
    """What is saved of a complete `run`; None where that is nothing, broken, or older than the run's files."""
    folder = run.path / ENERGY_DIR
    if run.manifest.get("state") != "complete":  # a run that goes on, or was cut off, may have grown since
        return None
    try:
        saved = (folder / SUMMARY).stat().st_mtime
        files = [run.path / MANIFEST, *(path for path in run.path.glob("*.parquet") if path.is_file())]
        if any(path.stat().st_mtime > saved for path in files):
            return None
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if not isinstance(summary, dict) or (run.has("warmup") and "warmup_j" not in summary):
            return None  # or from before the warm-up's share was told
        return RunEnergy(pl.read_parquet(folder / "requests.parquet"), summary)
    except (OSError, ValueError, pl.exceptions.PolarsError):
        return None
