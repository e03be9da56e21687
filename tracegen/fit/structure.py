"""Fit what ties requests together: clients, sessions, shared prefixes, as fields of `tracegen.sessions.Structure`."""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S
from tracegen.fit.turns import Turns, fit_turns
from tracegen.prefixes import HitTally, hit_blocks, hit_rate, hit_shares
from tracegen.sessions import ASSUMED_NS_A_TOKEN, Structure, system_lengths, system_prompts

Ints = NDArray[np.int64]

HIT_ROWS = 20_000  # of a longer trace, the first so many are looked at for prefixes
SAME_BY_CHANCE = 0.01  # a hit rate below is no system prompt
PROMPTS = tuple(4**k for k in range(10))  # numbers of system prompts that are tried, and spreads of their lengths
SIGMAS = (0.0, 0.7, 1.4, 2.1, 2.8)
CLOSE_SHARES = 0.01  # mean difference of shares that is as good as none


@dataclass(frozen=True)
class Tied:
    """What was found, and the trace as single requests that start sessions."""

    structure: dict[str, Any]  # fields of Structure
    own_tokens: Ints  # the inputs without what was said before in their sessions
    outputs: Ints  # of the same requests
    starts_ns: Ints  # when sessions begin; without sessions, when requests arrive
    remarks: list[str] = field(default_factory=list)


def fit_structure(frame: pl.DataFrame, block_tokens: int | None) -> Tied:
    """The structure of the checked trace `frame`, whose prefix hashes, if any, are of `block_tokens` a block.

    Turns are counted by session, and a turn's own tokens are its input without its parent's input and output. Where
    inputs are no longer than that, turns do not hold what was said before, and `synth`'s sessions would not be theirs:
    they are left out, with a remark. System prompts stand for all reuse beyond sessions.
    """
    structure = _clients(frame)
    inputs = frame["input_tokens"].cast(pl.Int64).to_numpy()
    tied = Tied(structure, inputs, frame["output_tokens"].cast(pl.Int64).to_numpy(), frame["arrival_ns"].to_numpy())
    firsts = pl.repeat(True, frame.height, eager=True)
    if {"session_id", "parent_id"} <= set(frame.columns) and frame["parent_id"].null_count() < frame.height:
        tied, firsts = _sessions(frame, tied)
    if "prefix_hashes" in frame.columns and block_tokens:
        shared = _system(frame.filter(firsts), block_tokens, Structure(**tied.structure))
        if shared or tied.structure.get("turns"):
            tied.structure.update(shared, block_tokens=block_tokens)
    return tied


def _clients(frame: pl.DataFrame) -> dict[str, Any]:
    """How many clients there are, and the exponent of Zipf's law under which their requests are likeliest."""
    if "client_id" not in frame.columns or frame["client_id"].null_count():
        return {}
    counts = np.sort(frame["client_id"].value_counts()["count"].to_numpy())[::-1]
    if not 1 < counts.size <= 100_000:  # what Structure takes
        return {}
    from scipy.optimize import minimize_scalar

    logs = np.log(np.arange(1, counts.size + 1))
    mean = float(counts @ logs / counts.sum())
    found = minimize_scalar(lambda s: s * mean + math.log(np.exp(-s * logs).sum()), bounds=(0.0, 5.0), method="bounded")
    return {"clients": int(counts.size), "zipf": round(float(found.x), 3)}


def _sessions(frame: pl.DataFrame, tied: Tied) -> tuple[Tied, pl.Series]:
    """Turns and think times, if turns hold what was said before; and which requests are first turns."""
    parents = frame.select(
        pl.col("request_id").alias("parent_id"),
        pl.col("arrival_ns").alias("parent_ns"),
        pl.col("input_tokens").cast(pl.Int64).alias("parent_input"),
        pl.col("output_tokens").cast(pl.Int64).alias("parent_output"),
    )
    joined = frame.join(parents, on="parent_id", how="left", maintain_order="left")
    firsts = joined["parent_ns"].is_null()
    own = pl.col("input_tokens").cast(pl.Int64) - (pl.col("parent_input") + pl.col("parent_output")).fill_null(0)
    own_tokens = joined.select(own).to_series()
    later = own_tokens.filter(~firsts)
    if later.is_empty() or (later < 1).sum() > later.len() / 10:
        remark = "turns do not hold what was said before them, so sessions are left out"
        return replace(tied, remarks=[*tied.remarks, remark]), ~firsts | True
    turns = _turns(frame, joined.filter(~firsts))
    structure = {
        **tied.structure,
        "turns": round(turns.mean, 4),
        "think_s": float(f"{turns.think_s:.4g}"),
        "think_sigma": round(turns.think_sigma, 3),
        "max_context": int((frame["input_tokens"].cast(pl.Int64) + frame["output_tokens"]).max()),  # type: ignore[arg-type]
    }
    # At the beginning, later turns of sessions that began before the trace look like first ones, with all that was said
    # before as their own: that part of the trace is not looked at.
    first, arrival_ns, remarks = firsts.to_numpy(), tied.starts_ns, list(tied.remarks)
    early_ns, half_ns = turns.settled_s(float(tied.outputs.mean())) * NS_PER_S, (arrival_ns[-1] - arrival_ns[0]) / 2
    late = arrival_ns - arrival_ns[0] >= min(early_ns, half_ns)
    sure = late
    if early_ns > half_ns:
        sure = ~first
        remarks.append("sessions are so long that first turns cannot be told: lengths are those of later turns")
    own = own_tokens.clip(1).to_numpy()[sure]
    return Tied(structure, own, tied.outputs[sure], arrival_ns[first & late], remarks), firsts


