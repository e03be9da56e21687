"""What a sweep is asked: the workload, the settings, the rates, the repeats, and what every cell shares."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from replay.plan import RunOptions
from replay.sweep.ranges import UNLOCKED
from tracegen.durations import NS_PER_S
from tracegen.errors import ReplayError

DEFAULT_DURATION_NS = 300 * NS_PER_S  # of a synthesized trace, as `tracegen synth` makes it
# By then the interval is a quarter of what it is after three repeats; more repeats hardly narrow it (t and 1/sqrt(n)).
MAX_REPEATS = 20
COOL_DOWN_MAX_NS = 300 * NS_PER_S


class Block(NamedTuple):
    """Cells that one server can serve one after the other."""

    tp: int
    batch_cap: int | None


class Setting(NamedTuple):
    """How a cell's server and GPUs are set."""

    tp: int
    freq_mhz: int | None  # None: the driver's own clocks
    batch_cap: int | None  # requests in a step at most (--max-num-seqs); None: the server's own
    power_cap_w: float | None  # of each GPU; None: the driver's own

    @property
    def block(self) -> Block:
        """What of it needs a server of its own."""
        return Block(self.tp, self.batch_cap)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    setting: Setting
    rate_rps: float | None  # None: the trace's own
    repeat: int

    @property
    def name(self) -> str:
        """Of its folder: `tp2-1200MHz-b32-500W-0.5rps-r0`."""
        tp, freq_mhz, batch_cap, power_cap_w = self.setting
        parts = [f"tp{tp}", UNLOCKED if freq_mhz is None else f"{freq_mhz}MHz"]
        parts += [] if batch_cap is None else [f"b{batch_cap}"]
        parts += [] if power_cap_w is None else [f"{power_cap_w:.12g}W"]
        return "-".join([*parts, self.trace_name])

    @property
    def trace_name(self) -> str:
        """Of the trace that it replays, without its ending."""
        return f"r{self.repeat}" if self.rate_rps is None else f"{self.rate_rps:.12g}rps-r{self.repeat}"


@dataclass(frozen=True)
class Grid:
    """Every combination of its values."""

    tp: tuple[int, ...] = ()  # empty: the one that `replay run` would take
    freq_mhz: tuple[int | None, ...] = (None,)
    rate_rps: tuple[float | None, ...] = (None,)
    batch_cap: tuple[int | None, ...] = (None,)
    power_cap_w: tuple[float | None, ...] = (None,)

    def settings(self) -> Iterator[Setting]:
        """Each setting."""
        for tp in self.tp:
            for batch_cap in self.batch_cap:
                for power_cap_w in self.power_cap_w:
                    for freq_mhz in self.freq_mhz:
                        yield Setting(tp, freq_mhz, batch_cap, power_cap_w)


@dataclass(frozen=True)
class SweepPlan:
    """Everything that a sweep can be asked; with the same plan the same cells follow."""

    grids: tuple[Grid, ...]
    trace: Path | None = None  # either a trace to bring to each rate
    mix: str | None = None  # or a mix to synthesize at each rate
    arrivals: str = "poisson"  # of the mix
    duration_ns: int | None = None  # of the mix: 5 minutes; of the trace: all of it
    seed: int = 0  # repeat r has seed + r
    repeats: int = 3
    until_ci: float | None = None  # add repeats until the 95 % interval is within this share of the mean
    max_repeats: int = MAX_REPEATS
    all_rates: bool = False  # also those above one at which a setting was saturated
    cool_down_max_ns: int = COOL_DOWN_MAX_NS  # between two cells, in wall time
    # What all cells share: their own trace, output, seed and settings take the place of these.
    run: RunOptions = field(default_factory=lambda: RunOptions(Path()))

    def __post_init__(self) -> None:
        """Raise `ReplayError` for what cannot be."""
        if (self.trace is None) is (self.mix is None):
            raise ReplayError("give either a trace to replay or --mix and a mix to synthesize")
        if self.mix is None and self.arrivals != SweepPlan.arrivals:
            raise ReplayError(f"--arrivals {self.arrivals}: a trace has its own arrivals; leave it out, or use --mix")
        for name, value, least in (
            ("--repeats", self.repeats, 1),
            ("--max-repeats", self.max_repeats, self.repeats),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ReplayError(f"{name} {value}: must be at least {least}")
        if self.until_ci is not None and not 0 < self.until_ci < 1:
            raise ReplayError(f"--until-ci {self.until_ci:.3%}: give a share of the mean above 0 % and below 100 %")
        if not self.grids:
            raise ReplayError("the plan has no [[grid]], so no cell; give one with tp, freq or rate")

    @property
    def virtual(self) -> bool:
        """Whether cells run in virtual time."""
        return self.run.virtual

    def rates(self) -> tuple[float | None, ...]:
        """Every rate that a cell has, lowest first; None: the trace's own."""
        return tuple(sorted({rate for grid in self.grids for rate in grid.rate_rps}, key=lambda rate: rate or 0.0))

    def settings(self) -> tuple[Setting, ...]:
        """Every setting once, in the order of the grids."""
        return tuple(dict.fromkeys(setting for grid in self.grids for setting in grid.settings()))

    def cells(self) -> list[Cell]:
        """Every cell once, in the order of the grids; `replay.sweep.order` says which comes when."""
        found = [
            Cell(setting, rate_rps, repeat)
            for grid in self.grids
            for setting in grid.settings()
            for rate_rps in grid.rate_rps
            for repeat in range(self.repeats)
        ]
        return list(dict.fromkeys(found))

    def options(self, cell: Cell, trace: Path, output: Path) -> RunOptions:
        """What `replay run` is asked for `cell`."""
        tp, freq_mhz, batch_cap, power_cap_w = cell.setting
        cap = () if batch_cap is None else (f"--max-num-seqs={batch_cap}",)
        return replace(
            self.run,
            trace=trace,
            output=output,
            tp=tp,
            freq_mhz=freq_mhz,
            power_cap_w=power_cap_w,
            truth=bool(self.run.truth),
            vllm_args=(*self.run.vllm_args, *cap),
            seed=self.seed + cell.repeat,
            metadata={**self.run.metadata, "cell": cell.name},
        )


def difference(asked: SweepPlan, stored: SweepPlan) -> str | None:
    """In words, the first thing in which `asked` is not `stored`; None where they are the same."""
    for what, one, other in _pairs(asked, stored):
        if one != other:
            return f"{what} is {_shown(one)}, and was {_shown(other)}"
    return None


def _pairs(asked: SweepPlan, stored: SweepPlan) -> Iterator[tuple[str, Any, Any]]:
    """What is compared, by name."""
    for entry in fields(SweepPlan):
        name, one, other = entry.name, getattr(asked, entry.name), getattr(stored, entry.name)
        if name == "grids" and len(one) == len(other):
            for number, grids in enumerate(zip(one, other, strict=True)):
                where = f" of grid {number + 1}" if len(one) > 1 else ""
                for of in fields(Grid):
                    yield f"{of.name}{where}", *(getattr(grid, of.name) for grid in grids)
        elif name == "run":
            for of in fields(RunOptions):
                if of.name != "api_key":  # never written down
                    yield of.name, *(getattr(run, of.name) for run in (one, other))
        else:
            yield name, one, other


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(
            UNLOCKED if one is None else f"{one:.12g}" if isinstance(one, float) else str(one) for one in value
        )
    return str(value)
