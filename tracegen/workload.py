"""What to synthesize, as users ask for it, and the plan that follows: rates, models, windows of time."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tracegen.arrivals.models import Arrivals, make_arrivals, parse_arrivals
from tracegen.durations import NS_PER_S, parse_duration_ns
from tracegen.errors import TraceError
from tracegen.lengths import Mix, parse_mixes, sample_lengths
from tracegen.rates import RatePath, is_curve_file, parse_profile, parse_rate, steps_path
from tracegen.schema import file_sha256
from tracegen.sessions import Structure, turn_counts, unroll

PRODUCTION = "production"
DEFAULT_RPS = 0.5
SAMPLED_SESSIONS = 2_000  # to see how many turns the context leaves: to about 2 %, exactly where it leaves all
SAMPLED_TURNS = 2_000  # of a session, beyond which no context that servers have goes on
WINDOW_ROWS = 2**20  # expected at most; about 150 bytes each while they are made
_NO_STRUCTURE = Structure()


@dataclass(frozen=True)
class Workload:
    """What to synthesize.

    - `mix`: a name, a `.toml` file, or several with shares (`chat:0.7,code:0.3`); each request is labelled.
    - `rate`: the mean in requests/s; or a text for `tracegen.rates.parse_rate`. None: 0.5, or with `production` the
      source's own.
    - `arrivals`: a text for `tracegen.arrivals.parse_arrivals`; or `production`, each mix's own arrivals and structure.
    - `profile`: the rate's daily or weekly course, a text for `tracegen.rates.parse_profile`.
    - `structure`: clients, sessions and prefixes; None: the mix's own with `production`, else none.
    - `shard`: (2, 8) is the second of eight parts of the time, whose rows one after the other are those of the whole.
    """

    mix: str
    rate: float | str | None
    duration_ns: int
    seed: int = 1
    arrivals: str = "poisson"
    profile: str | None = None
    structure: Structure | None = None
    shard: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Part:
    """Requests with arrivals of their own: a share of the rate, the mixes behind it, the name of its streams."""

    arrivals: Arrivals
    share: float
    mixes: tuple[tuple[Mix, float], ...]
    suffix: str


@dataclass(frozen=True)
class Plan:
    """A workload made ready: everything that the windows need."""

    workload: Workload
    parts: tuple[Part, ...]
    rate: RatePath
    structure: Structure
    turns: float  # the mean of a session, less than asked for where the context ends many
    window_ns: int
    longest_ns: int  # a session
    metadata: dict[str, Any]

    @property
    def shard_ns(self) -> tuple[int, int]:
        """The part of the time whose rows are wanted."""
        number, count = self.workload.shard
        return self.workload.duration_ns * (number - 1) // count, self.workload.duration_ns * number // count


def parse_workload(
    *,
    mix: str,
    rate: str | None,
    duration: str,
    seed: int,
    arrivals: str,
    profile: str | None,
    clients: int,
    turns: float,
    think: str,
    max_context: int,
    system_prompts: str | None,
    block_tokens: int,
    shard: str,
) -> Workload:
    """The workload that the options of `tracegen synth` mean. Raises `TraceError` for what cannot be read."""
    count, colon, tokens = (system_prompts or "0:0").partition(":")
    if not (count.isdecimal() and colon and tokens.isdecimal()):
        raise TraceError(f"'{system_prompts}' is not a number of system prompts and their tokens, such as 10:500")
    number, slash, shards = shard.partition("/")
    if not (number.isdecimal() and slash and shards.isdecimal()):
        raise TraceError(f"'{shard}' is not a shard: use I/N, such as 2/8")
    structure = Structure(
        clients=clients,
        turns=turns,
        think_s=parse_duration_ns(think) / NS_PER_S,
        max_context=max_context,
        system_prompts=int(count),
        system_tokens=int(tokens),
        block_tokens=block_tokens,
    )
    return Workload(
        mix,
        _number_or_text(rate),
        parse_duration_ns(duration),
        seed,
        arrivals,
        profile,
        None if structure == _NO_STRUCTURE else structure,
        (int(number), int(shards)),
    )


def _number_or_text(rate: str | None) -> float | str | None:
    """A rate as a number where it is one."""
    try:
        return None if rate is None else float(rate)
    except ValueError:
        return rate


def make_plan(workload: Workload) -> Plan:
    """The plan for `workload`. Raises `TraceError` for what is unknown or out of range."""
    mixes = parse_mixes(workload.mix)
    if workload.duration_ns <= 0:
        raise TraceError(f"duration {workload.duration_ns} ns is not positive")
    number, count = workload.shard
    if not 1 <= number <= count:
        raise TraceError(f"shard {number}/{count} is none: use 1/{count} to {count}/{count}")
    own = workload.arrivals == PRODUCTION
    parts = _own_parts(mixes) if own else (Part(parse_arrivals(workload.arrivals), 1.0, mixes, ""),)
    structure = workload.structure or (_own_structure(mixes) if own else _NO_STRUCTURE)
    asked = _asked_rate(workload, mixes)
    rate = _rate(asked, workload.profile, workload.duration_ns / NS_PER_S)
    knots_s = [modulation.knot_s for part in parts for modulation in part.arrivals.modulations]
    window_s = min([WINDOW_ROWS / rate.peak_rps, *(knot_s * WINDOW_ROWS for knot_s in knots_s)])
    turns, mean_output = _mean_turns(structure, mixes)
    if structure.clients and any(part.arrivals.kind == "clients" for part in parts):
        raise TraceError("the arrival model has clients of its own: leave out --clients, or choose another model")
    return Plan(
        workload,
        parts,
        rate,
        structure,
        turns,
        max(1, min(workload.duration_ns, math.ceil(window_s * NS_PER_S))),
        structure.longest_ns(turns, mean_output),
        _metadata(workload, asked, rate, mixes, structure),
    )


def _asked_rate(workload: Workload, mixes: tuple[tuple[Mix, float], ...]) -> float | str:
    """The rate as it was asked for, or its default."""
    if workload.rate is not None:
        return workload.rate if isinstance(workload.rate, str) else float(workload.rate)
    if workload.arrivals != PRODUCTION:
        return DEFAULT_RPS
    if len(mixes) > 1:
        raise TraceError(f"mix '{workload.mix}': say with --rate how many requests/s the mixes have together")
    own = mixes[0][0].arrivals.get("rate_rps")
    if not isinstance(own, (int, float)):
        raise TraceError(f"mix '{workload.mix}' has no rate of its own; say with --rate how many requests/s")
    return float(own)


def _rate(asked: float | str, profile: str | None, duration_s: float) -> RatePath:
    """The whole rate over the duration."""
    if isinstance(asked, str):
        rate = parse_rate(asked, duration_s)
    elif math.isfinite(asked) and asked > 0:
        rate = steps_path(np.array([asked]), np.array([0.0, duration_s]))
    else:
        raise TraceError(f"rate {asked:g} is not a positive number of requests per second")
    if profile is not None:
        rate = rate.cut(0.0, duration_s).times(parse_profile(profile, duration_s).cut(0.0, duration_s))
    return rate


def _own_parts(mixes: tuple[tuple[Mix, float], ...]) -> tuple[Part, ...]:
    """Each mix with the arrivals that were fitted to its source."""
    parts = []
    for mix, share in mixes:
        if "model" not in mix.arrivals:
            raise TraceError(f"mix '{mix.name}' has no arrivals of its own; choose others, such as --arrivals poisson")
        given = {k: v for k, v in mix.arrivals.items() if k not in {"model", "rate_rps", "about"}}
        try:
            arrivals = make_arrivals(mix.arrivals["model"], given)
        except TraceError as error:
            raise TraceError(f"mix '{mix.name}', arrivals: {error}") from None
        parts.append(Part(arrivals, share, ((mix, 1.0),), f" {mix.name}" if len(mixes) > 1 else ""))
    return tuple(parts)


def _own_structure(mixes: tuple[tuple[Mix, float], ...]) -> Structure:
    """The structure that was fitted to the only mix's source; of several, none."""
    (mix, _), *others = mixes
    known = {field.name for field in fields(Structure)}
    if unknown := set(mix.structure) - known:
        raise TraceError(f"mix '{mix.name}': structure has no '{min(unknown)}'; it has {', '.join(sorted(known))}")
    try:
        return _NO_STRUCTURE if others else Structure(**mix.structure)
    except (TypeError, TraceError) as error:
        raise TraceError(f"mix '{mix.name}', structure: {error}") from None


