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
TINY = 1e-12


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
def in_order(
    step: Whole, start_ns: Whole, end_ns: Whole, last: int, most: int, back_ns: int, longest_ns: int, overlap_ns: int
) -> bool:
    """Whether steps come once each in ascending order after step `last`, up to `most`, at times that can be.

    None begins or ends earlier by `back_ns` than the one before, lasts longer than `longest_ns`, or begins by
    `overlap_ns` before the end of the one before the last.
    """
    for k in range(step.size):
        if step[k] <= last or step[k] > most or not 0 <= end_ns[k] - start_ns[k] <= longest_ns:
            return False
        if k > 0 and (start_ns[k] < start_ns[k - 1] - back_ns or end_ns[k] < end_ns[k - 1] - back_ns):
            return False
        if k > 1 and start_ns[k] < end_ns[k - 2] - overlap_ns:
            return False
        last = step[k]
    return True


@compiled
def step_times(
    start_ns: Whole,
    end_ns: Whole,
    zero_ns: int,
    held: Bools,
    waiting: Whole,
    before_s: float,
    before_waiting: bool,
    pause_s: float,
) -> tuple[Floats, Floats, Floats]:
    """Start, pause before it included, and end of each step, s from `zero_ns`, and how long it was recorded to take.

    `held`: whether the engine had a request since the step before; `waiting`: how many waited at each step;
    `before_s`: the end of the step before the first, -inf where there is none.
    """
    n = start_ns.size
    start_s, end_s, measured_s = np.empty(n), np.empty(n), np.empty(n)
    previous_s, waited = before_s, before_waiting
    for k in range(n):
        own_s = (start_ns[k] - zero_ns) / 1e9
        close = held[k] or waited or own_s - previous_s < pause_s
        start_s[k] = previous_s if close and previous_s > -np.inf else max(own_s, previous_s)
        previous_s = max(previous_s, (end_ns[k] - zero_ns) / 1e9)
        end_s[k] = previous_s
        measured_s[k] = (end_ns[k] - start_ns[k]) / 1e9
        waited = waiting[k] > 0
    return start_s, end_s, measured_s


