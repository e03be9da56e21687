"""What each request of a run cost in energy: `attribute` computes it, `write_energy` keeps it in the run's `energy/`.

Per engine instance: the energy curve of its GPUs, idle power, a step model, prices, conservation block by block, and
running sums over segments; all of it slab by slab, so that memory does not grow with a run's length but by requests
and segments. The truth table of a simulated run is never read here.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.accounts import Account, Fitted, account, fit_run, slabs_of
from analysis.kernels import add_by_request
from analysis.load import Floats, InstanceData, RunData, load_run
from analysis.meters import Meters
from analysis.model import TINY
from analysis.slabs import RunSlabs, Slab
from analysis.split import MARGINAL, METHOD_NAMES, METHODS, Shares, scale_parts, share, share_marginal
from analysis.steps import PREFILL, Bools
from analysis.summary import CLIENT, RECORDS, InstanceEnergy, summarize
from analysis.uncertainty import shapley_variance
from replay.rundir import Run
from tracegen.console import format_si
from tracegen.errors import AnalysisError
from tracegen.schema import write_parquet

ENERGY_DIR = "energy"
SUMMARY = "summary.json"
DEFAULT_METHOD = "shapley"
THREADS = 2  # on instances at once; a third would have nothing left to do while the next slab is read


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


def attribute_methods(
    run: Run,
    methods: Sequence[str],
    scope: str = "gpu",
    progress: Callable[[float], None] = lambda _: None,
    **options: int,
) -> dict[str, Energy]:
    """`attribute` by several methods at the price of reading and fitting once.

    `progress` is told the part that is done; `options` are those of `RunSlabs`.
    """
    for method in methods:
        if method not in METHOD_NAMES:
            raise AnalysisError(f"method '{method}' is unknown; use one of {', '.join(METHOD_NAMES)}")
    data = load_run(run, scope)
    slabs, remarks = slabs_of(data, **options)
    data = replace(data, notes=(*data.notes, *remarks))
    fitted, parts = _fitted(data, slabs)
    tallies = {m: [_Tally(data, i, fit, m) for i, fit in zip(data.instances, fitted, strict=True)] for m in methods}
    meters = [Meters(data, instance) for instance in data.instances]

    def settle(i: int, slab: Slab) -> None:
        known = account(data, slab, fitted[i], meters[i].known())
        meters[i].add(known)
        for method in methods:
            tallies[method][i].add(known)

    # Instances share nothing but what is read, and the loops over steps do not hold the interpreter's lock.
    with ThreadPoolExecutor(THREADS) as workers:
        for done, part in enumerate(parts):
            for _ in workers.map(settle, range(len(part)), part):
                pass
            progress((done + 1) / slabs.count)
    data = replace(data, notes=(*data.notes, *(note for meter in meters for note in meter.notes())))
    return {
        m: _energy(data, [t.total(meter) for t, meter in zip(tallies[m], meters, strict=True)], m, tallies[m])
        for m in methods
    }


def _fitted(data: RunData, slabs: RunSlabs) -> tuple[list[Fitted], Iterator[list[Slab]]]:
    """What is fitted on each instance, and the run's slabs."""
    if slabs.count > 1:
        return fit_run(data, slabs.sample()), iter(slabs)
    whole = list(slabs)
    return fit_run(data, whole), iter(whole)