def _mean_turns(structure: Structure, mixes: tuple[tuple[Mix, float], ...]) -> tuple[float, float]:
    """The mean turns of a session and output tokens of a turn, where sessions end at the context: of a sample."""
    if not structure.has_sessions:
        return 1.0, 0.0
    kept, asked, outputs = 0.0, 0.0, 0.0
    for mix, share in mixes:
        counts = np.minimum(turn_counts(structure, SAMPLED_SESSIONS, 0, 0, " sample"), SAMPLED_TURNS)
        own, output = (tokens.astype(np.int64) for tokens in sample_lengths(mix, int(counts.sum()), 0, 0, " sample"))
        starts_ns = np.zeros(counts.size, np.int64)
        turns = unroll(starts_ns, counts, own, output, np.zeros(own.size))
        sound = turns.keep(structure, output, np.iinfo(np.int64).max, starts_ns)
        kept, asked = kept + share * sound.sum(), asked + share * counts.sum()
        outputs += share * float(output.mean())
    return structure.turns * kept / asked, outputs


def _metadata(
    workload: Workload, asked: float | str, rate: RatePath, mixes: tuple[tuple[Mix, float], ...], structure: Structure
) -> dict[str, Any]:
    """What the trace's file says about how it was made; what is as in the simplest workload is left out."""
    parameters: dict[str, Any] = {
        "mix": workload.mix,
        "rate_rps": asked if isinstance(asked, float) else rate.cut(0.0, workload.duration_ns / NS_PER_S).mean_rps,
        "duration_ns": workload.duration_ns,
        "arrivals": workload.arrivals,
    }
    if isinstance(asked, str):
        parameters["rate"] = asked
    if workload.profile is not None:
        parameters["profile"] = workload.profile
    changed = {
        f.name: getattr(structure, f.name)
        for f in fields(Structure)
        if getattr(structure, f.name) != getattr(_NO_STRUCTURE, f.name)
    }
    if changed and workload.structure is not None:
        parameters["structure"] = changed
    if workload.shard != (1, 1):
        parameters["shard"] = "{}/{}".format(*workload.shard)
    sources = {mix.name: mix.source for mix, _ in mixes}
    more: dict[str, Any] = {"block_tokens": structure.block_tokens} if structure.has_prefixes else {}
    if changed and workload.structure is None:
        more["structure_of_mix"] = changed
    if files := {mix.file: file_sha256(mix.file) for mix, _ in mixes if mix.file}:
        more["mix_files_sha256"] = files
    texts = [text for text in (asked, workload.profile) if isinstance(text, str)]
    if files := {text: file_sha256(text) for text in texts if is_curve_file(text)}:
        more["rate_files_sha256"] = files
    return {
        "generator": "tracegen synth",
        "seed": workload.seed,
        "parameters": parameters,
        "lengths_fitted_to": next(iter(sources.values())) if len(sources) == 1 else sources,
        **more,
    }
