"""What a step's parts pay: the Shapley value of a step between a few prefill chunks and many decodes.

A step is a cost-sharing game: E(S) for the requests S in it, E a function of their summed work. Its Shapley value is
what a request adds to those before it, averaged over all orders. Energy at zero work is for whoever is there and is
shared equally, exactly. The rest is a game between a few large players, the prefill chunks, and many small ones, the
decodes: an oceanic game (Milnor and Shapley, "Values of Large Games II: Oceanic Games", 1978). A chunk arrives after k
of N decodes, k uniform over 0..N, and after each other chunk with probability (k + 1)/(N + 2); it pays what it adds.
Decodes pay what chunks leave, for their context the slope of E along the way and the rest per token.

Pricing everything by slopes along the diagonal (Aumann and Shapley) treats a chunk of 450 tokens as if it came token by
token together with the decodes; where compute and memory time overlap that is wrong by 3-10 % of a chunk.

Chunks of one step are told apart by size only, from their number and the sum of their squares: the two-class batch
with those moments, one large chunk and equal others, which is exact for one and two chunks. A chunk of c tokens then
pays p·c + q·c² and its attention's price.
"""

from dataclasses import dataclass

import numpy as np

from analysis.game import play, play_linear
from analysis.kernels import count_chunks
from analysis.load import Floats
from analysis.model import TERMS, Model
from analysis.steps import PREFILL, Segments, Steps


@dataclass(frozen=True)
class Parts:
    """What a step's energy is made of, J: `total` = `shared` + `price`·work + `square`·Σ chunk², all of them ≥ 0.

    `square` may be below zero by itself; what a chunk pays, price·c + square·c², is not.
    """

    total: Floats  # (n,)
    shared: Floats  # (n,)
    price: Floats  # (n, 4), J per unit of work
    square: Floats | None = None  # (n,), J per squared token of a prefill chunk; None: nought


def scale(parts: Parts, factor: Floats) -> Parts:
    """All of `parts` times `factor` (n,)."""
    square = None if parts.square is None else parts.square * factor
    return Parts(parts.total * factor, parts.shared * factor, parts.price * factor[:, None], square)


@dataclass(frozen=True)
class Chunks:
    """The prefill chunks of each step: how many, and the sum of the squares of their tokens."""

    count: Floats
    squares: Floats


def chunks_of(steps: Steps, segments: Segments) -> Chunks:
    """The prefill chunks that `segments` put into `steps`; unlisted prefill tokens count as one chunk more."""
    prefill = segments.kind == PREFILL
    return Chunks(*count_chunks(segments.first, segments.last, prefill, segments.tokens, steps.unlisted_work))


def equal_chunks(steps: Steps) -> Chunks:
    """The prefill chunks of each step as far as the steps alone tell: every request decodes a token or prefills."""
    count = np.maximum(np.round(steps.requests - steps.work[:, 1]), 1.0) * (steps.work[:, 0] > 0)
    return Chunks(count, np.divide(steps.work[:, 0] ** 2, count, out=np.zeros_like(count), where=count > 0))


def price_steps(model: Model, steps: Steps, idle_w: Floats, chunks: Chunks | None = None) -> Parts:
    """The energy of each step of the whole group at `idle_w` (n,), scaled to the step's own duration, in its parts."""
    span_s = steps.end_s - steps.start_s
    busy_s = np.minimum(steps.measured_s, span_s) if model.timed else span_s
    if model.linear:
        power = np.concatenate([model.power[:1], model.power[TERMS:]])
        return Parts(*play_linear(model.overhead, power, model.timed, idle_w, span_s, busy_s, steps.work))
    known = equal_chunks(steps) if chunks is None else chunks
    flat = np.concatenate([model.overhead, model.compute, model.memory, model.power, [model.exponent, model.wave]])
    return Parts(*play(flat, idle_w, span_s, busy_s, steps.work, steps.requests, known.count, known.squares))
