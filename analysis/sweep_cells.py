"""The figures of one cell of a sweep: its run's latencies, rates and joules, over all and by group."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from analysis.groups import ALL, ITL
from analysis.load import open_run
from analysis.saved import RunEnergy, ensure_energy
from analysis.serving import Question, serving
from analysis.slo import DEFAULT_SLO, Slo
from replay.rundir import Run
from tracegen.errors import AnalysisError, RunError

PERCENTILES = (50.0, 99.0)
# A run's verdict on its clocks, and the words by which it names what a GPU does at that setting every time, and what
# it does when it is too hot or its supply fails (NVML's throttle reasons).
CLOCKS, OWN_LIMITS, FAULTS = "clocks_held", ("software power cap", "MHz at most"), ("slowdown", "brake")
OF_THAT_NAME = "all (label)"  # a group that is called as all requests together are
_PER_GROUP = {  # of `analysis.groups.aggregate`
    "requests": "requests",
    "answered": "served",
    "ttft_ms_mean": "ttft_mean_ms",
    "ttft_ms_p50": "ttft_p50_ms",
    "ttft_ms_p99": "ttft_p99_ms",
    "tpot_ms_mean": "tbt_mean_ms",
    f"{ITL}_p99": "tbt_p99_ms",
    "e2el_ms_mean": "e2e_mean_ms",
    "e2el_ms_p99": "e2e_p99_ms",
    "energy_per_request_j": "energy_per_request_j",
    "energy_per_output_token_j": "energy_per_output_token_j",
    "slo_attainment": "slo_attainment",
    "slo_attainment_ttft": "slo_attainment_ttft",
    "slo_attainment_tpot": "slo_attainment_tbt",
    "slo_attainment_e2el": "slo_attainment_e2e",
}
_COUNTS = ("requests", "served")
_PARTS = ("prefill_j", "decode_j", "shared_j", "idle_j", "other_j")
GROUP_FIGURES = pl.Schema(
    {name: pl.Int64() if name in _COUNTS else pl.Float64() for name in _PER_GROUP.values()},
)
FIGURES = pl.Schema(
    {
        **GROUP_FIGURES,
        "duration_s": pl.Float64(),
        "throughput_rps": pl.Float64(),
        "input_tokens_s": pl.Float64(),
        "output_tokens_s": pl.Float64(),
        "power_w": pl.Float64(),
        "energy_j": pl.Float64(),
        **dict.fromkeys(_PARTS, pl.Float64()),
        "attributed_per_request_j": pl.Float64(),
        "gpus": pl.Int64(),
        "gpu_s_per_request": pl.Float64(),
        "tbt_source": pl.String(),
    }
)


@dataclass(frozen=True)
class CellFigures:
    """What one run came to. `row` has the names of `FIGURES`, each of `groups` a `group` and those of `GROUP_FIGURES`.

    `why`: it cannot be read, and has no figures; `no_energy`: why its joules are null.
    """

    row: dict[str, Any]
    groups: list[dict[str, Any]]
    model: str | None = None
    engine: str | None = None
    valid: bool | None = None
    invalid_because: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()  # names of those that are against it
    why: str | None = None
    no_energy: str | None = None

    @property
    def clock_held(self) -> bool | None:
        """False where all that is against the run is that its GPUs' own limits kept them below the clock asked for.

        Such a run tells what this clock comes to there, and a repeat would tell the same; heat and faults do not.
        """
        if CLOCKS not in self.verdicts:
            return None if self.valid is None else True
        (because, *others) = self.invalid_because
        own = any(words in because for words in OWN_LIMITS) and not any(words in because for words in FAULTS)
        return False if own and not others else None


def cell_figures(path: Path, by: str, scope: str, slo: Slo | None) -> CellFigures:
    """The figures of the run at `path`; its energy is attributed and saved where it is not."""
    try:
        run = open_run(path)
        energy = ensure_energy(run, scope)
        answer = serving(run, energy, Question(by=by, slo=slo or DEFAULT_SLO, percentiles=PERCENTILES))
    except (AnalysisError, RunError) as error:
        return CellFigures({}, [], why=str(error))
    unasked = [] if slo is not None else [name for name in GROUP_FIGURES if name.startswith("slo_")]
    *each, whole = (_renamed(row) | dict.fromkeys(unasked) for row in answer.figures.iter_rows(named=True))
    names = answer.figures["group"].head(-1).to_list()
    groups = [{"group": OF_THAT_NAME if name == ALL else name, **row} for name, row in zip(names, each, strict=True)]
    rates = answer.whole
    row = {
        **whole,
        "duration_s": rates["duration_s"],
        "throughput_rps": rates["request_throughput"],
        "input_tokens_s": rates["total_token_throughput"] - rates["output_throughput"],
        "output_tokens_s": rates["output_throughput"],
        "attributed_per_request_j": whole["energy_per_request_j"],
        "tbt_source": answer.itl_source,
        **_joules(run, energy, scope, rates),
    }
    manifest = run.manifest
    models = {str(i["model"]) for i in manifest.get("instances") or [] if i.get("model")}
    verdicts = [v for v in manifest.get("verdicts") or [] if v.get("ok") is False]
    because = manifest.get("invalid_because") or [f"{v.get('name')}: {v.get('why')}" for v in verdicts]
    return CellFigures(
        row,
        groups,
        model=" and ".join(sorted(models)) or None,
        engine=manifest.get("engine"),
        valid=not because if manifest.get("valid") is None else bool(manifest["valid"]),
        invalid_because=tuple(str(text) for text in because),
        verdicts=tuple(str(v.get("name")) for v in verdicts),
        no_energy=energy.why,
    )


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {ours: row.get(theirs) for theirs, ours in _PER_GROUP.items()}


def _joules(run: Run, energy: RunEnergy, scope: str, rates: dict[str, Any]) -> dict[str, Any]:
    """What the meters of `scope` say of the window as a whole, and per request and token that was served.

    Idle energy is in it; the work of requests that were due in the warm-up is not in what is per request. GPUs are held
    for all of the window: those of the engine instances, or with scope `node` all of the node.
    """
    served, tokens, duration_s = rates["answered"], rates["output_tokens"], rates["duration_s"]
    gpus = _gpus(run, energy, scope)
    held = {"gpus": gpus, "gpu_s_per_request": gpus * duration_s / served if gpus and served else None}
    summary = energy.summary
    if summary is None:
        names = ("power_w", "energy_j", "energy_per_request_j", "energy_per_output_token_j", *_PARTS)
        return {**held, **dict.fromkeys(names)}
    own_j = summary["measured_j"] - float(summary.get("warmup_j") or 0.0)
    return {
        **held,
        "power_w": summary["measured_j"] / summary["window"]["duration_s"],
        "energy_j": summary["measured_j"],
        "energy_per_request_j": own_j / served if served else None,
        "energy_per_output_token_j": own_j / tokens if tokens else None,
        **{name: summary[name] for name in _PARTS},
    }


def _gpus(run: Run, energy: RunEnergy, scope: str) -> int | None:
    """How many GPUs `scope` has: those that were read, else those that the manifest gives to the instances."""
    if energy.summary is not None:
        return sum(int(fit["gpus"]) for fit in energy.summary["fit"])
    given = sum(len(i.get("gpus") or []) for i in run.manifest.get("instances") or [])
    return given or None if scope == "gpu" else None
