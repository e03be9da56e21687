"""What requests add to what the meter shows, predicted by the model that was fitted on a run.

A request's share answers "who pays for what was measured"; this answers "what would have been measured without them"
(`added_energy`) and "what would be measured if they ran in another run" (`predict_requests`). Both can be checked with
the meter that is there.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.accounts import Account, accounts
from analysis.load import Floats, RunData, load_run
from analysis.model import TINY, Model, pace_of
from analysis.regimes import regime_of
from analysis.steps import (
    CONTEXT_TOKENS,
    DECODE_TOKENS,
    PREFILL,
    PREFILL_ATTENTION,
    PREFILL_TOKENS,
    Bools,
    Ints,
    sum_segments,
    take,
)
from replay.rundir import Run
from tracegen.errors import AnalysisError

MARGIN_S = 0.5  # around a lone request, for the sensors to show all of it
QUEUED_REL = 0.05  # of the steps, in which requests may have been left waiting


@dataclass(frozen=True)
class Added:
    """What a set of requests added to a run, J, of the whole group.

    `steps_j` keeps the run's steps as they were: Σ over steps of E(x) - E(x without the set), the whole step where
    nobody else was in it. `freed_j` is what idle power draws in the seconds that this frees, so `steps_j - freed_j` is
    what the meter would show less in the same window, if the engine rested in them. A busy engine does not rest: it
    goes on with smaller steps, and does more of them. `meter_j`, the prediction of what the meter shows less, takes
    that into account: the requests are played again, with and without the set, on an engine that takes the model's
    durations. It is None, and `why` says why, where requests queued: the set then delayed others, by rules not known.
    """

    requests: int
    steps_j: float
    freed_j: float
    freed_s: float
    meter_j: float | None
    why: str | None
    played_rel: float | None  # energy above idle of the played steps over that of the recorded ones, minus 1


def added_energy(run: Run, request_ids: Collection[int]) -> Added:
    """Predict what the requests `request_ids` of `run` together added to its energy.

    All at once, since what single requests add (method `marginal`) does not add up. Requests that are not ours stay
    in the recorded steps and are left out of the played ones. Takes time proportional to steps, played one by one.
    Raises `AnalysisError` for a run without step records and where none of the requests was in a step.
    """
    data = load_run(run)
    wanted = np.flatnonzero(data.ids.is_in(list(request_ids)).to_numpy())
    result = [_added(data, account, wanted) for account in _with_steps(data)]
    found = sum(part.requests for part in result)
    if not found:
        raise AnalysisError(f"{run.path}: none of the {len(request_ids)} requests was in an engine step")
    known = [part.meter_j for part in result if part.meter_j is not None]
    off = [part.played_rel for part in result if part.played_rel is not None]
    return Added(
        requests=found,
        steps_j=sum(part.steps_j for part in result),
        freed_j=sum(part.freed_j for part in result),
        freed_s=sum(part.freed_s for part in result),
        meter_j=sum(known) if len(known) == len(result) else None,
        why=next((part.why for part in result if part.why), None),
        played_rel=max(off, key=abs) if off else None,
    )


def predict_requests(fitted: Run, run: Run) -> pl.DataFrame:
    """What the model of `fitted` says that each request of `run` costs, beside what the meter says, where it ran alone.

    One row a request that was alone in each of its steps: `request_id`, `input_tokens`, `output_tokens`, `steps`,
    `seconds` from its first step to its last, `predicted_s`, `measured_j` between these by the energy curve,
    `measured_wide_j` with half a second on either side less idle power there (which a meter that lags does not miss),
    `predicted_j` at the run's own idle power. Durations are the model's too, pauses included as in `fitted`; of a run
    whose clock changed the model is that of the clock with most steps.

    Raises `AnalysisError` where either run has no step records, or their TP or clock differ.
    """
    a, b = load_run(fitted), load_run(run)
    _same_settings(fitted, run)
    model_of = _with_steps(a)[0]
    assert model_of.model is not None
    pace = _usual_paces(model_of)[next(r for r, fit in enumerate(model_of.fitted.fits) if fit is model_of.model)]
    counted = run.scan("requests", ["request_id", "input_tokens", "output_tokens"]).collect()
    frames: list[pl.DataFrame] = []
    for account in _with_steps(b):
        steps = account.steps
        predicted = _predicted_s(model_of.model, steps.work)
        energy_j = model_of.model.energy_j(steps.work, account.idle_w, np.full(len(steps), pace))
        request, first, last = _spans(account, b.requests.height)
        shared = np.concatenate([[0], np.cumsum(steps.requests > 1)])
        alone = shared[last + 1] == shared[first]
        request, first, last = request[alone], first[alone], last[alone]
        sums_j, sums_s = (np.concatenate([[0.0], np.cumsum(v)]) for v in (energy_j, predicted * pace))
        start_s, end_s = steps.start_s[first], steps.end_s[last]
        wide_j = _measured(account, start_s - MARGIN_S, end_s + MARGIN_S) - 2 * MARGIN_S * account.idle_w[last]
        frames.append(
            b.requests[request]
            .select("request_id")
            .join(counted, on="request_id", how="left", maintain_order="left")
            .with_columns(
                steps=pl.Series(last - first + 1, dtype=pl.Int64),
                seconds=pl.Series(end_s - start_s),
                predicted_s=pl.Series(sums_s[last + 1] - sums_s[first]),
                measured_j=pl.Series(_measured(account, start_s, end_s)),
                measured_wide_j=pl.Series(wide_j),
                predicted_j=pl.Series(sums_j[last + 1] - sums_j[first]),
            )
        )
    return pl.concat(frames)


def _with_steps(data: RunData) -> list[Account]:
    """The accounts of the instances that recorded steps. Raises `AnalysisError` where there are none."""
    known = [a for a in accounts(data) if a.model is not None and a.instance.recorded]
    if not known:
        raise AnalysisError(f"{data.run.path}: has no step records, so nothing can be predicted from it")
    return known


def _same_settings(a: Run, b: Run) -> None:
    """Raise `AnalysisError` where a model of one run says nothing about the other."""
    for key, name in (("tp", "TP"), ("freq_mhz", "clock"), ("model", "model")):
        one, two = a.manifest["instances"][0].get(key), b.manifest["instances"][0].get(key)
        if one != two:
            raise AnalysisError(f"{b.path}: {name} {two} differs from {one} of {a.path}; predict from a run like it")


def _usual_paces(account: Account) -> list[float]:
    """Durations of the run's steps, pauses included, over the model's, in each regime; warm-up not counted."""
    steps, inside = account.steps, account.balance.step_j > 0
    regime, span_s = regime_of(steps.end_s, account.fitted.changes_s), steps.end_s - steps.start_s
    paces = []
    for r, fit in enumerate(account.fitted.fits):
        mine = inside & (regime == r)
        modelled_s = float(_predicted_s(fit, steps.work[mine]).sum())
        paces.append(float(span_s[mine].sum()) / modelled_s if modelled_s > 0 else 1.0)
    return paces


def _predicted_s(model: Model, work: Floats) -> Floats:
    """Durations of steps with `work`, by the model of an instance that recorded its steps."""
    predicted = model.predict_s(work)
    assert predicted is not None
    return predicted


def _by_regime(account: Account, ask: Callable[[Model], Floats]) -> Floats:
    """For each step what the model of its own regime answers, (n,)."""
    regime = regime_of(account.steps.end_s, account.fitted.changes_s)
    answers = np.stack([ask(fit) for fit in account.fitted.fits])
    return np.asarray(answers[regime, np.arange(regime.size)])


def _measured(account: Account, start_s: Floats, end_s: Floats) -> Floats:
    """Joules between times, by the energy curves of the group."""
    return np.asarray(np.sum([t.curve.at(end_s) - t.curve.at(start_s) for t in account.timelines], axis=0))


def _spans(account: Account, requests: int) -> tuple[Ints, Ints, Ints]:
    """Requests of the run that were in steps, with the first and the last of these."""
    segments = account.segments
    ours = (segments.request >= 0) & (segments.request < requests)
    request = np.unique(segments.request[ours])
    first = np.full(requests, np.iinfo(np.int64).max)
    last = np.full(requests, -1)
    np.minimum.at(first, segments.request[ours], segments.first[ours])
    np.maximum.at(last, segments.request[ours], segments.last[ours])
    return request, first[request], last[request]


def _added(data: RunData, account: Account, wanted: Ints) -> Added:
    """`added_energy` for one instance; `wanted` are rows of the run's requests."""
    steps, segments, idle_w = account.steps, account.segments, account.idle_w
    chosen = np.isin(segments.request, wanted)
    mine = take(segments, chosen)
    _, work = sum_segments(mine, steps.g, steps.q)
    count, _ = sum_segments(mine, np.ones(len(steps)), steps.q)
    rest = np.maximum(steps.work - work, 0.0)
    others = steps.requests - count > 0.5
    pace = _by_regime(account, lambda fit: pace_of(fit, steps))
    whole_j = _by_regime(account, lambda fit: fit.energy_j(steps.work, idle_w, pace))
    rest_j = np.where(others, _by_regime(account, lambda fit: fit.energy_j(rest, idle_w, pace)), 0.0)
    # As metered: the model's proportions, at the level of the block.
    level = np.divide(account.balance.step_j, whole_j, out=np.zeros_like(whole_j), where=whole_j > TINY)
    before_s = _by_regime(account, lambda fit: _predicted_s(fit, steps.work))
    after_s = _by_regime(account, lambda fit: _predicted_s(fit, rest))
    inside = account.balance.step_j > 0
    freed_s = pace * inside * np.where(others, before_s - after_s, before_s)
    meter_j, played_rel = None, None
    why = _queued(data, account)
    if why is None:
        tasks = _tasks(account)
        all_j = _play_above_idle(account, tasks)
        without_j = _play_above_idle(account, _keep(tasks, ~np.isin(tasks.request, wanted)))
        meter_j = (all_j - without_j) * float(account.balance.step_j.sum() / max(account.parts.total.sum(), TINY))
        recorded_j = float((whole_j - idle_w * (steps.end_s - steps.start_s))[inside].sum())
        played_rel = all_j / recorded_j - 1 if recorded_j > 0 else None
    return Added(
        requests=int(np.unique(mine.request).size),
        steps_j=float(((whole_j - rest_j) * level).sum()),
        freed_j=float((freed_s * idle_w).sum()),
        freed_s=float(freed_s.sum()),
        meter_j=meter_j,
        why=why,
        played_rel=played_rel,
    )


