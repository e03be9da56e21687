"""Fit what ties requests together: clients, sessions, shared prefixes, as fields of `tracegen.sessions.Structure`."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tracegen.durations import NS_PER_S
from tracegen.prefixes import HitTally, hit_rate
from tracegen.sessions import ASSUMED_NS_A_TOKEN, Structure, system_prompts

Ints = NDArray[np.int64]

HIT_ROWS = 50_000  # of a longer trace, the first so many are looked at for prefixes
SAME_BY_CHANCE = 0.01  # a hit rate below is no system prompt


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
    they are left out, with a remark. System prompts stand for all reuse beyond sessions: so many as first blocks are
    shared, of the length that gives the trace's hit rate.
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
    waited = pl.col("arrival_ns") - pl.col("parent_ns") - pl.col("parent_output") * ASSUMED_NS_A_TOKEN
    think = pl.coalesce("think_ns", waited) if "think_ns" in frame.columns else waited
    think_s = joined.filter(~firsts).select(think.clip(1_000_000) / NS_PER_S).to_series().to_numpy()
    logs = np.log(think_s)
    structure = {
        **tied.structure,
        "turns": round(frame.height / int(firsts.sum()), 4),
        "think_s": float(f"{math.exp(float(np.median(logs))):.4g}"),
        "think_sigma": round(min(float(logs.std()), 5.0), 3),
        "max_context": int((frame["input_tokens"].cast(pl.Int64) + frame["output_tokens"]).max()),  # type: ignore[arg-type]
    }
    # At the beginning, sessions that began before the trace look new, with all that was said before as their own: what
    # seems to begin within the length of nine sessions of ten, or half the trace, is not looked at.
    lasted = frame.group_by("session_id").agg(pl.col("arrival_ns").max() - pl.col("arrival_ns").min())["arrival_ns"]
    arrival_ns = frame["arrival_ns"].to_numpy()
    early_ns = min(float(lasted.quantile(0.9) or 0), float(arrival_ns[-1] - arrival_ns[0]) / 2)
    first = firsts.to_numpy()
    sure = ~first | (arrival_ns - arrival_ns[0] >= early_ns)
    own, outputs = own_tokens.clip(1).to_numpy()[sure], tied.outputs[sure]
    return Tied(structure, own, outputs, arrival_ns[first & sure], tied.remarks), firsts


def _system(frame: pl.DataFrame, block_tokens: int, structure: Structure) -> dict[str, Any]:
    """The system prompts that give the hit rate of `frame`, requests that start a session; empty where none is."""
    part = frame.head(HIT_ROWS)
    wanted = hit_rate(part, block_tokens)
    if not wanted > SAME_BY_CHANCE:
        return {}
    firsts = part.select(pl.col("prefix_hashes").list.first()).to_series().drop_nulls().value_counts()
    prompts = min(max(1, int((firsts["count"] > 1).sum())), 10**6)
    inputs = part["input_tokens"].cast(pl.Int64).to_numpy()
    while prompts > 1 and _hits(inputs, prompts, int(inputs.max()), block_tokens, structure) < wanted:
        prompts //= 2  # so many are too seldom the same
    low, high = 0, int(inputs.max()) // block_tokens + 1
    while high - low > 1:
        middle = (low + high) // 2
        if _hits(inputs, prompts, middle * block_tokens, block_tokens, structure) < wanted:
            low = middle
        else:
            high = middle
    return {"system_prompts": prompts, "system_tokens": high * block_tokens}


def _hits(inputs: Ints, prompts: int, tokens: int, block_tokens: int, structure: Structure) -> float:
    """The hit rate of `inputs` behind one of `prompts` system prompts each, as `synth` makes them."""
    asked = Structure(zipf=structure.zipf, system_prompts=prompts, system_tokens=tokens, block_tokens=block_tokens)
    numbers = system_prompts(asked, inputs.size, 0, 0, "")
    tally = HitTally(block_tokens)
    tally.add(inputs, np.full(inputs.size, -1), numbers, np.minimum(tokens, inputs - 1) // block_tokens)
    return tally.rate
