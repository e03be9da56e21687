"""What an attribution says of a run as a whole: the document of `energy/summary.json`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis.idle import Idle
from analysis.load import Floats, RunData
from analysis.model import Quality
from analysis.timeline import GpuTimeline

# One board's gain against another's, from the published tests of power meters on H100 (Yang et al., "Part-time Power
# Measurements: nvidia-smi's Lack of Attention", SC 2024): about ±5 %. Boards of one group may err together.
GAIN_REL_SE = 0.05
RECORDS, CLIENT = "step records", "client timestamps"


@dataclass(frozen=True)
class InstanceEnergy:
    """One instance accounted for; arrays by row of the run's requests, NaN where nothing is known of a request."""

    instance: int | None
    membership: str | None
    prefill_j: Floats
    decode_j: Floats
    shared_j: Floats
    variance: Floats  # of the request's energy, J²
    measured_j: float
    idle_j: float
    other_j: float
    quality: Quality | None
    misfit_rel: float
    idle: tuple[Idle, ...]
    timelines: tuple[GpuTimeline, ...]


def summarize(
    data: RunData, parts: list[InstanceEnergy], frame: pl.DataFrame, method: str, unknown: int
) -> dict[str, Any]:
    """The document of `energy/summary.json`."""
    measured_j, idle_j, other_j = (
        float(np.sum([getattr(part, name) for part in parts])) for name in ("measured_j", "idle_j", "other_j")
    )
    attributed_j = float(frame["energy_j"].sum())
    notes = [*data.notes]
    if unknown:
        notes.append(f"{unknown} requests left no record of their work: their energy is null, not zero")
    for part in parts:
        notes += [i.why for i in part.idle if i.why]
        notes += sorted({f"energy from {t.curve.source} samples: the counter {t.why}" for t in part.timelines if t.why})
    memberships = sorted({p.membership for p in parts if p.membership})
    ran = frame.filter(pl.col("energy_j") > 0).height
    return {
        "run_id": data.run.manifest.get("run_id", data.run.name),
        "simulated": data.run.simulated,
        "method": method,
        "membership": " and ".join(memberships) or None,
        "scope": data.scope,
        "window": {"start_ns": data.window_ns[0], "end_ns": data.window_ns[1], "duration_s": data.duration_s},
        "requests": frame.height,
        "requests_with_energy": ran,
        "measured_j": measured_j,
        "attributed_j": attributed_j,
        "prefill_j": float(frame["prefill_j"].sum()),
        "decode_j": float(frame["decode_j"].sum()),
        "shared_j": float(frame["shared_j"].sum()),
        "idle_j": idle_j,
        "other_j": other_j,
        "residual_j": measured_j - attributed_j - idle_j - other_j,
        "gain_rel_se": GAIN_REL_SE,
        "fit": [_fit_document(part) for part in parts],
        "notes": notes,
    }


def _fit_document(part: InstanceEnergy) -> dict[str, Any]:
    """What the summary says about one instance's meter and model."""
    mismatches = [t.mismatch_rel for t in part.timelines if t.mismatch_rel is not None]
    quality = part.quality
    return {
        "instance": part.instance,
        "gpus": len(part.timelines),
        "membership": part.membership,
        "measured_j": part.measured_j,
        "energy_source": "+".join(sorted({t.curve.source for t in part.timelines})),
        "samples_over_counter_rel": float(np.mean(mismatches)) if mismatches else None,
        "idle_power_w": {
            "before": sum(i.before_w for i in part.idle),
            "after": sum(i.after_w for i in part.idle),
            "source": "+".join(sorted({i.source for i in part.idle})),
        },
        "model": quality.model if quality else None,
        "steps": quality.steps if quality else 0,
        "sensor_windows": quality.windows if quality else 0,
        "duration_rel_rms": quality.duration_rel_rms if quality else None,
        "power_rel_rms": quality.power_rel_rms if quality else None,
        "block_misfit_rel": part.misfit_rel,
    }
