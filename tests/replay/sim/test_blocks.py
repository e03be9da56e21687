"""The block pool is vLLM's: least recently used content is lost first, and keys are never confused."""

from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.sim.blocks import find, hold, make_pool, mix, name, release, take_free

BLOCKS = 6


class PlainPool:
    """The same rules without an eye on speed: a queue of free blocks, and the content of each."""

    def __init__(self):
        self.queue = deque(range(BLOCKS))
        self.content, self.holders = [None] * BLOCKS, [0] * BLOCKS

    def take_free(self):
        block = self.queue.popleft()
        self.content[block], self.holders[block] = None, 1
        return block

    def hold(self, block):
        if not self.holders[block]:
            self.queue.remove(block)
        self.holders[block] += 1

    def release(self, block, full):
        self.holders[block] -= 1
        if not self.holders[block]:
            (self.queue.append if full else self.queue.appendleft)(block)

    def having(self, key):
        return {block for block in range(BLOCKS) if self.content[block] == key}


def take_one(pool):
    table = np.zeros(1, np.int32)
    take_free(pool, table, 0, 1)
    return int(table[0])


# Few keys, and all with the same place in the table, so that they get in each other's way.
KEYS = [np.uint64(16 * i + 3) for i in range(1, 5)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "name", "hit", "release"]), st.integers(0, 99)), max_size=60))
def test_any_history_leaves_the_same_queue_and_the_same_contents(history):
    pool, plain = make_pool(BLOCKS), PlainPool()
    for what, pick in history:
        held = [block for block in range(BLOCKS) if plain.holders[block]]
        if what == "take" and plain.queue:
            assert take_one(pool) == plain.take_free()
        elif what == "name" and held and plain.content[held[pick % len(held)]] is None:
            block, key = held[pick % len(held)], KEYS[pick % len(KEYS)]
            name(pool, block, key)
            plain.content[block] = key
        elif what == "hit":
            block = find(pool, KEYS[pick % len(KEYS)])
            having = plain.having(KEYS[pick % len(KEYS)])
            assert (block in having) if having else (block == -1)
            if having:
                hold(pool, block)
                plain.hold(block)
        elif what == "release" and held:
            block, full = held[pick % len(held)], plain.content[held[pick % len(held)]] is not None
            release(pool, np.array([block], np.int32), 1, int(full))
            plain.release(block, full)
        assert int(pool.free[0]) == len(plain.queue)
        for key in KEYS:
            assert (find(pool, key) >= 0) == bool(plain.having(key))
    left = np.zeros(len(plain.queue), np.int32)
    take_free(pool, left, 0, left.size)
    assert left.tolist() == list(plain.queue)


def test_keys_of_different_contents_differ():
    keys = {int(mix(np.uint64(a), np.uint64(b))) for a in range(200) for b in range(200)}
    assert len(keys) == 200 * 200
    assert 0 not in keys
