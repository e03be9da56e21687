"""What each request of a run cost in energy: `attribute` computes it, `write_energy` keeps it in the run's `energy/`.

Per engine instance: the energy curve of its GPUs, idle power, a step model, Aumann-Shapley prices, conservation block
by block, prefix sums over segments. The truth table of a simulated run is never read here. `accounts` gives what that
rests on, for questions beyond who pays what.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.blocks import Balance, Blocks, balance, cut_blocks
from analysis.idle import Idle, idle_power
from analysis.load import Floats, GpuData, InstanceData, RunData, load_run
from analysis.membership import from_client
from analysis.model import TINY, LinearModel, Model, Parts, Quality, fit_model
from analysis.split import MARGINAL, METHOD_NAMES, METHODS, Shares, scale_parts, share, share_marginal
from analysis.steps import PREFILL, Bools, Segments, Steps, from_records, no_steps
from analysis.summary import CLIENT, RECORDS, InstanceEnergy, summarize
from analysis.timeline import GpuTimeline, read_timeline
from replay.rundir import Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError
from tracegen.schema import write_parquet

ENERGY_DIR = "energy"
SUMMARY = "summary.json"
DEFAULT_METHOD = "shapley"


@dataclass(frozen=True)
class Energy:
    """A run accounted for."""

    run: Run
    requests: pl.DataFrame  # request_id, energy_j, prefill_j, decode_j, shared_j, energy_se_j
    instances: tuple[InstanceEnergy, ...]
    summary: dict[str, Any]


def attribute(run: Run, method: str = DEFAULT_METHOD, scope: str = "gpu") -> Energy:
    """Share the measured energy of `run` out to its requests.

    `requests` has one row a row of requests.parquet: `energy_j = prefill_j + decode_j`, of which `shared_j` was shared
    equally, and the standard error `energy_se_j`; null where nothing is known of a request's work.
    Σ energy_j + idle_j + other_j = measured_j to 1e-9, with every method.

    Raises `AnalysisError` for an unknown method or a run without power, `RunError` for a broken table.
    """
    return attribute_methods(run, [method], scope)[method]


def attribute_methods(run: Run, methods: Sequence[str], scope: str = "gpu") -> dict[str, Energy]:
    """`attribute` by several methods at the price of reading and fitting once."""
    for method in methods:
        if method not in METHOD_NAMES:
            raise AnalysisError(f"method '{method}' is unknown; use one of {', '.join(METHOD_NAMES)}")
    data = load_run(run, scope)
    known = accounts(data)
    seen = np.any([account.seen for account in known], axis=0)[: data.requests.height]
    return {m: _energy(data, [_share_out(data, account, m) for account in known], m, seen) for m in methods}


def accounts(data: RunData) -> "list[Account]":
    """What attribution knows of each instance of a run. Raises as `attribute` does."""
    # Requests of the trace whose end was not recorded stand behind the others, so that their work is known as theirs.
    ids = pl.concat([data.requests["request_id"], data.unrecorded])
    members = [_members(data, instance, ids) for instance in data.instances]
    return [_account(data, inst, member, len(ids)) for inst, member in zip(data.instances, members, strict=True)]


def measured_curves(data: RunData) -> list[tuple[GpuData, GpuTimeline]]:
    """Each accounted GPU with what its sensors say. Raises `AnalysisError` for one that says nothing."""
    return [(gpu, _timeline(data, gpu)) for instance in data.instances for gpu in instance.gpus]


@dataclass(frozen=True)
class Account:
    """An instance up to the point where methods part."""

    instance: InstanceData
    membership: str | None
    steps: Steps
    segments: Segments  # `request` counts the rows of the run's requests, then the trace's that were not recorded
    seen: Bools  # by the same rows: whether the request was in a step inside the window
    model: Model | None  # None without steps
    idle_w: Floats  # (n,) of the whole group, by step
    parts: Parts
    rival: tuple[Model, Parts] | None  # the linear model, where that is not the model itself
    blocks: Blocks
    balance: Balance
    quality: Quality | None
    idle: tuple[Idle, ...]
    timelines: tuple[GpuTimeline, ...]


def _members(data: RunData, instance: InstanceData, ids: pl.Series) -> tuple[str | None, Steps, Segments]:
    """Steps and segments of an instance, and where they come from."""
    if instance.steps is not None and instance.segments is not None:
        source = str(data.run.path / "segments.parquet")
        return RECORDS, *from_records(instance, ids, source)
    rebuilt = from_client(instance, ids, data.duration_s)
    if rebuilt is not None:
        return CLIENT, *rebuilt
    return None, *no_steps()


def _account(
    data: RunData, instance: InstanceData, member: tuple[str | None, Steps, Segments], requests: int
) -> Account:
    """Fit the step model of an instance and make it agree with the meter."""
    membership, steps, segments = member
    duration_s = data.duration_s
    timelines = tuple(_timeline(data, gpu) for gpu in instance.gpus)
    idle = tuple(_idle(data, g, t, t.curve.source, steps) for g, t in zip(instance.gpus, timelines, strict=True))
    blocks = cut_blocks(steps, duration_s)
    measured_j = np.sum([np.diff(t.curve.at(blocks.cuts_s)) for t in timelines], axis=0)

    def idle_w(t_s: Floats) -> Floats:
        return np.asarray(np.sum([i.at(t_s, duration_s) for i in idle], axis=0))

    parts, model, rival, quality = Parts(np.zeros(0), np.zeros(0), np.zeros((0, 4))), None, None, None
    step_idle_w = idle_w(steps.end_s)
    if len(steps):
        windows = []
        for gpu, line in zip(instance.gpus, timelines, strict=True):
            rest = _idle(data, gpu, line, line.windows.source, steps)
            windows.append((line.windows, rest.at(line.windows.end_s, duration_s)))
        model, quality = fit_model(steps, windows)
        parts = _inside(model.parts(steps, step_idle_w), steps, duration_s)
        if not isinstance(model, LinearModel):
            straight, _ = fit_model(steps, windows, linear=True)
            rival = straight, _inside(straight.parts(steps, step_idle_w), steps, duration_s)
    settled = balance(blocks, steps, parts.total, measured_j, idle_w, float(np.sum([i.se_w for i in idle])))
    return Account(
        instance=instance,
        membership=membership,
        steps=steps,
        segments=segments,
        seen=_seen(segments, settled.step_j, requests),
        model=model,
        idle_w=step_idle_w,
        parts=parts,
        rival=rival,
        blocks=blocks,
        balance=settled,
        quality=quality,
        idle=idle,
        timelines=timelines,
    )


def _seen(segments: Segments, step_j: Floats, requests: int) -> Bools:
    """Which of so many requests were in a step that cost something, that is one inside the window."""
    before = np.concatenate([[0], np.cumsum(step_j > 0)])
    costly = (before[segments.last + 1] > before[segments.first]) & (segments.request >= 0)
    seen = np.zeros(requests, dtype=bool)
    seen[segments.request[costly]] = True
    return seen


def _timeline(data: RunData, gpu: GpuData) -> GpuTimeline:
    line = read_timeline(gpu, data.duration_s)
    if isinstance(line, str):
        raise AnalysisError(f"{data.run.path / 'power.parquet'}: {line}")
    return line


def _idle(data: RunData, gpu: GpuData, line: GpuTimeline, source: str, steps: Steps) -> Idle:
    return idle_power(gpu, source, line.curve, [steps], data.duration_s, str(data.run.path))


def _inside(parts: Parts, steps: Steps, duration_s: float) -> Parts:
    """`parts` for the part of each step that lies inside the window."""
    inside_s = np.clip(steps.end_s, 0, duration_s) - np.clip(steps.start_s, 0, duration_s)
    span_s = steps.end_s - steps.start_s
    fraction = np.divide(inside_s, span_s, out=np.zeros_like(span_s), where=span_s > 0)
    return Parts(parts.total * fraction, parts.shared * fraction, parts.price * fraction[:, None])


def _share_out(data: RunData, account: Account, method: str) -> InstanceEnergy:
    """An instance's energy by request, by `method`."""
    count = data.requests.height
    segments = account.segments
    shares = _shares(account, method)
    ours = (segments.request >= 0) & (segments.request < count)
    unrecorded = segments.request >= count
    prefill = ours & (segments.kind == PREFILL)

    def by_request(values: Floats, rows: Bools) -> Floats:
        return np.bincount(segments.request[rows], weights=values[rows], minlength=count).astype(np.float64)

    energy_j = by_request(shares.energy_j, ours)
    variance = _variance(account, energy_j, by_request(shares.steps, ours), by_request(shares.time_s, ours))
    other = _other_answer(account, method)
    if other is not None:
        variance += (energy_j - by_request(other.energy_j, ours)) ** 2
    return InstanceEnergy(
        instance=account.instance.instance,
        membership=account.membership,
        prefill_j=by_request(shares.energy_j, prefill),
        decode_j=by_request(shares.energy_j, ours & ~prefill),
        shared_j=by_request(shares.shared_j, ours),
        variance=variance,
        measured_j=float(account.balance.measured_j.sum()),
        idle_j=float(account.balance.idle_j.sum()),
        other_j=float(shares.energy_j[~ours].sum()) + shares.unlisted_j,
        unrecorded_j=float(shares.energy_j[unrecorded].sum()),
        unrecorded=int(np.unique(segments.request[unrecorded]).size),
        quality=account.quality,
        misfit_rel=account.balance.misfit_rel,
        idle=account.idle,
        timelines=account.timelines,
    )


