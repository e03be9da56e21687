"""In which order cells run: blocks of one server each in random order, cells random within a block.

Drift, as of a room that warms up, then falls on all settings alike; the same seed gives the same order.
"""

from collections.abc import Sequence

from replay.sweep.plan import Block, Cell
from tracegen.streams import random_stream


def blocks_in_order(cells: Sequence[Cell], seed: int) -> dict[Block, list[Cell]]:
    """The blocks of `cells` in the order in which they run, and their cells in theirs."""
    blocks: dict[Block, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.name):  # however the plan was written
        blocks.setdefault(cell.setting.block, []).append(cell)
    names = list(blocks)
    stream = random_stream(seed, "order of a sweep")
    shuffled = [names[i] for i in stream.permutation(len(names))]
    return {name: [blocks[name][i] for i in stream.permutation(len(blocks[name]))] for name in shuffled}
