"""One instance's energy by request, summed up slab by slab.

`Tally.bill` works a slab out and may run beside others; `Tally.add` puts bills together in their order, so that a sum
is the same to the last bit however many threads worked on it. Sums are kept for the instance's own requests alone.
"""

from dataclasses import dataclass, replace

import numpy as np

from analysis.accounts import Account, Fitted
from analysis.kernels import add_by_request
from analysis.load import Floats, InstanceData, RunData
from analysis.meters import Meters
from analysis.model import TINY
from analysis.regimes import regime_of
from analysis.split import DEFAULT_METHOD, MARGINAL, METHODS, Shares, share, share_marginal
from analysis.steps import PREFILL, Bools, Ints
from analysis.summary import CLIENT, RECORDS, InstanceEnergy
from analysis.uncertainty import shapley_variance


@dataclass(frozen=True)
class Bill:
    """What a slab comes to; arrays by segment."""

    steps: int
    place: Ints  # of the segment's request in the sums, -1 for one that is not ours
    prefill: Bools
    costly: Bools  # whether some of its steps cost something
    shares: Shares | None  # None without steps
    other_answer: Shares | None  # None: there is none
    measured_j: float
    idle_j: float


@dataclass(frozen=True)
class RequestSums:
    """What the requests of an instance come to; arrays by `rows`, these requests' rows in the run."""

    rows: Ints
    prefill_j: Floats
    decode_j: Floats
    shared_j: Floats
    variance: Floats  # of their energy, J²
    seen: Bools  # whether some of its steps cost something


class Tally:
    """One instance's energy by request, by one method."""

    def __init__(self, data: RunData, instance: InstanceData, fitted: Fitted, method: str, rows: Ints) -> None:
        """`rows`: of the run's requests those that may be in the instance's steps, ascending."""
        self._instance, self._fitted, self._method = instance, fitted, method
        self._rows, self._listed = rows, int(np.searchsorted(rows, data.requests.height))
        early = 0 if data.early is None else data.early.height  # they come first behind the listed
        self._warmed = int(np.searchsorted(rows, data.requests.height + early))
        self._place = np.full(len(data.ids) + 1, -1, dtype=np.int32)  # the last is for those that are not ours
        self._place[rows] = np.arange(rows.size, dtype=np.int32)
        names = ("prefill", "decode", "shared", "steps", "time", "other_answer", "equal")
        self._sums = {name: np.zeros(rows.size) for name in names}
        self._seen = np.zeros(rows.size, dtype=bool)
        self._steps, self._foreign_j, self._idle_j, self._measured_j = 0, 0.0, 0.0, 0.0

    def bill(self, account: Account) -> Bill:
        """What a slab comes to."""
        segments, balance = account.segments, account.balance
        place, prefill = self._place[segments.request].astype(np.int64), segments.kind == PREFILL
        sums_j = float(balance.measured_j.sum()), float(balance.idle_j.sum())
        if not len(account.steps):
            return Bill(0, place, prefill, prefill, None, None, *sums_j)
        shares = _shares(account, self._method)
        other = _other_answer(account, self._method, shares, recorded=self._instance.recorded)
        before = np.concatenate([[0], np.cumsum(balance.step_j > 0)])
        costly = before[segments.last + 1] > before[segments.first]
        return Bill(len(account.steps), place, prefill, costly, shares, other, *sums_j)

    def add(self, bill: Bill) -> None:
        """Add a slab's."""
        self._measured_j += bill.measured_j
        self._idle_j += bill.idle_j
        shares = bill.shares
        if shares is None:
            return
        self._steps += bill.steps
        ours = bill.place >= 0
        for name, rows, values in (
            ("prefill", ours & bill.prefill, shares.energy_j),
            ("decode", ours & ~bill.prefill, shares.energy_j),
            ("shared", ours, shares.shared_j),
            ("steps", ours, shares.steps),
            ("time", ours, shares.time_s),
            ("other_answer", ours, (bill.other_answer or shares).energy_j),
            ("equal", ours, shares.equal_j),
        ):
            if values is not None:
                add_by_request(bill.place, rows, values, self._sums[name])
        self._foreign_j += float(shares.energy_j[~ours].sum()) + shares.unlisted_j
        self._seen[bill.place[ours & bill.costly]] = True

    def requests(self) -> RequestSums:
        """What it came to by request."""
        here, sums = slice(0, self._listed), self._sums
        variance = self._variance(sums["prefill"] + sums["decode"])
        return RequestSums(
            rows=self._rows[here],
            prefill_j=sums["prefill"][here],
            decode_j=sums["decode"][here],
            shared_j=sums["shared"][here],
            variance=variance[here],
            seen=self._seen[here],
        )

    def total(self, meters: Meters) -> InstanceEnergy:
        """What it came to as a whole."""
        lost = slice(self._listed, None)
        energy_j = self._sums["prefill"] + self._sums["decode"]
        lost_j = float(energy_j[lost].sum())
        return InstanceEnergy(
            instance=self._instance.instance,
            membership=(RECORDS if self._instance.recorded else CLIENT) if self._steps else None,
            measured_j=self._measured_j,
            idle_j=self._idle_j,
            other_j=self._foreign_j + lost_j,
            unrecorded_j=lost_j,
            warmup_j=float(energy_j[self._listed : self._warmed].sum()),
            unrecorded=int(self._seen[lost].sum()),
            quality=self._fitted.quality,
            misfit_rel=self._fitted.misfit_rel,
            idle=self._fitted.idle,
            regimes=self._fitted.regimes,
            timelines=meters.facts(self._fitted),
        )

    def _variance(self, energy_j: Floats) -> Floats:
        """Variance of each request's energy, J²: by `uncertainty` where a model and its rival had their say.

        Else as far as the residuals tell it, `energy_j²·(m² + (d² + w²)/n + (t/T)²) + Δ²`: m the model's misfit between
        blocks, which does not average out in a request; d and w the relative residuals of step durations and sensor
        windows, over the request's n steps; t the dating error (a poll's, and the clock offset's bound) over its T
        seconds; Δ what another answer to the same question differs by (`_other_answer`).
        """
        quality, sums, clock_s = self._fitted.quality, self._sums, self._instance.clock_error_s
        time_s = np.maximum(sums["time"], 1e-3)
        if quality is None:
            return np.asarray((energy_j - sums["other_answer"]) ** 2)
        duration_rel, power_rel = quality.duration_rel_rms or 0.0, quality.power_rel_rms or 0.0
        if self._instance.recorded and self._fitted.rivals and self._method == DEFAULT_METHOD:
            mean_rel = power_rel / np.sqrt(max(quality.independent, 1.0))
            other = sums["other_answer"], sums["equal"]
            return shapley_variance(energy_j, *other, duration_rel, mean_rel, clock_s / time_s)
        noise = duration_rel**2 + power_rel**2
        dating_s2 = self._fitted.poll_s**2 / 12 + clock_s**2
        own = self._fitted.misfit_rel**2 + noise / np.maximum(sums["steps"], 1) + dating_s2 / time_s**2
        return np.asarray(energy_j**2 * own + (energy_j - sums["other_answer"]) ** 2)


