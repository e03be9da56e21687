"""What attribution knows of an engine instance up to the point where methods part: its model, and what steps cost.

A model is fitted once for a run (`fit_run`), on all of a short run and on stretches of a long one; `account` then goes
through slab by slab.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.blocks import Balance, Blocks, balance, expect, misfit
from analysis.capped import held_back
from analysis.counter import Survey
from analysis.fit import THIN_STEPS, Quality, fit_regimes, main_fit
from analysis.idle import Idle, idle_power
from analysis.load import Floats, GpuData, InstanceData, RunData
from analysis.members import Members, RowOf, read_members
from analysis.model import Model
from analysis.pricing import Parts, chunks_of, price_steps
from analysis.regimes import Regime, regime_changes, regime_of, regimes_of, with_enough
from analysis.sensors import with_estimated
from analysis.slabs import RunSlabs, Slab, read_clock
from analysis.steps import Segments, Steps
from analysis.timeline import NOTHING_KNOWN, GpuTimeline, Windows, read_timeline
from tracegen.errors import AnalysisError

EVERYTHING = 2**62  # steps in a slab that is the whole run


@dataclass(frozen=True)
class Fitted:
    """What is fitted on an instance; the models are None where it has no steps."""

    fits: tuple[Model, ...]  # of each regime; none where it has no steps
    rivals: tuple[Model, ...]  # the linear models, where these are not the models themselves
    model: Model | None  # of the regime with most steps
    changes_s: Floats  # when a regime gave way to the next
    regimes: tuple[Regime, ...]
    quality: Quality | None
    misfit_rel: float  # between blocks
    idle: tuple[Idle, ...]  # of each GPU, by the source that energy is counted by
    poll_s: float  # between readings
    lines: tuple[GpuTimeline, ...]  # of each GPU, as the model was fitted on it

    def idle_w(self, t_s: Floats, duration_s: float) -> Floats:
        """Idle power of the group."""
        return np.asarray(np.sum([idle.at(t_s, duration_s) for idle in self.idle], axis=0))


@dataclass(frozen=True)
class Account:
    """An instance in a slab, accounted for."""

    slab: Slab
    fitted: Fitted
    idle_w: Floats  # (n,) of the whole group, by step
    parts: Parts
    rival: Parts | None
    balance: Balance
    timelines: tuple[GpuTimeline, ...]

    @property
    def instance(self) -> InstanceData:
        """Which instance."""
        return self.slab.instance

    @property
    def steps(self) -> Steps:
        """Its steps."""
        return self.slab.steps

    @property
    def segments(self) -> Segments:
        """Who was in them."""
        return self.slab.segments

    @property
    def blocks(self) -> Blocks:
        """Where they are made to agree with the meters."""
        return self.slab.blocks

    @property
    def model(self) -> Model | None:
        """The step model."""
        return self.fitted.model


def slabs_of(data: RunData, **options: int) -> tuple[RunSlabs, list[str]]:
    """The slabs of a run, and what is to be said of its segments."""
    members: dict[int, Members] = {}
    remarks: list[str] = []
    if any(instance.recorded for instance in data.instances):
        members, remarks = read_members(data.run, RowOf(data.ids))
    return RunSlabs(data, members, **options), remarks


def accounts(data: RunData) -> list[Account]:
    """Each instance over the whole run at once. Raises as `analysis.energy.attribute` does."""
    slabs, _ = slabs_of(data, at_once=EVERYTHING)
    (whole,) = slabs
    fitted = fit_run(data, [whole])
    return [account(data, slab, fit, timelines_of(data, slab)) for slab, fit in zip(whole, fitted, strict=True)]


def fit_run(data: RunData, stretches: Sequence[Sequence[Slab]]) -> list[Fitted]:
    """What is fitted on each instance of a run; `stretches` in order of time, of each its slabs by instance."""
    return [_fit(data, list(slabs)) for slabs in zip(*stretches, strict=True)]


def _fit(data: RunData, slabs: list[Slab]) -> Fitted:
    """The model of the instance of `slabs`."""
    lines = [timelines_of(data, slab) for slab in slabs]
    steps = _joined([slab.steps for slab in slabs])
    gpus = range(len(slabs[0].gpus))
    changes = with_enough(_changes(data, slabs), steps.end_s, THIN_STEPS)
    first = slabs[0].steps
    estimated = tuple(with_estimated(g, line, first) for g, line in zip(slabs[0].gpus, lines[0], strict=True))
    idle = tuple(_idle(data, slabs, lines, gpu, lines[0][gpu].curve.source, steps, changes) for gpu in gpus)
    polls = [float(np.median(np.diff(g.t_s))) if g.t_s.size > 1 else 0.0 for g in slabs[0].gpus]
    unfitted = Fitted((), (), None, changes, (), None, 0.0, idle, max(polls), estimated)
    if not len(steps):
        return unfitted
    windows = []
    for gpu in gpus:
        shown = _windows([estimated[gpu].windows, *(line[gpu].windows for line in lines[1:])], slabs)
        rest = _idle(data, slabs, lines, gpu, shown.source, steps, changes)
        windows.append((shown, rest.at(shown.end_s, data.duration_s)))
    fits = fit_regimes(steps, windows, changes, holding=held_back([gpu for slab in slabs for gpu in slab.gpus], steps))
    model, quality = main_fit(fits)
    straight = () if model.linear else fit_regimes(steps, windows, changes, linear=True)
    fitted = replace(
        unfitted,
        fits=tuple(fit for fit, _ in fits),
        rivals=tuple(fit for fit, _ in straight),
        model=model,
        quality=quality,
        regimes=regimes_of(slabs[0].gpus, changes, data.duration_s),
    )
    return replace(fitted, misfit_rel=_misfit(data, slabs, lines, fitted))


def _misfit(data: RunData, slabs: list[Slab], lines: list[list[GpuTimeline]], fitted: Fitted) -> float:
    """How far the model is off between blocks."""
    measured, modelled = [], []
    for slab, line in zip(slabs, lines, strict=True):
        parts, _ = _priced(data, slab, fitted, fitted.fits)
        expected = expect(slab.blocks, slab.steps, parts.total, lambda t: fitted.idle_w(t, data.duration_s))
        measured.append(_measured(slab, line) - expected.idle_j)
        modelled.append(expected.busy_j)
    return misfit(np.concatenate(measured), np.concatenate(modelled))


def account(data: RunData, slab: Slab, fitted: Fitted, lines: Sequence[GpuTimeline]) -> Account:
    """Price the steps of `slab` and make them agree with the meters, `lines` of its GPUs."""
    parts, idle_w = _priced(data, slab, fitted, fitted.fits)
    rival = _priced(data, slab, fitted, fitted.rivals)[0] if fitted.rivals else None
    expected = expect(slab.blocks, slab.steps, parts.total, lambda t: fitted.idle_w(t, data.duration_s))
    idle_se_w = float(np.sum([idle.se_w for idle in fitted.idle]))
    settled = balance(slab.blocks, expected, parts.total, _measured(slab, lines), idle_se_w, fitted.misfit_rel)
    return Account(slab, fitted, idle_w, parts, rival, settled, tuple(lines))


def timelines_of(data: RunData, slab: Slab, known: Sequence[Survey] = ()) -> list[GpuTimeline]:
    """What the sensors of the GPUs of `slab` say; `known` of each from the slabs before."""
    before = known or [NOTHING_KNOWN] * len(slab.gpus)
    return [timeline_of(data, gpu, slab, survey) for gpu, survey in zip(slab.gpus, before, strict=True)]


def timeline_of(data: RunData, gpu: GpuData, slab: Slab, known: Survey = NOTHING_KNOWN) -> GpuTimeline:
    """What the sensors of `gpu` say in `slab`. Raises `AnalysisError` where they say nothing."""
    # The unused GPUs of a node do not stand in for one another.
    peers = [] if slab.instance.instance is None else [other for other in slab.gpus if other is not gpu]
    line = read_timeline(gpu, slab.until_s, slab.begin_s, known=known, peers=peers)
    if isinstance(line, str):
        raise AnalysisError(f"{data.run.path / 'power.parquet'}: {line}")
    return line


def _measured(slab: Slab, lines: Sequence[GpuTimeline]) -> Floats:
    """Joules of the group in each block."""
    return np.asarray(np.sum([np.diff(line.curve.at(slab.blocks.cuts_s)) for line in lines], axis=0))


def _priced(data: RunData, slab: Slab, fitted: Fitted, fits: Sequence[Model]) -> tuple[Parts, Floats]:
    """The energy of each step of `slab` in its parts, as far as it is inside the window, and idle power."""
    steps = slab.steps
    idle_w = fitted.idle_w(steps.end_s, data.duration_s)
    if not fits:
        return Parts(np.zeros(0), np.zeros(0), np.zeros((0, 4))), idle_w
    chunks = chunks_of(steps, slab.segments) if steps.timed else None
    parts = _by_regime([price_steps(fit, steps, idle_w, chunks) for fit in fits], steps, fitted.changes_s)
    if not len(steps) or (steps.start_s[0] >= 0 and steps.end_s[-1] <= data.duration_s):
        return parts, idle_w
    inside_s = np.clip(steps.end_s, 0, data.duration_s) - np.clip(steps.start_s, 0, data.duration_s)
    span_s = steps.end_s - steps.start_s
    cut = np.flatnonzero(inside_s < span_s)
    part = inside_s[cut] / span_s[cut]
    parts.total[cut] *= part  # in place: these arrays are new
    parts.shared[cut] *= part
    parts.price[cut] *= part[:, None]
    if parts.chunks is not None and parts.chunk_j is not None:
        whole = np.ones(len(steps))
        whole[cut] = part
        parts.chunk_j[:] *= parts.chunks.of_steps(whole)
    return parts, idle_w


def _by_regime(priced: list[Parts], steps: Steps, changes: Floats) -> Parts:
    """What each step is made of by the model of its own regime."""
    if len(priced) == 1:
        return priced[0]
    rows, regime = np.arange(len(steps)), regime_of(steps.end_s, changes)

    def chosen(values: Sequence[Floats]) -> Floats:
        return np.asarray(np.stack(values)[regime, rows])

    chunks = next((p.chunks for p in priced if p.chunks is not None), None)
    chunk_j = None
    if chunks is not None:
        nought = np.zeros(chunks.tokens.size)
        by_regime = np.stack([nought if p.chunk_j is None else p.chunk_j for p in priced])
        chunk_j = by_regime[np.repeat(regime, np.diff(chunks.first)), np.arange(nought.size)]
    return Parts(
        total=chosen([p.total for p in priced]),
        shared=chosen([p.shared for p in priced]),
        price=chosen([p.price for p in priced]),
        chunk_j=chunk_j,
        chunks=chunks,
    )


def _changes(data: RunData, slabs: list[Slab]) -> Floats:
    """When the clock of the GPUs of `slabs` changed for long."""
    gpus = slabs[0].gpus if len(slabs) == 1 else [read_clock(data, gpu) for gpu in slabs[0].gpus]
    return regime_changes(gpus, 0.0, data.duration_s)


def _idle(
    data: RunData,
    slabs: list[Slab],
    lines: list[list[GpuTimeline]],
    gpu: int,
    source: str,
    steps: Steps,
    changes: Floats,
) -> Idle:
    """Idle power of one GPU as `source` reads it."""
    first = slabs[0]
    curve = lines[0][gpu].curve
    until_s = data.duration_s if len(slabs) == 1 else first.until_s
    mine = steps if len(slabs) == 1 else first.steps
    where = str(data.run.path)
    return idle_power(first.gpus[gpu], source, curve, [mine], until_s, where, changes_s=changes.tolist())


def _windows(parts: list[Windows], slabs: list[Slab]) -> Windows:
    """A sensor's windows in all stretches; of several, those that lie inside one."""
    if len(parts) == 1:
        return parts[0]
    rows = [(w.start_s >= s.begin_s) & (w.end_s <= s.until_s) for w, s in zip(parts, slabs, strict=True)]
    arrays = (
        np.concatenate([getattr(w, name)[r] for w, r in zip(parts, rows, strict=True)])
        for name in ("start_s", "end_s", "watts")
    )
    return Windows(parts[0].source, *arrays)


def _joined(parts: list[Steps]) -> Steps:
    """The steps of several stretches as one."""
    if len(parts) == 1:
        return parts[0]
    arrays = {n: np.concatenate([getattr(p, n) for p in parts]) for n in Steps.__dataclass_fields__ if n != "timed"}
    return Steps(**arrays, timed=any(part.timed for part in parts))
