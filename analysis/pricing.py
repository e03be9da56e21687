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

from dataclasses import dataclass, replace

import numpy as np

from analysis.game import play
from analysis.load import Floats
from analysis.model import TERMS, TINY, Model
from analysis.steps import PREFILL, PREFILL_TOKENS, Segments, Steps


@dataclass(frozen=True)
class Parts:
    """What a step's energy is made of, J: `total` = `shared` + `price`·work + `square`·Σ chunk², all of them ≥ 0.

    `square` may be below zero by itself; what a chunk pays, price·c + square·c², is not.
    """

    total: Floats  # (n,)
    shared: Floats  # (n,)
    price: Floats  # (n, 4), J per unit of work
    square: Floats | None = None  # (n,), J per squared token of a prefill chunk; None: nought


def own_j(parts: Parts, work: Floats) -> Floats:
    """What one request's `work` (n, 4) costs by itself in each step, J."""
    own: Floats = np.einsum("ij,ij->i", parts.price, work)
    if parts.square is not None:
        own = own + parts.square * work[:, PREFILL_TOKENS] ** 2
    return own


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
    rows = np.flatnonzero(segments.kind == PREFILL)

    def running(values: Floats) -> Floats:
        delta = np.bincount(segments.first[rows], weights=values, minlength=len(steps) + 1)
        delta -= np.bincount(segments.last[rows] + 1, weights=values, minlength=len(steps) + 1)
        return np.asarray(np.round(np.cumsum(delta))[:-1], dtype=np.float64)

    unlisted = steps.unlisted_work[:, 0]
    count = running(np.ones(rows.size)) + (unlisted > 0)
    return Chunks(count, running(segments.tokens[rows] ** 2) + unlisted**2)


def equal_chunks(steps: Steps) -> Chunks:
    """The prefill chunks of each step as far as the steps alone tell: every request decodes a token or prefills."""
    count = np.maximum(np.round(steps.requests - steps.work[:, 1]), 1.0) * (steps.work[:, 0] > 0)
    return Chunks(count, np.divide(steps.work[:, 0] ** 2, count, out=np.zeros_like(count), where=count > 0))


def price_steps(model: Model, steps: Steps, idle_w: Floats, chunks: Chunks | None = None) -> Parts:
    """The energy of each step of the whole group at `idle_w` (n,), scaled to the step's own duration, in its parts."""
    span_s = steps.end_s - steps.start_s
    busy_s = np.minimum(steps.measured_s, span_s) if model.timed else span_s
    if model.linear:
        return _linear(model, steps, idle_w, idle_w * span_s + (model.features(steps) @ model.power) * busy_s)
    known = equal_chunks(steps) if chunks is None else chunks
    flat = np.concatenate([model.overhead, model.compute, model.memory, model.power, [model.exponent, model.wave]])
    total, shared, price, square, watts = play(flat, idle_w, steps.work, steps.requests, known.count, known.squares)
    modelled = idle_w * span_s + watts * busy_s
    factor = np.divide(modelled, total, out=np.zeros_like(total), where=total > TINY)
    scaled = scale(Parts(total, shared, price, square), factor)
    return replace(scaled, total=modelled, shared=np.where(total > TINY, scaled.shared, modelled))


def _linear(model: Model, steps: Steps, idle_w: Floats, modelled: Floats) -> Parts:
    """Prices of a linear model are its coefficients, at the pace of each step."""
    span_s = steps.end_s - steps.start_s
    predicted = model.predict_s(steps.work)
    price: Floats = np.broadcast_to(model.power[TERMS + 1 :], steps.work.shape)
    if predicted is not None:
        predicted = np.maximum(predicted, TINY)
        pace = np.minimum(steps.measured_s, span_s) / predicted
        idle_j = idle_w * span_s / predicted
        price = pace[:, None] * price + (idle_j + pace * model.power[0])[:, None] * model.overhead[1:5]
    return Parts(modelled, np.maximum(modelled - (price * steps.work).sum(axis=1), 0.0), np.array(price))
