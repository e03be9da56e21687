"""What ties requests together: clients, sessions of several turns with think times, system prompts."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracegen.errors import TraceError
from tracegen.prefixes import Ids, mixed
from tracegen.streams import random_stream

NONE = np.uint64(2**64 - 1)  # no parent, no client: null in the trace
Ints = NDArray[np.int64]

# When a turn is due in the trace, its parent must have been answered: taken to last so long a token, the time between
# tokens of Llama-2-70B on two H100 at batch 1 (Patel et al., Splitwise, ISCA 2024, its perf_model.csv: 37.0 ms).
# `replay run --think-time` waits for the true answer instead.
ASSUMED_NS_A_TOKEN = 37_000_000
# Sessions that last longer than so many times the mean are cut: of geometric numbers of turns e^-10, 1 in 20,000.
LONGEST = 10


@dataclass(frozen=True)
class Structure:
    """Clients, sessions and shared prefixes; the default has none.

    Turns are geometric with mean `turns`; think times lognormal with median `think_s` and sigma `think_sigma`. ServeGen
    (Xiang et al. 2025) reports times between turns around 100 s with a long tail; the sigma of 1 is a choice. System
    prompts are lognormal, too, with median `system_tokens` and sigma `system_sigma`; 0: all of one length.
    """

    clients: int = 0
    zipf: float = 1.15  # see `tracegen.arrivals.models.MODELS["clients"]`
    turns: float = 1.0
    think_s: float = 100.0
    think_sigma: float = 1.0
    max_context: int = 131_072  # tokens of input and output, where a session ends; Llama 3.1's context
    system_prompts: int = 0
    system_tokens: int = 0
    system_sigma: float = 0.0
    block_tokens: int = 64  # four of vLLM's blocks: short prefixes count, and lists stay short

    def __post_init__(self) -> None:
        """Raise `TraceError` for what cannot be."""
        rules = (
            ("clients", 0 <= self.clients <= 100_000, "a number from 0 to 100,000"),
            ("turns", 1 <= self.turns <= 1000, "a mean from 1 to 1,000"),
            ("think_s", 0 < self.think_s <= 1e7, "a positive time"),
            ("think_sigma", 0 <= self.think_sigma <= 5, "a number from 0 to 5"),
            ("max_context", 1 < self.max_context < 2**31, "tokens, below 2^31"),
            ("system_prompts", 0 <= self.system_prompts <= 10**6, "a number up to 1,000,000"),
            ("system_tokens", 0 <= self.system_tokens < 2**31, "tokens, below 2^31"),
            ("system_sigma", 0 <= self.system_sigma <= 5, "a number from 0 to 5"),
            ("block_tokens", 1 <= self.block_tokens <= 2**20, "tokens, 1 or more"),
        )
        for name, sound, wanted in rules:
            if not sound:
                raise TraceError(f"{name} is {getattr(self, name)}, not {wanted}")

    @property
    def has_sessions(self) -> bool:
        """Whether requests come in sessions."""
        return self.turns > 1

    @property
    def has_prefixes(self) -> bool:
        """Whether requests share prefixes."""
        return self.has_sessions or self.system_prompts > 0

    def longest_ns(self, turns: float, output_tokens: float) -> int:
        """How long a session may last, from its first turn to its last, at means of `turns` and `output_tokens`."""
        if not self.has_sessions:
            return 0
        think_s = self.think_s * math.exp(self.think_sigma**2 / 2)
        return math.ceil(LONGEST * turns * (think_s * 1e9 + output_tokens * ASSUMED_NS_A_TOKEN))


def turn_counts(structure: Structure, sessions: int, seed: int, window: int, suffix: str) -> Ints:
    """How many turns each session has."""
    return random_stream(seed, f"turns{suffix}", window).geometric(1 / structure.turns, sessions)


@dataclass(frozen=True)
class Turns:
    """The turns of whole sessions, session after session, as columns; NONE where a first turn has no parent."""

    session: Ints  # the place of the session among the sessions
    place: Ints  # of the turn in its session
    arrival_ns: Ints
    think_ns: Ints
    input_tokens: Ints
    known_tokens: Ints  # the parent's input, -1 without one

    def keep(self, structure: Structure, output_tokens: Ints, longest_ns: int, starts_ns: Ints) -> NDArray[np.bool_]:
        """Which turns come before their session is too long, in tokens or in time; the first always does."""
        over = self.input_tokens + output_tokens > structure.max_context
        over |= self.arrival_ns - starts_ns[self.session] > longest_ns
        ends = np.full(starts_ns.size, np.iinfo(np.int64).max)
        np.minimum.at(ends, self.session[over], self.place[over])
        kept: NDArray[np.bool_] = self.place < np.maximum(ends, 1)[self.session]
        return kept


def unroll(
    starts_ns: Ints, counts: Ints, own_tokens: Ints, output_tokens: Ints, thinks_s: NDArray[np.float64]
) -> Turns:
    """The turns of sessions from `starts_ns` on: a turn's input is its own tokens behind all that was said before.

    `own_tokens`, `output_tokens`, `thinks_s` have a value for each of the sum of `counts` turns.
    """
    session = np.repeat(np.arange(counts.size), counts)
    firsts = np.cumsum(counts) - counts
    place = np.arange(session.size) - firsts[session]
    first = place == 0
    think_ns = np.where(first, 0, np.rint(thinks_s * 1e9).astype(np.int64))
    said = own_tokens + output_tokens
    history = np.cumsum(said) - said
    history -= history[firsts][session]
    input_tokens = history + own_tokens
    waited_ns = think_ns.copy()
    waited_ns[1:] += np.where(first[1:], 0, output_tokens[:-1] * ASSUMED_NS_A_TOKEN)
    since_ns = np.cumsum(waited_ns)
    since_ns -= since_ns[firsts][session]
    known = np.where(first, -1, np.concatenate((input_tokens[:1], input_tokens[:-1])))
    return Turns(session, place, starts_ns[session] + since_ns, think_ns, input_tokens, known)


def think_times_s(structure: Structure, count: int, seed: int, window: int, suffix: str) -> NDArray[np.float64]:
    """Lognormal think times."""
    normal = random_stream(seed, f"think{suffix}", window).standard_normal(count)
    return structure.think_s * np.exp(structure.think_sigma * normal)


def system_prompts(structure: Structure, count: int, seed: int, window: int, suffix: str) -> Ids:
    """The system prompt of each of `count` sessions: the popular ones by Zipf's law, as clients are."""
    from tracegen.arrivals.models import zipf_shares

    stream = random_stream(seed, f"system{suffix}", window)
    numbers = stream.choice(structure.system_prompts, count, p=zipf_shares(structure.system_prompts, structure.zipf))
    return numbers.astype(np.uint64) | np.uint64(2**63)  # which no session is


def system_lengths(structure: Structure, numbers: Ids) -> Ints:
    """How many tokens the system prompts have that `numbers` name; the same prompt has as many everywhere."""
    if not structure.system_sigma:
        return np.full(numbers.size, structure.system_tokens)
    from scipy.special import ndtri

    normal = ndtri(((mixed(numbers) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53)
    tokens = np.rint(structure.system_tokens * np.exp(structure.system_sigma * normal))
    lengths: Ints = np.minimum(tokens, 2.0**31 - 1).astype(np.int64)
    return lengths


def client_numbers(structure: Structure, count: int, seed: int, window: int, suffix: str) -> Ids:
    """The client of each of `count` sessions, by Zipf shares; 0 sends most."""
    from tracegen.arrivals.models import zipf_shares

    shares = zipf_shares(structure.clients, structure.zipf)
    return random_stream(seed, f"client{suffix}", window).choice(structure.clients, count, p=shares).astype(np.uint64)
