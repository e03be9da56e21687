"""Doubt about the power sensors: are their windows and lags what the manifest says?

The run's own answer (`analysis.sensors`) is the cross-check. It is asked here alone, for it takes longer than a small
run's attribution.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from analysis.accounts import slabs_of
from analysis.energy import attribute
from analysis.evidence import ERROR, OK, UNKNOWN, Doubt, Evidence
from analysis.load import NS_PER_S, GpuData, load_run
from analysis.manifest import gpu_entry
from analysis.samples import SOURCES
from analysis.sensors import disagreement, estimate_of, told_of
from analysis.timeline import Estimate
from replay.rundir import MANIFEST, Run
from tracegen.console import plural


def sensor_windows(case: Evidence) -> Doubt:
    """How far the manifest's windows and lags of the sensors are from what the run shows.

    The size: the joules that would be on another bill (a request's, idle's, or that of others' work) had the manifest
    told what the run shows; half the sum of all differences, for what one gains another loses.
    """
    name = "sensor_windows"
    told = [s for fit in case.fits for s in fit.get("sensors") or [] if s.get("window_from") == "manifest"]
    if not told:
        return Doubt(name, UNKNOWN, f"{MANIFEST} tells no sensor's window, so there is nothing to compare with the run")
    if case.readings is None:
        return Doubt(name, UNKNOWN, "no power was read in the window")
    estimates = _estimates(case)
    known = {key: found for key, (_, found) in estimates.items() if isinstance(found, Estimate)}
    if not known:
        whys = dict.fromkeys(found for _, found in estimates.values() if isinstance(found, str))
        return Doubt(name, UNKNOWN, "; ".join(whys) or "no instance recorded its steps")
    said = {key: text for key, (gpu, found) in estimates.items() if (text := disagreement(gpu, found)) is not None}
    if not said:
        return Doubt(name, OK, f"window and lag of {plural(len(known), 'GPU')} as the run shows them", 0.0, ERROR)
    moved_j = _moved_j(case, _with_sensors(case.run, {key: known[key] for key in said}))
    do = "measure the sensors (replay probe), or leave them out of the manifest: the run's own answer is taken then"
    return case.sized(name, moved_j, ERROR, "; ".join(said.values()), do)


def _estimates(case: Evidence) -> dict[tuple[str, int], tuple[GpuData, Estimate | str]]:
    """By host and index each GPU with a window told and steps to compare with, and what the run shows of its sensor."""
    data = load_run(case.run, case.summary["scope"])
    slabs = slabs_of(data)[0].sample()[0]
    return {
        (gpu.host, gpu.gpu): (gpu, estimate_of(gpu, slab.steps))
        for slab in slabs
        if slab.instance.recorded and len(slab.steps)
        for gpu in slab.gpus
        if any(told_of(gpu, source) for source in SOURCES)
    }


def _with_sensors(run: Run, found: Mapping[tuple[str, int], Estimate]) -> Run:
    """`run` as if its manifest told of the GPUs' sensors what was `found`.

    No sensor tells of what is still to come: a lag estimated below zero, as its error allows, is none.
    """
    manifest: dict[str, Any] = copy.deepcopy(run.manifest)
    changed = replace(run, manifest=manifest)
    for (host, gpu), sensor in found.items():
        told = gpu_entry(changed, host, gpu)["sensors"][sensor.source]
        told |= {"window_ns": sensor.window_s * NS_PER_S, "lag_ns": max(sensor.lag_s, 0.0) * NS_PER_S}
    return changed


def _moved_j(case: Evidence, other: Run) -> float:
    """Half the sum of what is billed otherwise where `other` is believed."""
    answer = attribute(other, scope=case.summary["scope"])
    assert case.requests is not None
    both = case.requests.select("request_id", "energy_j").join(
        answer.requests.select("request_id", other_j="energy_j"), on="request_id"
    )
    apart_j = float((both["energy_j"] - both["other_j"]).abs().sum())
    apart_j += sum(abs(float(case.summary[key]) - float(answer.summary[key])) for key in ("idle_j", "other_j"))
    return apart_j / 2


CHECKS = (sensor_windows,)
