"""Conservation: the window is cut into blocks, and in each the model is made to agree with what was measured.

Blocks are tens of seconds long and cut at idle stretches where there are any, so that a meter's error of one update at
a cut stays below a thousandth of a block. A longer idle stretch is a block of its own: what idle power really was there
(in the pause of a run that was resumed, with the model unloaded) is no matter of the steps beside it. The discrepancy
between model and meter is spread over idle and steps by variance: `(idle_se_w * idle seconds)²` against
`(model's relative misfit * steps' energy)²`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.kernels import compiled
from analysis.load import Floats
from analysis.model import TINY
from analysis.steps import Ints, Steps

SHORTEST_S, USUAL_S, LONGEST_S = 10.0, 20.0, 40.0
CUT_IDLE_S = 0.25  # an idle stretch long enough to cut in: two updates of the sensor
LEAST_MISFIT = 1e-3  # no model is trusted further than this


@dataclass(frozen=True)
class Blocks:
    """Cuts of the window (m + 1), the first step of each block (m + 1, the last entry is n), and each step's block."""

    cuts_s: Floats
    first: Ints
    block: Ints  # (n,)

    def __len__(self) -> int:
        return int(self.cuts_s.size) - 1

    def sums(self, values: Floats) -> Floats:
        """Sum of the steps' `values` in each block."""
        return np.bincount(self.block, weights=values, minlength=len(self)).astype(np.float64)


@dataclass(frozen=True)
class Balance:
    """What was measured, and how it falls on idle time and steps; measured = idle + steps, block by block."""

    measured_j: Floats  # (m,)
    idle_j: Floats  # (m,)
    step_j: Floats  # (n,)


def cut_times(start_s: Floats, end_s: Floats, begin_s: float, until_s: float, *, final: bool) -> Floats:
    """Cuts from `begin_s` on in idle stretches, or else between steps of `start_s` to `end_s`.

    `final`: nothing follows, and the last cut is `until_s`. Else it is the last one that what follows cannot move; a
    stretch without steps can be cut wherever it ends.
    """
    if start_s.size == 0:
        return np.array([begin_s, until_s] if until_s > begin_s else [begin_s])
    gap_s = start_s[1:] - end_s[:-1]
    idle_s = ((start_s[1:] + end_s[:-1]) / 2)[gap_s > CUT_IDLE_S]
    rests = _rests(start_s, end_s, begin_s, until_s, final=final)
    # What follows may be a long rest, whose beginning is a cut.
    last_s = until_s - SHORTEST_S / 2 if final else min(until_s - LONGEST_S, float(end_s[-1]) - SHORTEST_S / 2)
    cuts_s = _cuts(idle_s, start_s, *rests, begin_s, until_s, last_s)
    return np.append(cuts_s, until_s) if final and until_s > cuts_s[-1] else cuts_s


def _rests(start_s: Floats, end_s: Floats, begin_s: float, until_s: float, *, final: bool) -> tuple[Floats, Floats]:
    """Idle stretches longer than blocks usually are: from a moment behind a step, and to one before a step."""
    behind_s = np.concatenate([[begin_s - CUT_IDLE_S / 2], end_s])
    before_s = np.concatenate([start_s, [until_s + CUT_IDLE_S / 2 if final else -np.inf]])
    long = before_s - behind_s > USUAL_S + CUT_IDLE_S
    return behind_s[long] + CUT_IDLE_S / 2, before_s[long] - CUT_IDLE_S / 2


@compiled
def _cuts(
    idle_s: Floats,
    start_s: Floats,
    rest_from_s: Floats,
    rest_to_s: Floats,
    begin_s: float,
    until_s: float,
    last_s: float,
) -> Floats:
    """Cuts up to `last_s`: at both ends of every rest, else in the next idle stretch at a fair distance from the last.

    Where there is none, at the next step's start.
    """
    cuts_s = np.empty(int((until_s - begin_s) / SHORTEST_S) + 2 * rest_from_s.size + 2)
    cuts_s[0] = begin_s
    count, i, k, rest = 1, 0, 0, 0
    while True:
        cut_s = np.inf
        if until_s - cuts_s[count - 1] > USUAL_S:
            while i < idle_s.size and idle_s[i] < cuts_s[count - 1] + SHORTEST_S:
                i += 1
            while k < start_s.size and start_s[k] < cuts_s[count - 1] + USUAL_S:
                k += 1
            idle, step = idle_s[i] if i < idle_s.size else np.inf, start_s[k] if k < start_s.size else np.inf
            cut_s = idle if idle < cuts_s[count - 1] + LONGEST_S else min(idle, step)
        if rest < rest_from_s.size and cut_s > rest_from_s[rest] - SHORTEST_S / 2:
            for edge_s in (rest_from_s[rest], rest_to_s[rest]):
                if edge_s > cuts_s[count - 1]:
                    cuts_s[count] = edge_s
                    count += 1
            rest += 1
        elif cut_s > last_s:
            return cuts_s[:count].copy()
        else:
            cuts_s[count] = cut_s
            count += 1