class _Tally:
    """One instance's energy by request, by one method, summed up slab by slab."""

    def __init__(self, data: RunData, instance: InstanceData, fitted: Fitted, method: str) -> None:
        self._instance, self._fitted, self._method = instance, fitted, method
        self._count, self._known = data.requests.height, len(data.ids)
        names = ("prefill", "decode", "shared", "steps", "time", "other_answer", "equal")
        self._sums = {name: np.zeros(self._count) for name in names}
        self._unrecorded_j, self._other_j, self._idle_j, self._measured_j = np.zeros(self._known), 0.0, 0.0, 0.0
        self.seen = np.zeros(self._known, dtype=bool)
        self._membership: str | None = None

    def add(self, account: Account) -> None:
        """Add a slab."""
        segments = account.segments
        self._measured_j += float(account.balance.measured_j.sum())
        self._idle_j += float(account.balance.idle_j.sum())
        if not len(account.steps):
            return
        self._membership = RECORDS if self._instance.recorded else CLIENT
        shares = _shares(account, self._method)
        ours = (segments.request >= 0) & (segments.request < self._count)
        prefill = segments.kind == PREFILL
        self._add("prefill", account, ours & prefill, shares.energy_j)
        self._add("decode", account, ours & ~prefill, shares.energy_j)
        self._add("shared", account, ours, shares.shared_j)
        self._add("steps", account, ours, shares.steps)
        self._add("time", account, ours, shares.time_s)
        other = _other_answer(account, self._method, self._membership, shares)
        self._add("other_answer", account, ours, (shares if other is None else other).energy_j)
        if self._model_opinion(self._method):
            self._add("equal", account, ours, _shares(account, "equal-time").energy_j)
        self._other_j += float(shares.energy_j[~ours].sum()) + shares.unlisted_j
        add_by_request(segments.request, segments.request >= self._count, shares.energy_j, self._unrecorded_j)
        before = np.concatenate([[0], np.cumsum(account.balance.step_j > 0)])
        costly = (before[segments.last + 1] > before[segments.first]) & (segments.request >= 0)
        self.seen[segments.request[costly]] = True

    def _add(self, name: str, account: Account, rows: Bools, values: Floats) -> None:
        add_by_request(account.segments.request, rows, values, self._sums[name])

    def total(self, meters: Meters) -> InstanceEnergy:
        """What it came to."""
        sums, unrecorded = self._sums, self._unrecorded_j[self._count :]
        energy_j = sums["prefill"] + sums["decode"]
        quality = self._fitted.quality
        if quality is not None and self._model_opinion(self._method):
            variance = shapley_variance(
                energy_j,
                sums["other_answer"],
                sums["equal"],
                quality.duration_rel_rms or 0.0,
                self._instance.clock_error_s / np.maximum(sums["time"], 1e-3),
            )
        else:
            variance = self._variance(energy_j) + (energy_j - sums["other_answer"]) ** 2
        return InstanceEnergy(
            instance=self._instance.instance,
            membership=self._membership,
            prefill_j=sums["prefill"],
            decode_j=sums["decode"],
            shared_j=sums["shared"],
            variance=variance,
            measured_j=self._measured_j,
            idle_j=self._idle_j,
            other_j=self._other_j,
            unrecorded_j=float(unrecorded.sum()),
            unrecorded=int(self.seen[self._count :].sum()),
            quality=self._fitted.quality,
            misfit_rel=self._fitted.misfit_rel,
            idle=self._fitted.idle,
            regimes=self._fitted.regimes,
            timelines=meters.facts(self._fitted),
        )

    def _model_opinion(self, method: str) -> bool:
        """Whether errors are told by `analysis.uncertainty`."""
        return self._instance.recorded and bool(self._fitted.rivals) and method == DEFAULT_METHOD

    def _variance(self, energy_j: Floats) -> Floats:
        """Variance of each request's energy, J², as far as the residuals tell it; with a model: `uncertainty`.

        `energy_se_j² = energy_j²·(m² + (d² + w²)/n + (t/T)²) + Δ²`: m the model's misfit between blocks, which does
        not average out in a request; d and w the relative residuals of step durations and sensor windows, over the
        request's n steps; t the dating error (a poll's, and the clock offset's bound) over its T seconds; Δ what
        another answer to the same question differs by (`_other_answer`).
        """
        quality = self._fitted.quality
        if quality is None:
            return np.zeros_like(energy_j)
        noise = (quality.duration_rel_rms or 0.0) ** 2 + (quality.power_rel_rms or 0.0) ** 2
        dating_s2 = self._fitted.poll_s**2 / 12 + self._instance.clock_error_s**2
        steps, time_s = np.maximum(self._sums["steps"], 1), np.maximum(self._sums["time"], 1e-3)
        return np.asarray(energy_j**2 * (self._fitted.misfit_rel**2 + noise / steps + dating_s2 / time_s**2))


def _shares(account: Account, method: str, *, rival: bool = False) -> Shares:
    """What each segment pays, by `method` and the instance's model or its rival."""
    steps, step_j, fitted = account.steps, account.balance.step_j, account.fitted
    alone = rival and account.rival is not None
    model, parts = (fitted.rival if alone else fitted.model), (account.rival if alone else account.parts)
    assert parts is not None
    if method == MARGINAL and model is not None:
        return share_marginal(model, steps, account.segments, account.idle_w, step_j)
    prices = METHODS.get(method, METHODS[DEFAULT_METHOD])(scale_parts(parts, step_j), steps)
    return share(prices, steps, account.segments, account.blocks)


def _other_answer(account: Account, method: str, membership: str, own: Shares) -> Shares | None:
    """A second opinion whose difference counts as error: the linear model's answer, or an equal split.

    The equal split stands against membership by client timestamps, where who did what is a guess; `marginal` is as far
    off there, in proportion. Methods without a model have no second opinion: what they say is their definition.
    """
    if method not in {DEFAULT_METHOD, MARGINAL}:
        return None
    if membership == CLIENT:
        equal, priced = (_shares(account, m) for m in ("equal-time", DEFAULT_METHOD))
        ratio = np.divide(equal.energy_j, priced.energy_j, out=np.ones_like(own.energy_j), where=priced.energy_j > TINY)
        return replace(own, energy_j=own.energy_j * ratio)
    return None if account.rival is None else _shares(account, method, rival=True)


def _energy(data: RunData, parts: list[InstanceEnergy], method: str, tallies: list[_Tally]) -> Energy:
    """The run's table and summary from its instances."""
    prefill_j, decode_j, shared_j, variance = (
        np.sum([getattr(p, name) for p in parts], axis=0) for name in ("prefill_j", "decode_j", "shared_j", "variance")
    )
    seen = np.any([tally.seen for tally in tallies], axis=0)[: data.requests.height]
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
    got_tokens = pl.col("first_token_s").is_not_null() | (pl.col("status") == "ok")
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