def _turns(frame: pl.DataFrame, later: pl.DataFrame) -> Turns:
    """How sessions go on, from all requests and those with a parent among them, joined to it."""
    waited = pl.col("arrival_ns") - pl.col("parent_ns") - pl.col("parent_output") * ASSUMED_NS_A_TOKEN
    think = pl.coalesce("think_ns", waited) if "think_ns" in frame.columns else waited
    seen = later.group_by("parent_id", maintain_order=True).agg((think / NS_PER_S).min().alias("think_s"))
    last = frame.join(seen, left_on="request_id", right_on="parent_id", how="anti", maintain_order="left")
    answered_ns = pl.col("arrival_ns") + pl.col("output_tokens").cast(pl.Int64) * ASSUMED_NS_A_TOKEN
    left_s = last.select((int(frame["arrival_ns"][-1]) - answered_ns) / NS_PER_S).to_series()
    return fit_turns(seen["think_s"].to_numpy(), left_s.to_numpy(), later.height / seen.height)


def _system(frame: pl.DataFrame, block_tokens: int, structure: Structure) -> dict[str, Any]:
    """The system prompts that give the hit rate of `frame`, requests that start a session; empty where none is.

    Of so many prompts, with lengths so spread, those of which the shares of inputs that are known are distributed most
    as the trace's (by the area between the distributions).
    """
    part = frame.head(HIT_ROWS)
    wanted = hit_rate(part, block_tokens)
    if not wanted > SAME_BY_CHANCE:
        return {}
    inputs = part["input_tokens"].cast(pl.Int64).to_numpy()
    true = np.sort(hit_shares(hit_blocks(part), inputs, block_tokens))
    firsts = part.select(pl.col("prefix_hashes").list.first()).to_series().drop_nulls().value_counts()
    shared = min(max(1, int((firsts["count"] > 1).sum())), 10**6)
    best, least = {}, math.inf
    for prompts, sigma in [(shared, 0.0), *itertools.product(PROMPTS, SIGMAS)]:
        asked = replace(structure, system_prompts=prompts, system_sigma=sigma, block_tokens=block_tokens, clients=0)
        tokens = _tokens(inputs, asked, wanted)
        if tokens is None:
            continue
        asked = replace(asked, system_tokens=tokens)
        apart = float(np.abs(np.sort(_shares(inputs, asked)[0]) - true).mean())
        if apart < least:
            best, least = {name: getattr(asked, name) for name in ("system_prompts", "system_tokens")}, apart
            best |= {"system_sigma": sigma} if sigma else {}
        if least < CLOSE_SHARES:
            break
    return best


def _tokens(inputs: Ints, asked: Structure, wanted: float) -> int | None:
    """How long the system prompts must be for a hit rate of `wanted`, in whole blocks; None: no length gives it."""
    low, high = 0, int(inputs.max()) // asked.block_tokens + 1

    def rate(blocks: int) -> float:
        return _shares(inputs, replace(asked, system_tokens=blocks * asked.block_tokens))[1]

    if rate(high) < wanted:
        return None  # so many are too seldom the same
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if rate(middle) < wanted else (low, middle)
    return high * asked.block_tokens


def _shares(inputs: Ints, asked: Structure) -> tuple[NDArray[np.float64], float]:
    """The known share of each of `inputs` behind a system prompt as `synth` makes them, and the hit rate."""
    numbers = system_prompts(asked, inputs.size, 0, 0, "")
    blocks = np.minimum(system_lengths(asked, numbers), inputs - 1) // asked.block_tokens
    tally = HitTally(asked.block_tokens)
    hits = tally.add(inputs, np.full(inputs.size, -1), numbers, blocks)
    return hit_shares(hits, inputs, asked.block_tokens), tally.rate
