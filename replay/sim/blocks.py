"""The KV cache of one engine in blocks, and its prefix cache, compiled: after vLLM V1's block pool.

Every block is free or held by requests. Free blocks queue up for reuse, the least recently used first; a block that
is full keeps its content when it is freed, and whoever needs that content takes it out of the queue again (a hit). A
block's content has a key: a hash of all tokens up to its end, as the caller makes it. Content that nobody can ask for
needs none: the tokens of one request alone are keyed only when a preemption frees them, for then they may come back.

Keys are found through an open-addressing table; several blocks may have one key, as in vLLM.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from replay.sim.compiled import compiled, inlined

RecordArray = npt.NDArray[Any]  # of records, which compiled code reads by field: `array[i].field`
Record = Any  # one of them

BLOCK = np.dtype([("next", np.int32), ("previous", np.int32), ("holders", np.int32), ("key", np.uint64)], align=True)
SLOT = np.dtype([("key", np.uint64), ("block", np.int64)])
_NO_KEY = np.uint64(0)
_SLOTS_PER_BLOCK = 2  # at least: the table is at most half full, so that probes stay short


class Pool(NamedTuple):
    """The blocks, and where their keys are found."""

    blocks: RecordArray  # BLOCK, [blocks + 1]: the last is the queue's two ends
    slots: RecordArray  # SLOT, [a power of two]
    free: npt.NDArray[np.int64]  # [1]: blocks that nobody holds


def make_pool(blocks: int) -> Pool:
    """`blocks` free blocks that hold nothing."""
    records = np.zeros(blocks + 1, dtype=BLOCK)
    ring = np.arange(blocks + 1)
    records["next"] = np.roll(ring, -1)
    records["previous"] = np.roll(ring, 1)
    size = 1 << max(4, int(blocks * _SLOTS_PER_BLOCK - 1).bit_length())
    return Pool(records, np.zeros(size, dtype=SLOT), np.array([blocks], dtype=np.int64))


@inlined
def mix(a: np.uint64, b: np.uint64) -> np.uint64:
    """A key of two numbers, never 0: SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA'14)."""
    z = a + np.uint64(0x9E3779B97F4A7C15) * (b + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z if z != np.uint64(0) else np.uint64(1)


@compiled
def content_keys(tokens: npt.NDArray[np.uint64], block_tokens: int) -> npt.NDArray[np.uint64]:
    """The key of each full block of `tokens`: of all tokens up to its end, for what they are depends on all of them."""
    keys = np.empty(len(tokens) // block_tokens, np.uint64)
    key = np.uint64(0)
    for i in range(len(keys) * block_tokens):
        key = mix(key, tokens[i])
        if (i + 1) % block_tokens == 0:
            keys[i // block_tokens] = key
    return keys


@inlined
def take_free(pool: Pool, table: npt.NDArray[np.int32], first: int, count: int) -> None:
    """Hold the `count` free blocks that come first, in `table` from `first` on; their content is lost.

    There must be as many.
    """
    blocks = pool.blocks
    end = len(blocks) - 1
    block = blocks[end].next
    for j in range(first, first + count):
        table[j] = block
        record = blocks[block]
        if record.key != np.uint64(0):
            _forget(pool, block)
        record.holders = 1
        block = record.next
    blocks[end].next = block
    blocks[block].previous = end
    pool.free[0] -= count


@inlined
def hold(pool: Pool, block: int) -> None:
    """Hold a block for its content too."""
    if pool.blocks[block].holders == 0:
        _unlink(pool, block)
    pool.blocks[block].holders += 1


@inlined
def release(pool: Pool, table: npt.NDArray[np.int32], count: int, full: int) -> None:
    """Let go of the first `count` blocks of `table`, the last first.

    Unheld, the `full` ones at its beginning queue up at the end, the others in front: their content has no use.
    """
    blocks = pool.blocks
    end = len(blocks) - 1
    for j in range(count - 1, full - 1, -1):
        block = table[j]
        blocks[block].holders -= 1
        if blocks[block].holders == 0:
            after = blocks[end].next
            blocks[block].previous, blocks[block].next = end, after
            blocks[end].next = blocks[after].previous = block
            pool.free[0] += 1
    last = blocks[end].previous
    for j in range(min(count, full) - 1, -1, -1):
        block = table[j]
        blocks[block].holders -= 1
        if blocks[block].holders == 0:
            blocks[block].previous = last
            blocks[last].next = block
            last = block
            pool.free[0] += 1
    blocks[last].next = end
    blocks[end].previous = last


@inlined
def find(pool: Pool, key: np.uint64) -> int:
    """A block with the content `key`, -1 where there is none."""
    slots = pool.slots
    mask = len(slots) - 1
    at = np.int64(key & np.uint64(mask))
    while slots[at].key != np.uint64(0):
        if slots[at].key == key:
            return slots[at].block
        at = (at + 1) & mask
    return -1


@inlined
def name(pool: Pool, block: int, key: np.uint64) -> None:
    """Let `block` be found by the content `key`."""
    slots = pool.slots
    mask = len(slots) - 1
    at = np.int64(key & np.uint64(mask))
    while slots[at].key != np.uint64(0):
        at = (at + 1) & mask
    slots[at].key = key
    slots[at].block = block
    pool.blocks[block].key = key


@inlined
def _unlink(pool: Pool, block: int) -> None:
    """Take a block out of the queue."""
    blocks = pool.blocks
    before, after = blocks[block].previous, blocks[block].next
    blocks[before].next = after
    blocks[after].previous = before
    pool.free[0] -= 1


@compiled
def _forget(pool: Pool, block: int) -> None:
    """Let `block` not be found any more; what was put off its place by it moves up."""
    slots, key = pool.slots, pool.blocks[block].key
    pool.blocks[block].key = np.uint64(0)
    mask = len(slots) - 1
    hole = np.int64(key & np.uint64(mask))
    while slots[hole].key != key or slots[hole].block != block:
        hole = (hole + 1) & mask
    at = hole
    while True:
        at = (at + 1) & mask
        if slots[at].key == np.uint64(0):
            break
        home = np.int64(slots[at].key & np.uint64(mask))
        if ((at - home) & mask) >= ((at - hole) & mask):
            slots[hole].key, slots[hole].block = slots[at].key, slots[at].block
            hole = at
    slots[hole].key = np.uint64(0)
