"""Sharing each step's energy among its requests, in time proportional to steps + segments.

Prices belong to steps, so a segment's energy is a difference of running sums of shared energy, price, and price times
the step's coordinate. The sums restart in every block: one sum over a long run would lose the digits that a short
request needs.

What a request adds to its steps (`share_marginal`) is no price: it is worked out per segment and step, which takes time
proportional to tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from analysis.blocks import Blocks
from analysis.kernels import pay, pay_chunks, running_sums, unlisted_joules
from analysis.load import Floats
from analysis.model import TINY, Model, pace_of
from analysis.pricing import Parts, scale
from analysis.steps import (
    CONTEXT_TOKENS,
    DECODE,
    DECODE_TOKENS,
    PREFILL,
    PREFILL_ATTENTION,
    PREFILL_TOKENS,
    Ints,
    Segments,
    Steps,
)

COLUMNS = {PREFILL: (PREFILL_TOKENS, PREFILL_ATTENTION), DECODE: (DECODE_TOKENS, CONTEXT_TOKENS)}
DEFAULT_METHOD = "shapley"
MARGINAL = "marginal"  # the method that is no price per step
LEAST_PRICED = 1e-9  # of a step's energy: less is what rounding leaves
ROWS_AT_ONCE = 500_000  # of a segment and a step, in memory


def _shapley(parts: Parts, steps: Steps) -> Parts:
    """Each request pays the Shapley prices of its own work and an equal share of the energy at zero work."""
    return parts


def _equal_time(parts: Parts, steps: Steps) -> Parts:
    """Every request in a step pays the same."""
    return Parts(parts.total, parts.total, np.zeros_like(parts.price))


def _tokens(parts: Parts, steps: Steps) -> Parts:
    """Every token scheduled in a step pays the same; a step without tokens is shared equally."""
    tokens = steps.work[:, PREFILL_TOKENS] + steps.work[:, DECODE_TOKENS]
    price = np.zeros_like(parts.price)
    price[:, [PREFILL_TOKENS, DECODE_TOKENS]] = np.divide(
        parts.total, tokens, out=np.zeros_like(tokens), where=tokens > 0
    )[:, None]
    return Parts(parts.total, np.where(tokens > 0, 0.0, parts.total), price)


def _work(parts: Parts, steps: Steps) -> Parts:
    """Each request pays in proportion of what the prices say of its own work; where they say nothing, equally."""
    priced_j = parts.total - parts.shared
    some = priced_j > LEAST_PRICED * parts.total
    factor = np.divide(parts.total, priced_j, out=np.zeros_like(priced_j), where=some)
    return replace(scale(parts, factor), total=parts.total, shared=np.where(some, 0.0, parts.total))


# Methods that are prices of a step; `METHOD_NAMES` has the others too.
METHODS: dict[str, Callable[[Parts, Steps], Parts]] = {
    "shapley": _shapley,
    "equal-time": _equal_time,
    "tokens": _tokens,
    "work": _work,
}
METHOD_NAMES = (*METHODS, MARGINAL)


@dataclass(frozen=True)
class Shares:
    """Per segment: its energy and the equally shared part of it, J, and the steps and seconds it took part in."""

    energy_j: Floats
    shared_j: Floats
    steps: Floats
    time_s: Floats
    unlisted_j: float  # of requests that no segment names, and what `share_marginal` leaves over
    equal_j: Floats | None = None  # by an equal split of the same steps; `share_marginal` has none


def share(parts: Parts, steps: Steps, segments: Segments, blocks: Blocks, step_j: Floats | None = None) -> Shares:
    """What each segment pays of the steps that it is in.

    `step_j` (n,): what the steps cost; `parts` count in their proportions, and what has no parts is shared equally.
    None: what `parts` say.
    """
    step_j = parts.total if step_j is None else step_j
    prices = (parts.total, parts.shared, parts.price, step_j, steps.requests)
    sums = running_sums(*prices, steps.g, steps.q, steps.end_s - steps.start_s, blocks.first)
    paid = pay(
        sums,
        blocks.block,
        blocks.first,
        steps.q,
        segments.first,
        segments.last,
        segments.kind == PREFILL,
        segments.tokens,
        segments.reads,
        segments.context,
        segments.growth,
        segments.q_start,
    )
    count = (segments.last - segments.first + 1).astype(np.float64)
    unlisted_j = unlisted_joules(*prices, steps.unlisted, steps.unlisted_work)
    if parts.chunks is not None and parts.chunk_j is not None:
        unlisted_j += pay_chunks(parts.chunks.first, parts.chunks.segment, parts.chunk_j, parts.total, step_j, paid)
    return Shares(paid[:, 0], paid[:, 1], count, paid[:, 2], unlisted_j, paid[:, 3])


def share_marginal(model: Model, steps: Steps, segments: Segments, idle_w: Floats, step_j: Floats) -> Shares:
    """What each segment adds to the steps that it is in: E(x) - E(x without it), in proportion of `step_j` = E(x), J.

    The time that its work adds is included, at idle power (`idle_w`, (n,)) and more, as in the other methods. Alone in
    a step it pays the whole of it, idle power included: without it there would be no step, and energy counts as idle
    only while the engine is empty, so that the same joules of a lone request are never called two names by two methods.
    What the requests of a step leave of it (mostly the energy at zero work, which none of several causes) is
    `unlisted_j`; it is negative where they ask for more than there is, since work may cost more on top of other work
    than by itself. No request pays less than nothing or more than its step.
    """
    pace = pace_of(model, steps)
    whole_j = model.energy_j(steps.work, idle_w, pace)
    energy_j = np.zeros(len(segments))
    for owner, k in each_step(segments):
        rest = np.maximum(steps.work[k] - work_in(segments, owner, steps, k), 0.0)
        rest_j = model.energy_j(rest, idle_w[k], pace[k])
        added = np.divide(whole_j[k] - rest_j, whole_j[k], out=np.zeros(k.size), where=whole_j[k] > TINY)
        added = np.where(steps.requests[k] > 1, np.clip(added, 0.0, 1.0), 1.0)
        energy_j += np.bincount(owner, weights=added * step_j[k], minlength=len(segments))
    span_s = np.concatenate([[0.0], np.cumsum(steps.end_s - steps.start_s)])
    return Shares(
        energy_j=energy_j,
        shared_j=np.zeros(len(segments)),
        steps=(segments.last - segments.first + 1).astype(np.float64),
        time_s=span_s[segments.last + 1] - span_s[segments.first],
        unlisted_j=float(step_j.sum() - energy_j.sum()),
    )


def each_step(segments: Segments) -> Iterator[tuple[Ints, Ints]]:
    """Segments unrolled, some at a time: the row of the segment and that of the step."""
    count = segments.last - segments.first + 1
    ends = np.cumsum(count)
    low = 0
    while low < len(segments):
        before = int(ends[low] - count[low])
        high = max(low + 1, int(np.searchsorted(ends, before + ROWS_AT_ONCE, side="right")))
        owner = np.repeat(np.arange(low, high), count[low:high])
        start = ends[low:high] - count[low:high] - before
        yield owner, segments.first[owner] + np.arange(owner.size) - np.repeat(start, count[low:high])
        low = high


def work_in(segments: Segments, owner: Ints, steps: Steps, k: Ints) -> Floats:
    """The work (m, 4) that the segments `owner` do in the steps `k`, row by row."""
    work = np.zeros((k.size, steps.work.shape[1]))
    context = segments.context[owner] + segments.growth[owner] * (steps.q[k] - segments.q_start[owner])
    for kind, (token_column, read_column) in COLUMNS.items():
        mine = segments.kind[owner] == kind
        work[:, token_column] += np.where(mine, segments.tokens[owner] * steps.g[k], 0.0)
        work[:, read_column] += np.where(mine, segments.reads[owner] * context * steps.g[k], 0.0)
    return work
