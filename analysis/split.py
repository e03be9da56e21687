"""Sharing each step's energy among its requests, in time proportional to steps + segments.

Prices belong to steps, so a segment's energy is a difference of running sums of shared energy, price, and price times
the step's coordinate. The sums restart in every block: one sum over a long run would lose the digits that a short
request needs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.blocks import Blocks
from analysis.load import Floats
from analysis.model import TINY, Parts
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


def _shapley(parts: Parts, steps: Steps) -> Parts:
    """Each request pays Aumann-Shapley prices for its own work and an equal share of the energy at zero work."""
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


METHODS: dict[str, Callable[[Parts, Steps], Parts]] = {
    "shapley": _shapley,
    "equal-time": _equal_time,
    "tokens": _tokens,
}


@dataclass(frozen=True)
class Shares:
    """Per segment: its energy and the equally shared part of it, J, and the steps and seconds it took part in."""

    energy_j: Floats
    shared_j: Floats
    steps: Floats
    time_s: Floats
    unlisted_j: float  # of requests that no segment names


def scale_parts(parts: Parts, step_j: Floats) -> Parts:
    """`parts` in their proportions, with totals `step_j` (n,); what has no parts is shared equally."""
    factor = np.divide(step_j, parts.total, out=np.zeros_like(step_j), where=parts.total > TINY)
    return Parts(step_j, np.where(parts.total > TINY, parts.shared * factor, step_j), parts.price * factor[:, None])


def share(parts: Parts, steps: Steps, segments: Segments, blocks: Blocks) -> Shares:
    """What each segment pays of the steps that it is in."""
    each_j = parts.shared / steps.requests
    owner, first, last = _pieces(segments, blocks)
    origin = blocks.first[blocks.block[first]] if first.size else first
    local_q = steps.q - steps.q[blocks.first[blocks.block]]
    span_s = steps.end_s - steps.start_s

    def total(values: Floats) -> Floats:
        sums = _running(values, blocks)
        before = np.where(first > origin, sums[np.maximum(first - 1, 0)], 0.0) if first.size else np.zeros(0)
        return np.asarray(sums[last] - before)

    shared_j = total(each_j)
    energy_j = shared_j.copy()
    kind, tokens, reads = segments.kind[owner], segments.tokens[owner], segments.reads[owner]
    growth = segments.growth[owner]
    at_origin = segments.context[owner] + growth * (steps.q[origin] - segments.q_start[owner])
    for which, (token_column, read_column) in COLUMNS.items():
        per_token, per_read = parts.price[:, token_column] * steps.g, parts.price[:, read_column] * steps.g
        read_j = at_origin * total(per_read) + growth * total(per_read * local_q)
        priced_j = tokens * total(per_token) + reads * np.maximum(read_j, 0.0)
        energy_j += np.where(kind == which, priced_j, 0.0)
    unlisted_j = float((each_j * steps.unlisted).sum() + (parts.price * steps.unlisted_work).sum())

    def by_segment(values: Floats) -> Floats:
        return np.bincount(owner, weights=values, minlength=len(segments)).astype(np.float64)

    count = (segments.last - segments.first + 1).astype(np.float64)
    return Shares(by_segment(energy_j), by_segment(shared_j), count, by_segment(total(span_s)), unlisted_j)


def _pieces(segments: Segments, blocks: Blocks) -> tuple[Ints, Ints, Ints]:
    """Segments cut at blocks: the row of the segment, first and last step of each piece."""
    block_a, block_b = blocks.block[segments.first], blocks.block[segments.last]
    count = block_b - block_a + 1
    owner = np.repeat(np.arange(len(segments)), count)
    offset = np.arange(owner.size) - np.repeat(np.cumsum(count) - count, count)
    block = block_a[owner] + offset
    first = np.maximum(segments.first[owner], blocks.first[block])
    last = np.minimum(segments.last[owner], blocks.first[block + 1] - 1)
    some = last >= first  # a block inside an idle stretch has no steps
    return owner[some], first[some], last[some]


def _running(values: Floats, blocks: Blocks) -> Floats:
    """Running sums of `values` (n,) that restart with every block."""
    sums = np.empty_like(values)
    for start, end in zip(blocks.first[:-1], blocks.first[1:], strict=True):
        np.cumsum(values[start:end], out=sums[start:end])
    return sums