def _shares(account: Account, method: str, *, rival: bool = False) -> Shares:
    """What each segment pays, by `method` and the instance's model or its rival."""
    steps, step_j = account.steps, account.balance.step_j
    model, parts = account.rival if rival and account.rival is not None else (account.model, account.parts)
    if method == MARGINAL and model is not None:
        return share_marginal(model, steps, account.segments, account.idle_w, step_j)
    prices = METHODS.get(method, METHODS[DEFAULT_METHOD])(scale_parts(parts, step_j), steps)
    return share(prices, steps, account.segments, account.blocks)


def _variance(account: Account, energy_j: Floats, steps: Floats, time_s: Floats) -> Floats:
    """Variance of each request's energy, J², as far as the residuals tell it.

    `energy_se_j² = energy_j²·(m² + (d² + w²)/n + (t/T)²) + Δ²`: m the model's misfit between blocks, which does not
    average out in a request; d and w the relative residuals of step durations and sensor windows, over the request's n
    steps; t the dating error (a poll's, and the clock offset's bound) over its T seconds; Δ what another answer to
    the same question differs by (`_other_answer`).
    """
    quality = account.quality
    if quality is None:
        return np.zeros_like(energy_j)
    noise = (quality.duration_rel_rms or 0.0) ** 2 + (quality.power_rel_rms or 0.0) ** 2
    poll_s = max(float(np.median(np.diff(g.t_s))) if g.t_s.size > 1 else 0.0 for g in account.instance.gpus)
    dating_s2 = poll_s**2 / 12 + account.instance.clock_error_s**2
    relative = account.balance.misfit_rel**2 + noise / np.maximum(steps, 1) + dating_s2 / np.maximum(time_s, 1e-3) ** 2
    return np.asarray(energy_j**2 * relative)