@compiled
def work_of(
    prefill: Whole,
    decode: Whole,
    context: Whole,
    attention: Whole,
    requests: Whole,
    count: Floats,
    listed: Floats,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Requests in each step and its work (n, 4), at least as `count` and `listed` say; then what these do not list."""
    n = count.size
    inside, unlisted = np.empty(n), np.empty(n)
    work, unlisted_work = np.empty((n, 4)), np.zeros((n, 4))
    for k in range(n):
        inside[k] = max(count[k], requests[k], 1.0)
        unlisted[k] = inside[k] - count[k]
        work[k, 0] = max(float(prefill[k]), listed[k, 0])
        work[k, 1] = max(float(decode[k]), listed[k, 1])
        work[k, 2] = max(float(context[k]), listed[k, 2])
        # Half-chunks may have been rounded per request when the table was written: that is no unlisted work.
        rounded = abs(float(attention[k]) - listed[k, 3]) <= max(count[k], 1.0)
        work[k, 3] = listed[k, 3] if rounded else max(float(attention[k]), listed[k, 3])
        for j in range(4):
            unlisted_work[k, j] = work[k, j] - listed[k, j]
    return inside, work, unlisted, unlisted_work


@compiled
def sum_pieces(
    first: Ints, last: Ints, prefill: Bools, tokens: Floats, base: Floats, slope: Floats, g: Floats, q: Floats
) -> tuple[Floats, Floats]:
    """Per step the number of pieces of segments in it (n,) and their work (n, 4).

    A piece does `tokens * g` tokens in each step from `first` to `last` and reads `(base + slope * q) * g` contexts,
    with `q` from the first of these steps on. Sums of integers and halves, exact for step records.
    """
    n = q.size
    # Those that begin in each step, and end before it, in linked lists: most steps have none.
    begin, end = np.full(n + 1, -1, dtype=np.int32), np.full(n + 1, -1, dtype=np.int32)
    begin_next, end_next = np.empty(first.size, dtype=np.int32), np.empty(first.size, dtype=np.int32)
    for i in range(first.size):
        begin_next[i], begin[first[i]] = begin[first[i]], i
        end_next[i], end[last[i] + 1] = end[last[i] + 1], i
    count, work = np.empty(n), np.empty((n, 4))
    inside = 0.0
    running = np.zeros(6)
    for k in range(n):
        for sign, head, after in ((1.0, begin[k], begin_next), (-1.0, end[k], end_next)):
            i = head
            while i >= 0:
                column = 0 if prefill[i] else 3
                inside += sign
                running[column] += sign * tokens[i]
                running[column + 1] += sign * base[i]
                running[column + 2] += sign * slope[i]
                i = after[i]
        count[k] = inside
        work[k, 0] = max(running[0] * g[k], 0.0)
        work[k, 1] = max(running[3] * g[k], 0.0)
        work[k, 2] = max((running[4] + running[5] * q[k]) * g[k], 0.0)
        work[k, 3] = max((running[1] + running[2] * q[k]) * g[k], 0.0)
    return count, work


@compiled
def list_chunks(
    first: Ints,
    last: Ints,
    prefill: Bools,
    tokens: Floats,
    reads: Floats,
    context: Floats,
    growth: Floats,
    q_start: Floats,
    q: Floats,
    unlisted: Floats,
) -> tuple[Ints, Ints, Floats, Floats]:
    """The prefill chunks in the order of their steps: where those of each step begin (n + 1,); of each its segment.

    Then its tokens and its attention. `unlisted`: the work (n, 4) that no segment names; its prefill tokens are one
    chunk more, of segment -1.
    """
    n = q.size
    begin = np.zeros(n + 1, dtype=np.int64)
    for k in range(n):
        begin[k + 1] += unlisted[k, 0] > 0
    for i in range(first.size):
        if prefill[i]:
            begin[first[i] + 1 : last[i] + 2] += 1
    begin = np.cumsum(begin)
    place = begin.copy()
    segment, size, attention = np.empty(begin[n], dtype=np.int64), np.empty(begin[n]), np.empty(begin[n])
    for k in range(n):
        if unlisted[k, 0] > 0:
            segment[place[k]], size[place[k]], attention[place[k]] = -1, unlisted[k, 0], unlisted[k, 3]
            place[k] += 1
    for i in range(first.size):
        if prefill[i]:
            for k in range(first[i], last[i] + 1):
                segment[place[k]], size[place[k]] = i, tokens[i]
                attention[place[k]] = reads[i] * (context[i] + growth[i] * (q[k] - q_start[i]))
                place[k] += 1
    return begin, segment, size, attention


@compiled
def running_sums(
    total: Floats,
    shared: Floats,
    price: Floats,
    step_j: Floats,
    requests: Floats,
    g: Floats,
    q: Floats,
    span_s: Floats,
    first: Ints,
) -> Floats:
    """Running sums (n, 9) over steps that restart with every block (`first`: the first step of each, then n).

    Prices are scaled so that each step's `total` is its `step_j`; a step without a total is shared equally. The sums
    are of what each request pays equally; the prices of a prefill token and of attention, the latter once more times q
    from the block's first step on; those of a decode token and of context, the latter times q likewise; the step's
    seconds; an equal part of all of it.
    """
    sums = np.empty((shared.size, 9))
    running = np.empty(9)
    for block in range(first.size - 1):
        begin = first[block]
        running[:] = 0.0
        for k in range(begin, first[block + 1]):
            local = q[k] - q[begin]
            known = total[k] > TINY
            factor = step_j[k] / total[k] if known else 0.0
            scaled = factor * g[k]
            read, context = price[k, 3] * scaled, price[k, 2] * scaled
            running[0] += (factor * shared[k] if known else step_j[k]) / requests[k]
            running[1] += price[k, 0] * scaled
            running[2] += read
            running[3] += read * local
            running[4] += price[k, 1] * scaled
            running[5] += context
            running[6] += context * local
            running[7] += span_s[k]
            running[8] += step_j[k] / requests[k]
            for j in range(9):
                sums[k, j] = running[j]
    return sums


@compiled
def unlisted_joules(
    total: Floats,
    shared: Floats,
    price: Floats,
    step_j: Floats,
    requests: Floats,
    unlisted: Floats,
    work: Floats,
) -> float:
    """What requests pay that no segment names: `unlisted` in each step, with `work` (n, 4) between them."""
    joules = 0.0
    for k in range(total.size):
        if unlisted[k] == 0 and work[k, 0] == 0 and work[k, 1] == 0 and work[k, 2] == 0 and work[k, 3] == 0:
            continue
        if total[k] <= TINY:
            joules += step_j[k] / requests[k] * unlisted[k]
            continue
        own = shared[k] / requests[k] * unlisted[k]
        for j in range(4):
            own += price[k, j] * work[k, j]
        joules += own * step_j[k] / total[k]
    return joules


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
) -> Floats:
    """What each segment pays by `running_sums`, (m, 4).

    J; J of that equally shared; the seconds of its steps; J by an equal split of them.
    """
    result = np.zeros((first.size, 4))
    paid = np.empty(9)
    for i in range(first.size):
        k = first[i]
        column = 1 if prefill[i] else 4
        while k <= last[i]:
            origin = block_first[block[k]]
            stop = min(last[i], block_first[block[k] + 1] - 1)
            for j in range(9):
                paid[j] = sums[stop, j] - (sums[k - 1, j] if k > origin else 0.0)
            at_origin = context[i] + growth[i] * (q[origin] - q_start[i])
            read = max(at_origin * paid[column + 1] + growth[i] * paid[column + 2], 0.0)
            result[i, 0] += paid[0] + tokens[i] * paid[column] + reads[i] * read
            result[i, 1] += paid[0]
            result[i, 2] += paid[7]
            result[i, 3] += paid[8]
            k = stop + 1
    return result


@compiled
def pay_chunks(first: Ints, segment: Ints, chunk_j: Floats, total: Floats, step_j: Floats, result: Floats) -> float:
    """Add what chunks pay, scaled as in `running_sums`, to that of their segments (m, 4); J of those without one."""
    unlisted = 0.0
    for k in range(total.size):
        factor = step_j[k] / total[k] if total[k] > TINY else 0.0
        for i in range(first[k], first[k + 1]):
            if segment[i] >= 0:
                result[segment[i], 0] += factor * chunk_j[i]
            else:
                unlisted += factor * chunk_j[i]
    return unlisted


@compiled
def add_by_request(request: Whole, rows: Bools, values: Floats, total: Floats) -> None:
    """Add `values` of the segments `rows` to the `total` of their requests."""
    for i in range(request.size):
        if rows[i]:
            total[request[i]] += values[i]