def _queued(data: RunData, account: Account) -> str | None:
    """Why what the engine would have done otherwise cannot be told; None where it can."""
    table = data.run.scan("steps", ["instance", "end_ns", "waiting"])
    begin_ns = data.window_ns[0] + account.instance.offset_ns
    mine = (pl.col("instance") == account.instance.instance) & (pl.col("end_ns") > begin_ns)
    queued = float(table.filter(mine).select((pl.col("waiting").fill_null(0) > 0).mean()).collect().item() or 0.0)
    if queued <= QUEUED_REL:
        return None
    return f"requests were left waiting in {100 * queued:.0f} % of the engine's steps: it was saturated"


@dataclass(frozen=True)
class _Tasks:
    """What each request asks of an engine; arrays of one length, in order of arrival."""

    request: Ints
    arrival_s: Floats
    cached: Ints  # context there before its prefill
    prompt: Ints  # tokens to prefill
    decodes: Ints  # steps after that


def _keep(tasks: _Tasks, rows: Bools | Ints) -> _Tasks:
    return _Tasks(*(getattr(tasks, name)[rows] for name in _Tasks.__dataclass_fields__))


def _tasks(account: Account) -> _Tasks:
    """What the requests of an instance did, from their segments; they arrive with their first step."""
    segments = take(account.segments, account.segments.request >= 0)
    request, row = np.unique(segments.request, return_inverse=True)
    count = segments.last - segments.first + 1
    prefill = segments.kind == PREFILL

    def summed(values: Floats | Ints, rows: Bools) -> Ints:
        return np.bincount(row[rows], weights=values[rows], minlength=request.size).astype(np.int64)

    first = np.full(request.size, np.iinfo(np.int64).max)
    np.minimum.at(first, row, segments.first)
    begins = segments.first == first[row]
    before = segments.context - np.where(prefill, segments.tokens / 2, 0.0)
    arrival_s = account.steps.start_s[first]
    order = np.argsort(arrival_s, kind="stable")
    tasks = _Tasks(
        request=request,
        arrival_s=arrival_s,
        cached=summed(before, begins),
        prompt=summed(segments.tokens * count, prefill),
        decodes=summed(count, ~prefill),
    )
    return _keep(tasks, order)