def cut_blocks(steps: Steps, duration_s: float) -> Blocks:
    """Cut `[0, duration_s]` in idle stretches, or else between steps."""
    start_s, end_s = np.clip(steps.start_s, 0, duration_s), np.clip(steps.end_s, 0, duration_s)
    return blocks_between(start_s, end_s, cut_times(start_s, end_s, 0.0, duration_s, final=True))


def blocks_between(start_s: Floats, end_s: Floats, cuts_s: Floats) -> Blocks:
    """The blocks between `cuts_s`, of steps all of which are in one of them."""
    inner = np.searchsorted((start_s + end_s) / 2, cuts_s[1:-1], side="left")
    first = np.concatenate([[0], inner, [start_s.size]]).astype(np.int64)[-cuts_s.size :]
    return Blocks(cuts_s, first, np.repeat(np.arange(first.size - 1), np.diff(first)))


@dataclass(frozen=True)
class Expected:
    """What idle power and the model expect of each block; arrays (m,)."""

    idle_s: Floats
    idle_j: Floats
    busy_j: Floats


def expect(blocks: Blocks, steps: Steps, modelled_j: Floats, idle_w: Callable[[Floats], Floats]) -> Expected:
    """Sum up `modelled_j` (n,) by block, and idle power over the time that is left of it."""
    begin_s, until_s = float(blocks.cuts_s[0]), float(blocks.cuts_s[-1])
    inside_s = np.clip(steps.end_s, begin_s, until_s) - np.clip(steps.start_s, begin_s, until_s)
    idle_s = np.maximum(np.diff(blocks.cuts_s) - blocks.sums(inside_s), 0.0)
    idle_s[idle_s < 1e-9] = 0.0  # what rounding leaves of a block without a gap
    idle_j = idle_w((blocks.cuts_s[1:] + blocks.cuts_s[:-1]) / 2) * idle_s
    return Expected(idle_s, idle_j, blocks.sums(modelled_j))


def balance(
    blocks: Blocks, expected: Expected, modelled_j: Floats, measured_j: Floats, idle_se_w: float, misfit_rel: float
) -> Balance:
    """Make `modelled_j` (n,) and idle power agree with `measured_j` (m,) in every block, nothing below zero."""
    idle_s, idle_j, busy_j = expected.idle_s, expected.idle_j, expected.busy_j
    variance_idle, variance_busy = (idle_se_w * idle_s) ** 2, (max(misfit_rel, LEAST_MISFIT) * busy_j) ** 2
    whole = variance_idle + variance_busy
    part = np.divide(variance_idle, whole, out=np.zeros_like(whole), where=whole > 0)
    idle_j = np.clip(idle_j + part * (measured_j - idle_j - busy_j), 0.0, measured_j)
    idle_j = np.where(busy_j > 0, np.where(idle_s > 0, idle_j, 0.0), measured_j)
    factor = np.divide(measured_j - idle_j, busy_j, out=np.zeros_like(busy_j), where=busy_j > 0)
    return Balance(measured_j, idle_j, modelled_j * factor[blocks.block])


def misfit(measured_j: Floats, modelled_j: Floats) -> float:
    """Rms over blocks of measured over modelled, minus 1, weighted by energy, of those that are mostly busy."""
    busy = modelled_j > 0.05 * modelled_j.max(initial=TINY)
    if not busy.any():
        return 0.0
    ratio = measured_j[busy] / modelled_j[busy] - 1.0
    return float(np.sqrt(np.average(ratio**2, weights=modelled_j[busy])))
