"""What each request of a simulated run truly cost: the Shapley value of every step's energy among its requests.

A step's true energy is a function E of the work that is in it (`Hardware.step_j`), so a step is a cost-sharing game:
a coalition S of its requests would have cost E(S). A request's Shapley value is what it adds to the requests before
it, averaged over all orders of joining. What is there if anyone is, E at zero work, falls to all alike, exactly.

Nothing of this knows how `analysis` attributes; it is what attribution is measured against.
"""

from collections.abc import Iterator
from functools import cache
from math import factorial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.sim.hardware import FloatArray, Hardware, Work
from replay.tables import TRUTH
from tracegen.errors import RunError

IntArray = npt.NDArray[np.int64]

EXACT_REQUESTS = 8  # up to here all 2^n coalitions cost less than sampling 64 orders
_ROWS_AT_ONCE = 1_000_000  # expanded (step, request) rows in memory
_VALUES_AT_ONCE = 200_000  # coalitions evaluated at once; arrays of this size stay in the cache


class Lock(NamedTuple):
    """What beside its work sets a step's energy, [steps] each."""

    clock_mhz: FloatArray
    hot: FloatArray  # what leakage multiplies its power with


def shapley_truth(
    steps: pl.DataFrame, segments: pl.DataFrame, hardware: Hardware, *, orders: int = 64, seed: int = 0
) -> pl.DataFrame:
    """The energy of each request, J, by the kind of its work: a frame of schema TRUTH, sorted by `request_id`.

    `steps` has STEPS, the clock that each step was locked to, `clock_mhz`, and what leakage multiplied its power with,
    `heat`; `segments` has SEGMENTS. Steps of up to
    `EXACT_REQUESTS` requests are exact; larger ones average `orders` orders, drawn in opposite pairs. In each step the
    shares add up to power x duration; requests without an id pay theirs and are left out of the result.
    Raises `RunError` when the two tables disagree on who was in a step.
    """
    rng = np.random.default_rng(seed)
    ids = segments["request_id"].unique().drop_nulls().sort()
    paid_j = np.zeros((2, ids.len() + 1))  # prefill, decode; the last column is for requests without an id
    for instance, of_instance in segments.group_by("instance", maintain_order=True):
        own = steps.filter(pl.col("instance") == instance[0]).sort("step")
        payer = of_instance["request_id"].replace_strict(ids, np.arange(ids.len()), default=ids.len()).to_numpy()
        decodes = (of_instance["kind"] == "decode").to_numpy().astype(np.int64)
        clock_mhz, hot = (own[name].to_numpy().astype(float) for name in ("clock_mhz", "heat"))
        for segment, step, work in _expand(own, of_instance):
            energy_j = _share(hardware, step, work, Lock(clock_mhz, hot), orders // 2, rng)
            np.add.at(paid_j, (decodes[segment], payer[segment]), energy_j)
    prefill_j, decode_j = paid_j[:, :-1]
    columns = {"request_id": ids, "energy_j": prefill_j + decode_j, "prefill_j": prefill_j, "decode_j": decode_j}
    return pl.DataFrame(columns, schema=TRUTH)


def _expand(steps: pl.DataFrame, segments: pl.DataFrame) -> Iterator[tuple[IntArray, IntArray, FloatArray]]:
    """Segments unrolled, some steps at a time: segment index [rows], step index [rows], `Work` fields [4, rows].

    Rows are sorted by step. Raises `RunError` when a step has not as many rows as `requests`.
    """
    number = steps["step"].to_numpy().astype(np.int64)
    requests = steps["requests"].to_numpy().astype(np.int64)
    first, last, tokens, context = (
        segments[name].to_numpy().astype(np.int64)
        for name in ("first_step", "last_step", "tokens_per_step", "context_start")
    )
    decodes = (segments["kind"] == "decode").to_numpy()
    begin, end = np.searchsorted(number, first), np.searchsorted(number, last, side="right")
    rows_before = np.concatenate(([0], np.cumsum(requests)))
    low = 0
    while low < number.size:
        high = max(low + 1, int(np.searchsorted(rows_before, rows_before[low] + _ROWS_AT_ONCE, side="right")) - 1)
        inside = np.flatnonzero((begin < high) & (end > low))
        start, count = np.maximum(begin[inside], low), np.minimum(end[inside], high) - np.maximum(begin[inside], low)
        segment = np.repeat(inside, count)
        step = np.repeat(start - (np.cumsum(count) - count), count) + np.arange(segment.size)
        by_step = np.argsort(step, kind="stable")
        segment, step = segment[by_step], step[by_step]
        found = np.bincount(step - low, minlength=high - low)
        if (wrong := np.flatnonzero(found != requests[low:high])).size:
            k = low + wrong[0]
            raise RunError(
                f"segments: step {number[k]} has {found[wrong[0]]} requests, the steps table says {requests[k]}; "
                "the tables are of different runs or one is incomplete"
            )
        had = context[segment] + (number[step] - first[segment]) * tokens[segment]
        n, is_decode = tokens[segment], decodes[segment]
        parts = (n * ~is_decode, n * is_decode, had * is_decode, n * ~is_decode * (had + n / 2))
        yield segment, step, np.stack(np.broadcast_arrays(*parts)).astype(float)
        low = high


def _share(
    hardware: Hardware, step: IntArray, work: FloatArray, lock: Lock, pairs: int, rng: np.random.Generator
) -> FloatArray:
    """Each row's share of its step's energy, J, [rows]; rows are sorted by `step`, `work` is [4, rows]."""
    _, first, size = np.unique(step, return_index=True, return_counts=True)
    share_j = np.empty(step.size)
    for n in np.unique(size).tolist():
        starts = first[size == n]
        exact = n <= EXACT_REQUESTS
        at_once = max(1, _VALUES_AT_ONCE // (2**n if exact else pairs * n))
        for some in np.split(starts, range(at_once, starts.size, at_once)):
            rows = some[:, None] + np.arange(n)
            of_step = work[:, rows], Lock(*(column[step[some]] for column in lock))
            share_j[rows] = _exact(hardware, *of_step) if exact else _sampled(hardware, *of_step, pairs, rng)
    return share_j


def _exact(hardware: Hardware, work: FloatArray, lock: Lock) -> FloatArray:
    """Shapley values, J, [steps, n], from the energy of all coalitions; `work` is [4, steps, n]."""
    members, weights = _coalitions(work.shape[-1])
    energy_j = hardware.step_j(Work(*(work @ members.T)), *(column[:, None] for column in lock))
    share_j: FloatArray = energy_j @ weights
    return share_j


@cache
def _coalitions(n: int) -> tuple[FloatArray, FloatArray]:
    """Who is in each coalition of `n`, [2^n, n], and the weights [2^n, n] that turn their worth into Shapley values.

    The weight of a coalition of s is (s - 1)! (n - s)! / n! for its members and -s! (n - s - 1)! / n! for the others.
    The empty coalition weighs nothing: what its energy, that of zero work, takes from those who join first, each gets
    back as the equal share.
    """
    members = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)
    size = members.sum(axis=1).astype(int)
    joined = np.array([factorial(max(s - 1, 0)) * factorial(n - s) for s in range(n + 1)]) / factorial(n)
    absent = np.array([factorial(s) * factorial(max(n - s - 1, 0)) for s in range(n + 1)]) / factorial(n)
    weights = np.where(members == 1, joined[size][:, None], -absent[size][:, None])
    weights[0] = 0.0
    return members, weights


def _sampled(hardware: Hardware, work: FloatArray, lock: Lock, pairs: int, rng: np.random.Generator) -> FloatArray:
    """Shapley values, J, [steps, n], estimated from `pairs` random orders and their reverses; `work` is [4, steps, n].

    Who comes early in one order comes late in its reverse, which cancels most of the sampling error.
    """
    n = work.shape[-1]
    order = np.argsort(rng.random((work.shape[1], pairs, n)), axis=-1)
    before = np.cumsum(np.take_along_axis(work[:, :, None, :], order[None], axis=-1), axis=-1)
    total = before[..., -1:]
    held = [column[:, None, None] for column in lock]
    zero_j = hardware.step_j(Work(*np.zeros_like(total)), *held)
    forward_j = np.diff(hardware.step_j(Work(*before), *held), prepend=zero_j, axis=-1)
    # In the reverse order a request joins those that follow it here; token counts subtract without rounding.
    after_j = hardware.step_j(Work(*(total - before)), *held)
    backward_j = np.diff(-after_j, prepend=-hardware.step_j(Work(*total), *held), axis=-1)
    place = np.argsort(order, axis=-1)
    mean_j = np.take_along_axis((forward_j + backward_j) / 2, place, axis=-1).mean(axis=1)
    share_j: FloatArray = mean_j + zero_j[:, 0] / n
    return share_j
