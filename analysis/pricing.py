"""What a step's parts pay: the Shapley value of a step between a few prefill chunks and many decodes.

A step is a cost-sharing game: E(S) for the requests S in it, E a function of their summed work. Its Shapley value is
what a request adds to those before it, averaged over all orders. Energy at zero work is for whoever is there and is
shared equally, exactly. The rest is a game between a few large players, the prefill chunks, and many small ones, the
decodes: an oceanic game (Milnor and Shapley, "Values of Large Games II: Oceanic Games", 1978). A chunk arrives after k
of N decodes, k uniform over 0..N, and after each other chunk with probability (k + 1)/(N + 2); it pays what it adds.
Decodes pay what chunks leave, for their context the slope of E along the way and the rest per token.

Each chunk is priced by itself: where compute comes in waves, whether it fills one or opens another is its own affair
and that of those before it, and no price per token can tell. Pricing everything by slopes along the diagonal (Aumann
and Shapley) treats a chunk of 450 tokens as if it came token by token together with the decodes; where compute and
memory time overlap that is wrong by 3-10 % of a chunk.
"""

from dataclasses import dataclass

import numpy as np

from analysis.game import play, play_linear, roots_of
from analysis.kernels import list_chunks
from analysis.load import Floats
from analysis.model import TERMS, Model
from analysis.steps import PREFILL, PREFILL_ATTENTION, PREFILL_TOKENS, Ints, Segments, Steps


@dataclass(frozen=True)
class Chunks:
    """The prefill chunks of some steps, in their order: those of step k are from `first[k]` to `first[k + 1]`."""

    first: Ints  # (n + 1,)
    segment: Ints  # (c,), row of the segment; -1 for work that no segment names
    tokens: Floats
    attention: Floats

    def of_steps(self, values: Floats) -> Floats:
        """The `values` (n,) of each chunk's step."""
        return np.repeat(values, np.diff(self.first))


@dataclass(frozen=True)
class Parts:
    """What a step's energy is made of, J: `total` = `shared` + `price`·work + Σ `chunk_j` of its chunks, all ≥ 0.

    Either prefill has prices, or chunks pay by themselves.
    """

    total: Floats  # (n,)
    shared: Floats  # (n,)
    price: Floats  # (n, 4), J per unit of work
    chunk_j: Floats | None = None  # (c,), what each of `chunks` pays; None where prefill has prices
    chunks: Chunks | None = None


def scale(parts: Parts, factor: Floats) -> Parts:
    """All of `parts` times `factor` (n,)."""
    chunk_j = None
    if parts.chunks is not None and parts.chunk_j is not None:
        chunk_j = parts.chunk_j * parts.chunks.of_steps(factor)
    return Parts(parts.total * factor, parts.shared * factor, parts.price * factor[:, None], chunk_j, parts.chunks)


def chunks_of(steps: Steps, segments: Segments) -> Chunks:
    """The prefill chunks that `segments` put into `steps`; unlisted prefill tokens count as one chunk more."""
    prefill = segments.kind == PREFILL
    columns = (segments.tokens, segments.reads, segments.context, segments.growth, segments.q_start)
    return Chunks(*list_chunks(segments.first, segments.last, prefill, *columns, steps.q, steps.unlisted_work))


def whole_chunks(steps: Steps) -> Chunks:
    """The prefill of each step as one chunk that no segment names: all that the steps alone tell."""
    some = steps.work[:, PREFILL_TOKENS] > 0
    work = steps.work[some]
    first = np.concatenate([[0], np.cumsum(some)])
    return Chunks(first, np.full(len(work), -1), work[:, PREFILL_TOKENS], work[:, PREFILL_ATTENTION])


def price_steps(model: Model, steps: Steps, idle_w: Floats, chunks: Chunks | None = None) -> Parts:
    """The energy of each step of the whole group at `idle_w` (n,), scaled to the step's own duration, in its parts.

    `chunks`: by default those of `whole_chunks`.
    """
    span_s = steps.end_s - steps.start_s
    busy_s = np.minimum(steps.measured_s, span_s) if model.timed else span_s
    if model.linear:
        power = np.concatenate([model.power[:1], model.power[TERMS:]])
        return Parts(*play_linear(model.overhead, power, model.timed, idle_w, span_s, busy_s, steps.work))
    chunks = whole_chunks(steps) if chunks is None else chunks
    still = 0.0 if model.pad_draws else model.compute[-1]
    scalars = [model.exponent, model.wave, still, model.cap_w, model.slows]
    flat = np.concatenate([model.overhead, model.compute, model.memory, model.power, scalars, roots_of(model.exponent)])
    own = chunks.first, chunks.tokens, chunks.attention
    return Parts(*play(flat, idle_w, span_s, busy_s, steps.work, steps.requests, *own), chunks)