def _other_answer(account: Account, method: str) -> Shares | None:
    """A second opinion whose difference counts as error: the linear model's answer, or an equal split.

    The equal split stands against membership by client timestamps, where who did what is a guess; `marginal` is as far
    off there, in proportion. Methods without a model have no second opinion: what they say is their definition.
    """
    if method not in {DEFAULT_METHOD, MARGINAL}:
        return None
    if account.membership == CLIENT:
        equal, priced, own = (_shares(account, m) for m in ("equal-time", DEFAULT_METHOD, method))
        ratio = np.divide(equal.energy_j, priced.energy_j, out=np.ones_like(own.energy_j), where=priced.energy_j > TINY)
        return replace(own, energy_j=own.energy_j * ratio)
    return None if account.rival is None else _shares(account, method, rival=True)


def _energy(data: RunData, parts: list[InstanceEnergy], method: str, seen: Bools) -> Energy:
    """The run's table and summary from its instances; `seen`: which requests were in a step."""
    prefill_j, decode_j, shared_j, variance = (
        np.sum([getattr(p, name) for p in parts], axis=0) for name in ("prefill_j", "decode_j", "shared_j", "variance")
    )
    unknown = _unknown(data, parts, seen)
    frame = pl.DataFrame(
        {
            "request_id": data.requests["request_id"],
            "energy_j": prefill_j + decode_j,
            "prefill_j": prefill_j,
            "decode_j": decode_j,
            "shared_j": shared_j,
            "energy_se_j": np.sqrt(variance),
        }
    )
    frame = frame.with_columns(pl.when(~pl.Series(unknown)).then(pl.exclude("request_id")).name.keep())
    summary = summarize(data, parts, frame, method, int(unknown.sum()))
    if method == MARGINAL:
        left = format_si(summary["other_j"], " J", 4)
        summary["notes"].append(
            f"other ({left}) has what no single request adds to a step: marginal costs do not add up"
        )
    return Energy(data.run, frame, tuple(parts), summary)


def _unknown(data: RunData, parts: list[InstanceEnergy], seen: Bools) -> Bools:
    """Requests of whose work nothing is known: null, not zero.

    With step records a request in no step did no work, which is a measured zero, unless it got tokens: then its record
    was lost. Without step records nothing is known of a request that left no trace in time.
    """
    recorded = [p.instance for p in parts if p.membership == RECORDS]
    got_tokens = pl.col("first_token_ns").is_not_null() | (pl.col("status") == "ok")
    idle_for_sure = data.requests.select(pl.col("instance").is_in(recorded) & ~got_tokens).to_series().fill_null(False)
    return np.asarray(~seen & ~idle_for_sure.to_numpy())


def write_energy(energy: Energy, tables: Mapping[str, pl.DataFrame]) -> Path:
    """Keep an attribution as `energy/` in its run directory: `tables` by name, then summary.json; returns the folder.

    Everything is written beside and renamed into place, the summary last: who finds it finds all of it.
    Raises `AnalysisError` where the file system refuses.
    """
    folder = energy.run.path / ENERGY_DIR
    partial = folder / f".{SUMMARY}.partial"
    try:
        folder.mkdir(exist_ok=True)
        (folder / SUMMARY).unlink(missing_ok=True)  # while tables change there is no summary
        for name, frame in tables.items():
            write_parquet(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), folder / f"{name}.parquet")
        try:
            partial.write_text(json.dumps(energy.summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            partial.replace(folder / SUMMARY)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise AnalysisError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return folder