def _shares(account: Account, method: str, *, rival: bool = False) -> Shares:
    """What each segment pays, by `method` and the instance's model or its rival."""
    steps, step_j, fitted = account.steps, account.balance.step_j, account.fitted
    alone = rival and account.rival is not None
    fits, parts = (fitted.rivals if alone else fitted.fits), (account.rival if alone else account.parts)
    assert parts is not None
    if method == MARGINAL and fits:
        regime = regime_of(steps.end_s, fitted.changes_s)
        by_regime = [
            share_marginal(fit, steps, account.segments, account.idle_w, np.where(regime == r, step_j, 0.0))
            for r, fit in enumerate(fits)
        ]
        summed = {name: np.sum([getattr(s, name) for s in by_regime], axis=0) for name in ("energy_j", "unlisted_j")}
        return replace(by_regime[0], energy_j=summed["energy_j"], unlisted_j=float(summed["unlisted_j"]))
    priced = METHODS.get(method, METHODS[DEFAULT_METHOD])(parts, steps)
    return share(priced, steps, account.segments, account.blocks, step_j)


def _other_answer(account: Account, method: str, own: Shares, *, recorded: bool) -> Shares | None:
    """A second opinion whose difference counts as error: the linear model's answer, or an equal split.

    The equal split stands against membership by client timestamps, where who did what is a guess; `marginal` is as far
    off there, in proportion. Methods without a model have no second opinion: what they say is their definition.
    """
    if method not in {DEFAULT_METHOD, MARGINAL}:
        return None
    if recorded:
        return None if account.rival is None else _shares(account, method, rival=True)
    priced = own if method == DEFAULT_METHOD else _shares(account, DEFAULT_METHOD)
    assert priced.equal_j is not None
    some = priced.energy_j > TINY
    ratio = np.divide(priced.equal_j, priced.energy_j, out=np.ones_like(own.energy_j), where=some)
    return replace(own, energy_j=own.energy_j * ratio)