def _play_above_idle(account: Account, tasks: _Tasks) -> float:
    """Energy above idle, J, of `tasks` on an engine that takes the durations of the models, each in its time."""
    fits, paces, changes_s = account.fitted.fits, _usual_paces(account), account.fitted.changes_s
    budget = int(account.steps.work[:, [PREFILL_TOKENS, DECODE_TOKENS]].sum(axis=1).max())

    def span_s(work: Floats, at_s: float) -> float:
        r = bisect_right(changes_s, at_s)
        return paces[r] * float(_predicted_s(fits[r], work[None, :])[0])

    work, start_s = play(tasks, budget, span_s)
    regime = regime_of(start_s, changes_s)
    above_j = 0.0
    for r, (fit, pace) in enumerate(zip(fits, paces, strict=True)):
        mine = work[regime == r]
        above_j += float(fit.energy_j(mine, np.zeros(len(mine)), np.full(len(mine), pace)).sum())
    return above_j


def play(tasks: _Tasks, budget: int, span_s: Callable[[Floats, float], float]) -> tuple[Floats, Floats]:
    """The steps' work (n, 4) and start (n,) of continuous batching.

    Decodes come first, then prompts in order of arrival up to `budget` tokens. `span_s` tells how long a step of some
    work lasts that starts at a time. There is no cap on running requests or on KV blocks.
    """
    steps: list[Floats] = []
    start_s: list[float] = []
    prompt, decodes, arrival_s = tasks.prompt.copy(), tasks.decodes.copy(), tasks.arrival_s
    context = tasks.cached.copy()
    alive: list[int] = []
    time_s, coming = 0.0, 0
    while alive or coming < arrival_s.size:
        if not alive:
            time_s = max(time_s, float(arrival_s[coming]))
        while coming < arrival_s.size and arrival_s[coming] <= time_s + TINY:
            alive.append(coming)
            coming += 1
        work, left = np.zeros(4), budget
        for i in sorted(alive, key=lambda i: prompt[i] > 0):  # stable: prompts stay in order of arrival
            tokens = min(int(prompt[i]), left) if prompt[i] > 0 else 1
            if prompt[i] > 0:
                work[PREFILL_TOKENS] += tokens
                work[PREFILL_ATTENTION] += tokens * (context[i] + tokens / 2)
                prompt[i] -= tokens
            else:
                work[DECODE_TOKENS] += 1
                work[CONTEXT_TOKENS] += context[i]
                decodes[i] -= 1
            context[i] += tokens
            left -= tokens
        steps.append(work)
        start_s.append(time_s)
        time_s += span_s(work, time_s)
        alive = [i for i in alive if prompt[i] > 0 or decodes[i] > 0]
    return np.array(steps).reshape(-1, 4), np.array(start_s)
