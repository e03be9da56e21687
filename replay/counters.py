"""What the GPUs' energy counters gained while a run was measured."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from replay.clock import NS_PER_S
from replay.rundir import Run

_EDGE_NS = NS_PER_S // 5  # what a counter may miss at either edge of the window
Ints = npt.NDArray[np.int64]
Window = tuple[int, int]  # ns, from and to


@dataclass
class _Counter:
    """One GPU's energy counter: of its readings, only those kept that tell what it stood at when the run's edges were.

    Readings come in order of time, from batch to batch.
    """

    start_ns: int
    end_ns: int
    t_ns: list[Ints] = field(default_factory=list)
    energy_mj: list[Ints] = field(default_factory=list)
    last_mj: int = -1  # of the readings around the run
    fell_back: bool = False

    def add(self, t_ns: Ints, energy_mj: Ints) -> None:
        """More readings, at least one."""
        around = energy_mj[(t_ns >= self.start_ns - NS_PER_S) & (t_ns <= self.end_ns + NS_PER_S)]
        if around.size:
            self.fell_back |= bool((np.diff(around, prepend=self.last_mj) < 0).any())
            self.last_mj = int(around[-1])
        beyond = np.searchsorted(t_ns, [self.start_ns, self.end_ns])
        kept = np.unique(np.clip([0, *(beyond - 1), *beyond, t_ns.size - 1], 0, t_ns.size - 1))
        self.t_ns.append(t_ns[kept])
        self.energy_mj.append(energy_mj[kept])


def _counters(run: Run, gpus: list[int], stretches: list[Window]) -> dict[tuple[int, int], _Counter]:
    """The energy counters of `gpus` in each stretch, by GPU and the stretch's number."""
    counters = {(gpu, n): _Counter(*stretch) for gpu in gpus for n, stretch in enumerate(stretches)}
    # A reading belongs to the stretches next to it: between two, a counter may have begun anew.
    after = [0, *(end_ns for _, end_ns in stretches[:-1])]
    before = [*(start_ns for start_ns, _ in stretches[1:]), np.iinfo(np.int64).max]
    known = pl.col("gpu").is_in(gpus) & pl.col("energy_mj").is_not_null()
    for batch in run.batches("power", ["gpu", "t_ns", "energy_mj"]):
        for readings in batch.filter(known).sort("t_ns").partition_by("gpu"):
            t_ns, energy_mj = readings["t_ns"].to_numpy(), readings["energy_mj"].cast(pl.Int64).to_numpy()
            for n, (low_ns, high_ns) in enumerate(zip(after, before, strict=True)):
                near = (t_ns > low_ns) & (t_ns < high_ns)
                if near.any():
                    counters[readings["gpu"][0], n].add(t_ns[near], energy_mj[near])
    return counters


def counted_j(run: Run, gpus: list[int], stretches: list[Window]) -> tuple[float | None, str | None]:
    """What the energy counters of `gpus` gained in the `stretches` of a run, or why it is unknown.

    Readings before and after a stretch count too: between two readings a counter is taken as steady. A counter that
    fell back, or of which the readings do not reach a stretch's edges, tells nothing of the whole.
    """
    if not gpus or not run.has("power"):
        return None, "no power was read"
    gained_mj = 0.0
    for (gpu, n), counter in _counters(run, gpus, stretches).items():
        start_ns, end_ns = stretches[n]
        t_ns = np.concatenate([*counter.t_ns, np.zeros(0, np.int64)])
        if t_ns.size < 2:
            return None, f"GPU {gpu} has no energy counter that was read"
        if t_ns[0] - start_ns > _EDGE_NS or end_ns - t_ns[-1] > _EDGE_NS:
            since_s, until_s = (
                (min(max(t, start_ns), end_ns) - stretches[0][0]) / NS_PER_S for t in (t_ns[0], t_ns[-1])
            )
            return (
                None,
                f"the energy counter of GPU {gpu} was read from {since_s:.1f} s to {until_s:.1f} s of the run only",
            )
        if counter.fell_back:
            return None, f"the energy counter of GPU {gpu} fell back (wrap-around or reset)"
        start_mj, end_mj = np.interp([start_ns, end_ns], t_ns, np.concatenate(counter.energy_mj))
        gained_mj += end_mj - start_mj
    return float(gained_mj) / 1e3, None
