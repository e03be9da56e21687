"""What one simulated engine holds, as arrays for compiled code: requests, queues, block tables, the present step.

Requests are rows of a table that the caller owns; whoever adds one sets `prompt`, `output`, `number` and, if wanted,
`priority` and `keys_*`, and nothing else.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.blocks import Pool, RecordArray, make_pool

NOWHERE, WAITING, RUNNING, FINISHED = 0, 1, 2, 3  # a request's `place`
PREFILL, DECODE = 0, 1  # a part's `kind`
NO_TOKEN, TOKEN, LAST_TOKEN = 0, 1, 2  # what a part `yields`

REQUEST = np.dtype(
    [
        ("number", np.uint64),  # a number of its own, from which its private keys are made
        ("prompt", np.int32),
        ("output", np.int32),  # wanted; the simulated model never ends a text by itself
        ("priority", np.int32),  # lower goes first, where priorities count
        ("place", np.int32),
        ("generated", np.int32),
        ("computed", np.int32),  # tokens whose keys and values are in the cache
        ("prefill_until", np.int32),  # up to here computing counts as prefill
        ("cached", np.int32),  # tokens that the prefix cache had when it was first admitted; -1: not yet
        ("preemptions", np.int32),
        ("held", np.int32),  # KV blocks
        ("named", np.int32),  # of them with a key
        ("table", np.int32),  # the row of block tables that is its own while it runs
        ("next", np.int32),  # in the queue; -1: none
        ("previous", np.int32),
        ("keys_count", np.int32),  # content keys that it has ...
        ("keys_at", np.int64),  # ... from here in `keys`, one for each `key_tokens` tokens of its prompt
        ("order", np.int64),  # of arrival
        ("arrival_ns", np.int64),
        ("first_token_ns", np.int64),
        ("last_token_ns", np.int64),
        # The row of segments.parquet that is still growing; first_step -1: none.
        ("first_step", np.int64),
        ("last_step", np.int64),
        ("context_start", np.int32),
        ("tokens_per_step", np.int32),
        ("kind", np.int32),
    ],
    align=True,
)
PART = np.dtype(
    [("row", np.int32), ("kind", np.int32), ("tokens", np.int32), ("context", np.int32), ("yields", np.int32)]
)
STATE = np.dtype(
    [
        (name_, np.int64)
        for name_ in (
            # The engine's limits.
            "max_num_seqs", "budget_tokens", "block_tokens", "key_tokens", "blocks", "prefix_caching", "by_priority",
            "reserve_full",
            # Who is where.
            "running", "waiting", "first", "last", "parts", "tables_free", "arrivals", "preemptions",
            # The step that was formed last.
            "prefill_tokens", "decode_tokens", "context_tokens", "attention_twice", "stuck",
        )
    ]
)  # fmt: skip


class Core(NamedTuple):
    """One engine's queues, blocks and present step."""

    state: RecordArray  # [1]
    requests: RecordArray  # REQUEST, shared between engines that serve one trace
    keys: npt.NDArray[np.uint64]
    pool: Pool
    tables: npt.NDArray[np.int32]  # [max_num_seqs, blocks of the longest request]
    spare: npt.NDArray[np.int32]  # rows of `tables` that are free, the first `tables_free`
    running: npt.NDArray[np.int32]  # rows of requests in order of admission, the first `running`
    parts: RecordArray  # PART, the first `parts`: the step that was formed last


class Limits(NamedTuple):
    """What vLLM's options of the same names set."""

    kv_tokens: int  # capacity of the KV cache; what does not fill a block is lost
    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    priority: bool = False  # scheduling policy: by priority, else first come, first served
    reserve_full: bool = True  # admit only what fits as a whole (scheduler_reserve_full_isl)


def make_core(limits: Limits, requests: RecordArray, keys: npt.NDArray[np.uint64], key_tokens: int) -> Core:
    """An engine without requests. `key_tokens`: how many tokens each of a request's content keys stands for."""
    blocks = limits.kv_tokens // limits.block_tokens
    state = np.zeros(1, dtype=STATE)
    seqs = limits.max_num_seqs
    for field, value in {
        "max_num_seqs": seqs,
        "budget_tokens": limits.max_num_batched_tokens,
        "block_tokens": limits.block_tokens,
        "key_tokens": key_tokens,
        "blocks": blocks,
        "prefix_caching": limits.enable_prefix_caching,
        "by_priority": limits.priority,
        "reserve_full": limits.reserve_full,
        "first": -1,
        "last": -1,
        "tables_free": seqs,
    }.items():
        state[field] = value
    return Core(
        state,
        requests,
        keys,
        make_pool(blocks),
        np.zeros((seqs, 1), dtype=np.int32),
        np.arange(seqs, dtype=np.int32),
        np.zeros(seqs, dtype=np.int32),
        np.zeros(seqs, dtype=PART),
    )


def widened(core: Core, tokens: int) -> Core:
    """`core` with block tables wide enough for a request of `tokens`; itself where they are."""
    needed = -(-tokens // int(core.state["block_tokens"][0]))
    rows, width = core.tables.shape
    if needed <= width:
        return core
    tables = np.zeros((rows, max(needed, 2 * width)), dtype=np.int32)
    tables[:, :width] = core.tables
    return core._replace(tables=tables)
