"""The loops over steps and segments, compiled: what makes a hundred million steps a matter of seconds.

Numba compiles each on its first use on a machine and keeps the machine code beside this file; it looks at this file
alone to tell whether that is current, so all loops are here and call nothing from elsewhere. None holds the
interpreter's lock, so reading goes on beside them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Whole = NDArray[Any]  # of any width
Function = TypeVar("Function", bound=Callable[..., object])

FOREIGN = -1  # the row of a request that is not ours


def compiled(function: Function) -> Function:
    """Compile `function`."""
    dispatcher: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    called_alike: Function = dispatcher
    return called_alike


@compiled
def spans_of(request: Whole, first: Whole, last: Whole) -> tuple[Whole, Whole]:
    """First and last step of each request that has segments, in no order; each foreign segment stands alone."""
    most = -1
    for i in range(request.size):
        most = max(most, request[i])
    place = np.full(most + 1, -1, dtype=np.int32)
    begin, end = np.empty_like(first), np.empty_like(last)
    count = 0
    for i in range(request.size):
        row = request[i]
        if row >= 0 and place[row] >= 0:
            at = place[row]
            begin[at] = min(begin[at], first[i])
            end[at] = max(end[at], last[i])
            continue
        if row >= 0:
            place[row] = count
        begin[count], end[count] = first[i], last[i]
        count += 1
    return begin[:count].copy(), end[:count].copy()


@compiled
def first_overlap(request: Whole, first: Whole, last: Whole) -> int:
    """A row that puts a request into a step where another row has it already, else -1; `first` ascends."""
    most = -1
    for i in range(request.size):
        most = max(most, request[i])
    seen = np.full(most + 1, -1, dtype=np.int64)
    for i in range(request.size):
        row = request[i]
        if row >= 0:
            if first[i] <= seen[row]:
                return i
            seen[row] = last[i]
    return -1


@compiled
def occupied(here_from: Whole, here_to: Whole, low: int, steps: int) -> Bools:
    """Whether some request was in the engine between step `low + k - 1` and step `low + k`, (steps,).

    A request is there from its first step `here_from` to its last, `here_to`, waiting in between included.
    """
    change = np.zeros(steps + 1, dtype=np.int64)
    for i in range(here_from.size):
        begin, end = max(here_from[i] + 1 - low, 0), min(here_to[i] + 1 - low, steps)
        if begin < end:
            change[begin] += 1
            change[end] -= 1
    held = np.empty(steps, dtype=np.bool_)
    running = 0
    for k in range(steps):
        running += change[k]
        held[k] = running > 0
    return held


@compiled
def sum_pieces(
    first: Ints, last: Ints, prefill: Bools, tokens: Floats, base: Floats, slope: Floats, g: Floats, q: Floats
) -> tuple[Floats, Floats]:
    """Per step the number of pieces of segments in it (n,) and their work (n, 4).

    A piece does `tokens * g` tokens in each step from `first` to `last` and reads `(base + slope * q) * g` contexts,
    with `q` from the first of these steps on. Sums of integers and halves, exact for step records.
    """
    n = q.size
    change = np.zeros((n + 1, 7))
    for i in range(first.size):
        a, b = first[i], last[i] + 1
        column = 1 if prefill[i] else 4
        change[a, 0] += 1.0
        change[b, 0] -= 1.0
        change[a, column] += tokens[i]
        change[b, column] -= tokens[i]
        change[a, column + 1] += base[i]
        change[b, column + 1] -= base[i]
        change[a, column + 2] += slope[i]
        change[b, column + 2] -= slope[i]
    count, work = np.empty(n), np.empty((n, 4))
    running = np.zeros(7)
    for k in range(n):
        for j in range(7):
            running[j] += change[k, j]
        count[k] = running[0]
        work[k, 0] = max(running[1] * g[k], 0.0)
        work[k, 1] = max(running[4] * g[k], 0.0)
        work[k, 2] = max((running[5] + running[6] * q[k]) * g[k], 0.0)
        work[k, 3] = max((running[2] + running[3] * q[k]) * g[k], 0.0)
    return count, work


@compiled
def running_sums(
    shared: Floats, price: Floats, square: Floats, g: Floats, q: Floats, span_s: Floats, first: Ints
) -> Floats:
    """Running sums (n, 9) over steps that restart with every block (`first`: the first step of each, then n).

    Of what each request pays equally; the prices of a prefill token and of attention, the latter once more times q
    from the block's first step on; those of a decode token and of context, the latter times q likewise; the price of a
    chunk's squared tokens; the step's seconds.
    """
    sums = np.empty((shared.size, 9))
    running = np.empty(9)
    for block in range(first.size - 1):
        begin = first[block]
        running[:] = 0.0
        for k in range(begin, first[block + 1]):
            local = q[k] - q[begin]
            read, context = price[k, 3] * g[k], price[k, 2] * g[k]
            running[0] += shared[k]
            running[1] += price[k, 0] * g[k]
            running[2] += read
            running[3] += read * local
            running[4] += price[k, 1] * g[k]
            running[5] += context
            running[6] += context * local
            running[7] += square[k]
            running[8] += span_s[k]
            sums[k] = running
    return sums


@compiled
def pay(
    sums: Floats,
    block: Ints,
    block_first: Ints,
    q: Floats,
    first: Ints,
    last: Ints,
    prefill: Bools,
    tokens: Floats,
    reads: Floats,
    context: Floats,
    growth: Floats,
    q_start: Floats,
) -> tuple[Floats, Floats, Floats]:
    """What each segment pays, J, the equally shared part of it, J, and the seconds of its steps, by `running_sums`."""
    energy, equal, seconds = np.zeros(first.size), np.zeros(first.size), np.zeros(first.size)
    paid = np.empty(9)
    for i in range(first.size):
        k = first[i]
        column = 1 if prefill[i] else 4
        squared = tokens[i] ** 2 if prefill[i] else 0.0
        while k <= last[i]:
            origin = block_first[block[k]]
            stop = min(last[i], block_first[block[k] + 1] - 1)
            paid[:] = sums[stop]
            if k > origin:
                paid -= sums[k - 1]
            at_origin = context[i] + growth[i] * (q[origin] - q_start[i])
            read = max(at_origin * paid[column + 1] + growth[i] * paid[column + 2], 0.0)
            energy[i] += paid[0] + tokens[i] * paid[column] + reads[i] * read + squared * paid[7]
            equal[i] += paid[0]
            seconds[i] += paid[8]
            k = stop + 1
    return energy, equal, seconds


@compiled
def add_by_request(request: Whole, rows: Bools, values: Floats, total: Floats) -> None:
    """Add `values` of the segments `rows` to the `total` of their requests."""
    for i in range(request.size):
        if rows[i]:
            total[request[i]] += values[i]
