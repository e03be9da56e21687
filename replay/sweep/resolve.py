"""What a plan comes to on this machine: the engine, the tensor-parallel size, the clocks that the GPUs have."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from replay.engines.vllm import DEFAULT_MODEL
from replay.gpu.base import Gpus, open_gpus
from replay.gpu.settings import nearest_clock
from replay.plan import check_for_engine, check_values, choose_engine, simulated_profile, smallest_tp
from replay.sim.hardware import Hardware
from replay.sim.profile import Profile
from replay.sweep.plan import Grid, Setting, SweepPlan
from replay.sweep.ranges import unique
from tracegen.errors import ReplayError
from tracegen.workload import DEFAULT_RPS, PRODUCTION

_ENGINES = {"sim": "simulated", "vllm": "vllm", "url": "attached"}  # as manifests say it


@dataclass(frozen=True)
class Resolved:
    """A plan with nothing left open."""

    plan: SweepPlan
    engine: str  # simulated | vllm | attached
    model: str | None  # None: the only one that an attached server has
    profile: Profile | None  # of the simulated engine
    refused: Mapping[Setting, str]  # settings that cannot be, and why
    news: tuple[str, ...] = field(default=())  # what was changed


def resolve(plan: SweepPlan) -> Resolved:
    """Fill in what `plan` leaves open. Raises a `WattraceError` where no cell could run."""
    check_values(plan.run)
    if plan.trace is not None:  # wherever the sweep is gone on with from
        plan = replace(plan, trace=plan.trace.resolve())
    engine, _ = choose_engine(plan.run)
    profile = simulated_profile(plan.run) if engine == "sim" else None
    news: list[str] = []
    tp = len(plan.run.gpus or ()) // plan.run.replicas or (smallest_tp(profile) if profile else 1)
    with _gpus(plan, profile) as gpus:
        grids = tuple(_grid(grid, tp, plan, profile, gpus, news) for grid in plan.grids)
    plan = replace(plan, grids=grids)
    if engine == "url":
        _check_attached(plan)
    check_for_engine(plan.options(plan.cells()[0], Path(), Path()), engine, known_gpus=_known_gpus(plan, engine))
    refused = _refused(plan) if profile else {}
    if len(refused) == len(plan.settings()):
        raise ReplayError(f"no cell can run: {next(iter(refused.values()))}")
    model = plan.run.model or (profile.model_name if profile else DEFAULT_MODEL if engine == "vllm" else None)
    return Resolved(plan, _ENGINES[engine], model, profile, refused, tuple(unique(news)))


def _grid(grid: Grid, tp: int, plan: SweepPlan, profile: Profile | None, gpus: Gpus | None, news: list[str]) -> Grid:
    """`grid` with a TP, clocks that there are, and a rate where one must be chosen."""
    rates = grid.rate_rps
    if rates == (None,) and plan.mix is not None and plan.arrivals != PRODUCTION:
        rates = (DEFAULT_RPS,)
    clocks = []
    for asked in grid.freq_mhz:
        mhz = asked
        if asked is not None and gpus is not None:
            mhz = nearest_clock(gpus, plan.run.gpus or (0,), asked)
        if mhz != asked:
            merged = ", which is in the list already" if mhz in clocks or mhz in grid.freq_mhz else ""
            news.append(f"--freq {asked}: not a clock of this GPU; the nearest is {mhz} MHz{merged}")
        if profile is not None and mhz is not None and mhz > (held_mhz := profile.time.sustained_mhz):
            news.append(f"--freq {asked}: under load this GPU holds {held_mhz:.0f} MHz at most, which its verdict says")
        clocks.append(mhz)
    return replace(grid, tp=grid.tp or (tp,), rate_rps=rates, freq_mhz=unique(clocks))


@contextmanager
def _gpus(plan: SweepPlan, profile: Profile | None) -> Iterator[Gpus | None]:
    """The GPUs whose clocks are asked for; None where none is."""
    if all(mhz is None for grid in plan.grids for mhz in grid.freq_mhz):
        yield None
    elif profile is None:
        with closing(open_gpus("nvml")) as gpus:
            yield gpus
    else:
        from replay.gpu.sim import SimBoard

        with tempfile.TemporaryDirectory() as folder:
            board = Path(folder) / "board"
            SimBoard.create(board, profile).close()
            with closing(open_gpus(f"sim:{board}")) as gpus:
                yield gpus


def _refused(plan: SweepPlan) -> dict[Setting, str]:
    """The settings that the simulated node cannot have, and why."""
    refused = {}
    for setting in plan.settings():
        cap = () if setting.batch_cap is None else (f"--max-num-seqs={setting.batch_cap}",)
        options = replace(plan.run, vllm_args=(*plan.run.vllm_args, *cap), power_cap_w=setting.power_cap_w)
        try:
            profile = Hardware(simulated_profile(options), setting.tp).profile
        except ReplayError as error:
            refused[setting] = str(error)
            continue
        if (wanted := setting.tp * plan.run.replicas) > profile.gpus_per_node:
            refused[setting] = f"--tp {setting.tp} takes {wanted} GPUs, and the node has {profile.gpus_per_node}"
        elif plan.run.gpus is not None and len(plan.run.gpus) != wanted:
            refused[setting] = f"--tp {setting.tp} takes {wanted} GPUs, but --gpus names {len(plan.run.gpus)}"
    return refused


def _known_gpus(plan: SweepPlan, engine: str) -> bool:
    """Whether it is known which GPUs serve."""
    return engine != "url" or plan.run.gpus is not None


def _check_attached(plan: SweepPlan) -> None:
    """Raise `ReplayError` for settings that a server of somebody else's cannot be given."""
    settings = plan.settings()
    for name, values in (("--tp", {s.tp for s in settings}), ("--batch-cap", {s.batch_cap for s in settings} - {None})):
        if len(values) > (name == "--tp"):
            shown = ",".join(map(str, sorted(values)))  # type: ignore[type-var]
            raise ReplayError(
                f"{name} {shown} with a URL: that server was started by somebody else; sweep what can be set from "
                "outside (--freq, --power-cap, --rate), or let replay start it (--engine vllm or sim)"
            )
