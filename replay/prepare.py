"""From a plan to servers that are ready and idle: GPUs set, power sampled, engines started and warmed up.

Order matters: what is wrong with the GPUs, a port or the permission to set clocks is an error before anything is
launched; idle power is measured with the model loaded, warmed up and the clock locked. Everything that is started ends
with the caller's exit stack, in reverse order.
"""

import asyncio
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from replay.clock import NS_PER_S, now_ns
from replay.engines.attach import AttachedEngine
from replay.engines.base import Engine, Served
from replay.engines.kept import KeptServers
from replay.engines.process import check_port, free_port
from replay.engines.vllm import VllmEngine, VllmLaunch
from replay.gpu.base import Gpus, PowerSource, open_gpus, open_power
from replay.gpu.baseline import POWER_READ, idle_power_w
from replay.gpu.occupancy import check_free, check_whole
from replay.gpu.sampler import Sampler
from replay.gpu.sensor_profiles import known_sensors
from replay.gpu.settings import GpuSettings, check_power_cap, nearest_clock
from replay.live import Progress
from replay.manifest import host
from replay.plan import Plan
from replay.rundir import table_batches, write_manifest
from replay.steplog import StepFollower
from replay.summary import measured
from replay.warmup import warm_up
from tracegen.console import plural
from tracegen.durations import format_duration
from tracegen.errors import GpuError, ReplayError

if TYPE_CHECKING:  # the simulator's compiled loops take 70 MiB, which a real engine's load client does not need
    from replay.sim.hardware import Hardware

_SETTLE_NS = NS_PER_S // 2  # between the last work and the idle baseline
_REDRAW_S = 0.25
BOARD = ".board"  # the simulated driver's file, for as long as the run lasts
STEP_LOGS = ".steps"  # the step recorders' logs, likewise


@dataclass
class Prepared:
    """What a run measures with; `manifest` is the run's own and grows."""

    manifest: dict[str, Any]
    engines: list[Engine] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    followers: list[StepFollower] = field(default_factory=list)
    sampler: Sampler | None = None
    settings: GpuSettings | None = None
    locked_mhz: int | None = None
    servers: KeptServers | None = None  # that outlast the run: those of a sweep
    # Of a run that goes on: where each instance's steps' numbers begin, and what a simulated node's counters showed.
    first_steps: Mapping[int, int] = field(default_factory=dict)
    counters: Mapping[int, tuple[int, int]] = field(default_factory=dict)


async def prepare(plan: Plan, prepared: Prepared, stack: AsyncExitStack, progress: Progress) -> None:
    """Fill `prepared` up to servers that answer; `stack` ends what was started.

    Raises a `WattraceError` with what is wrong and what to do.
    """
    kept, home = prepared.servers, _home(plan, prepared)
    ports = [0] * len(plan.groups) if kept is not None and kept.started else _ports(plan)
    hardware = _hardware(plan)
    uuids = await _prepare_gpus(plan, prepared, hardware, stack, progress)
    for number, group in enumerate(plan.groups):
        ids = [uuids[gpu] for gpu in group] if uuids else []
        first_step = prepared.first_steps.get(number, 0)
        engine = _make_engine(plan, number, hardware, ports[number], ids, first_step, progress, home)
        if kept is not None:
            engine = kept.lend(number, engine, plan.run_dir)
        prepared.manifest["instances"][number]["command"] = engine.command
        prepared.engines.append(engine)
        await stack.enter_async_context(engine)
    prepared.served = list(await asyncio.gather(*(engine.ready() for engine in prepared.engines)))
    for entry, served in zip(prepared.manifest["instances"], prepared.served, strict=True):
        entry |= {"model": served.model, "max_model_len": served.max_model_len}
    if prepared.served[0].simulated:  # also when somebody else started it
        prepared.manifest["engine"] = "simulated"
        if plan.engine == "url":
            progress.say("SIMULATED: the server says that it is a simulated engine")
    await _follow_steps(plan, prepared, stack, progress)


def _hardware(plan: Plan) -> "Hardware | None":
    """What the simulated engine simulates; None where the engine is real."""
    if plan.profile is None:
        return None
    from replay.sim.hardware import Hardware

    return Hardware(plan.profile, plan.tp)


def idle_engine(plan: Plan, progress: Progress) -> Engine:
    """The plan's first engine, which is not to be started: what it has served is on record."""
    return _make_engine(plan, 0, _hardware(plan), 0, [], 0, progress, plan.run_dir)


def _home(plan: Plan, prepared: Prepared) -> Path:
    """Where what lasts as long as the servers is kept: their logs, a simulated driver's file."""
    return plan.run_dir if prepared.servers is None else prepared.servers.folder


def _ports(plan: Plan) -> list[int]:
    """A port for each instance: from --port on, or free ones."""
    if plan.engine == "url":
        return [0]
    if plan.options.port:
        ports = [plan.options.port + number for number in range(len(plan.groups))]
        for port in ports:
            check_port(port)
        return ports
    ports = []
    while len(ports) < len(plan.groups):
        if (port := free_port()) not in ports:
            ports.append(port)
    return ports


async def _prepare_gpus(
    plan: Plan, prepared: Prepared, hardware: "Hardware | None", stack: AsyncExitStack, progress: Progress
) -> dict[int, str]:
    """Describe, check and set the GPUs and start the sampler; UUIDs by index, empty where no GPU is known."""
    spec = _gpu_spec(plan, prepared, hardware, stack)
    if spec is None:
        if plan.options.with_cpu:
            raise ReplayError("--with-cpu goes with a power source: name the server's GPUs with --gpus")
        return {}
    power_spec = spec if plan.options.power == "nvml" else plan.options.power
    gpus = open_gpus(spec) if power_spec == spec else None
    source = open_power(power_spec) if gpus is None else gpus
    stack.callback(source.close)
    describe(plan, prepared, source)
    uuids = {entry["gpu"]: str(entry["uuid"]) for entry in prepared.manifest["gpus"]}
    if gpus is None and plan.engine == "vllm":
        gpus = open_gpus(spec)
        stack.callback(gpus.close)
    if gpus is not None:
        uuids = {device.gpu: device.uuid for device in gpus.devices()}
        _check_exists(plan, set(uuids))
        check_settings(plan, prepared, gpus, progress)
    if prepared.locked_mhz is not None or plan.options.power_cap_w is not None:
        prepared.settings = GpuSettings(spec, plan.gpus, prepared.locked_mhz, plan.options.power_cap_w)
        await stack.enter_async_context(prepared.settings)
    indices = [entry["gpu"] for entry in prepared.manifest["gpus"]]
    sampler = Sampler(power_spec, indices, plan.run_dir, host(), with_cpu=plan.options.with_cpu)
    prepared.sampler = await stack.enter_async_context(sampler)
    return uuids


def _gpu_spec(plan: Plan, prepared: Prepared, hardware: "Hardware | None", stack: AsyncExitStack) -> str | None:
    """Where the GPUs are found, as `open_gpus` takes it; None where they are not known."""
    if hardware is not None:
        board = _home(plan, prepared) / BOARD
        from replay.gpu.sim import SimBoard

        if prepared.servers is None or not prepared.servers.started:
            SimBoard.create(board, hardware.profile, seed=plan.options.seed, counters=prepared.counters).close()
        if prepared.servers is None:
            stack.callback(board.unlink, missing_ok=True)
        return f"sim:{board}"
    return "nvml" if plan.gpus else None


def describe(plan: Plan, prepared: Prepared, source: PowerSource) -> None:
    """Enter all GPUs of this host into the manifest."""
    devices = source.devices()
    _check_exists(plan, {device.gpu for device in devices})
    entries = []
    for device in devices:
        sensors, told_by = source.sensors(device.gpu), "the simulated board"
        if plan.engine != "sim":
            sensors, told_by = known_sensors(device, sensors)
        entries.append(
            {
                "host": host(),
                "gpu": device.gpu,
                "uuid": device.uuid,
                "name": device.name,
                "sensors": {name: asdict(sensor) for name, sensor in sensors.items()},
                "sensors_source": told_by,
            }
        )
    prepared.manifest["gpus"] = entries


def _check_exists(plan: Plan, known: set[int]) -> None:
    """Raise `GpuError` for a GPU that is not there."""
    missing = [gpu for gpu in plan.gpus if gpu not in known]
    if missing:
        if plan.options.power != "nvml":
            raise GpuError(
                f"--power {plan.options.power} tells of {len(known)} GPUs only, and --gpus names {missing[0]}"
            )
        asked = f"--tp {plan.tp}" + (f" --replicas {plan.options.replicas}" if plan.options.replicas > 1 else "")
        raise GpuError(f"GPU {missing[0]} does not exist: this host has {len(known)} ({asked}, --gpus)")


def check_settings(plan: Plan, prepared: Prepared, gpus: Gpus, progress: Progress) -> None:
    """Whether the GPUs are free and can be set as asked; which clock will be locked."""
    options, instances = plan.options, prepared.manifest["instances"]
    check_whole(gpus, plan.gpus)
    if (driver := gpus.driver_version()) is not None:
        prepared.manifest["versions"]["nvidia driver"] = driver
    if plan.engine == "vllm" and not (prepared.servers and prepared.servers.started):  # it would be our own server
        needs = None if plan.weights_mib is None else plan.weights_mib / plan.tp
        warnings = check_free(gpus, plan.gpus, options.allow_busy, needs)
        if warnings:
            prepared.manifest["gpus_shared_with"] = warnings
        for warning in warnings:
            progress.warn(warning)
    if options.freq_mhz is not None:
        prepared.locked_mhz = nearest_clock(gpus, plan.gpus, options.freq_mhz)
        if prepared.locked_mhz != options.freq_mhz:
            progress.say(
                f"--freq {options.freq_mhz}: not a clock of this GPU; locking the nearest, {prepared.locked_mhz} MHz"
            )
        if plan.profile is not None and prepared.locked_mhz > (held_mhz := plan.profile.time.sustained_mhz):
            progress.say(f"--freq {options.freq_mhz}: under load this GPU holds {held_mhz:.0f} MHz at most")
    if options.power_cap_w is not None:
        check_power_cap(gpus, plan.gpus, options.power_cap_w)
    for entry in instances:
        entry |= {"freq_mhz": prepared.locked_mhz, "power_cap_w": options.power_cap_w}


def _make_engine(
    plan: Plan,
    number: int,
    hardware: "Hardware | None",
    port: int,
    uuids: Sequence[str],
    first_step: int,
    progress: Progress,
    home: Path,
) -> Engine:
    """The engine that instance `number` of the plan is, not yet started; its log goes to `home`."""
    options, run_dir = plan.options, plan.run_dir
    log = home / ("server.log" if number == 0 else f"server-{number}.log")
    if hardware is not None:
        from replay.engines.sim import SimEngine

        return SimEngine(
            hardware, plan.groups[number], plan.model or "", port, home / BOARD, run_dir, number, log,
            options.ready_timeout_s, progress.status, vllm_args=options.vllm_args, power_cap_w=options.power_cap_w,
            first_step=first_step, record_root=None if home == run_dir else run_dir.parent,
        )  # fmt: skip
    if plan.engine == "vllm":
        steps = None if plan.no_steps else home / STEP_LOGS / str(number)
        launch = VllmLaunch(
            plan.model or "", plan.tp, tuple(uuids), port, options.vllm_python, options.vllm_args, log, steps
        )
        return VllmEngine(launch, options.ready_timeout_s, progress.status)
    return AttachedEngine(options.engine, options.model, 10.0, options.api_key, options.steps)


async def _follow_steps(plan: Plan, prepared: Prepared, stack: AsyncExitStack, progress: Progress) -> None:
    """Start to write the steps that vLLM's recorders log; say why where there are none."""
    fresh = plan.engine == "vllm" and (prepared.servers is None or prepared.servers.runs < 2)
    since_ns = 0 if fresh else now_ns()
    reasons = [plan.no_steps] if plan.engine == "vllm" and plan.no_steps else []
    if plan.engine == "url" and plan.options.steps is None:
        reasons.append("the server was not asked for them; see 'replay vllm-args'")
    for number, engine in enumerate(prepared.engines):
        if engine.step_log is not None:
            first_step, prefix = prepared.first_steps.get(number, 0), run_prefix(prepared.manifest)
            follower = StepFollower(engine.step_log, plan.run_dir, number, since_ns, prefix, first_step)
            prepared.followers.append(await stack.enter_async_context(follower))
            if follower.error is not None:
                if plan.options.steps is not None:
                    raise ReplayError(f"--steps {follower.error}")
                mine = "vLLM's step recorder wrote no log, see server.log"
                reasons.append(mine if not any(engine.step_log.glob("*")) else follower.error)
                continue
            found = follower.summary["engine"]["tensor_parallel_size"]
            if found != plan.tp:
                raise ReplayError(f"the server runs with tensor parallel size {found}, --tp or --gpus say {plan.tp}")
    if reasons:
        prepared.manifest["no_steps"] = reasons[0]
        progress.say(f"no engine steps: {reasons[0]}; who was in the engine when is told from client times")


def run_prefix(manifest: dict[str, Any]) -> str:
    """What the ids of this run's requests begin with on a server whose steps are recorded.

    There others may send requests too, and number them alike.
    """
    return str(manifest["run_id"][:8])


async def settle(plan: Plan, prepared: Prepared, progress: Progress, salt: int) -> None:
    """Warm the servers up and measure idle power."""
    if plan.warmups:
        progress.status(f"warming up with {plural(plan.warmups, 'request')} an instance")
        await warm_up(plan, prepared.served, salt)
        prepared.manifest["warmups"] = plan.warmups * len(prepared.served)
    if plan.options.warmup_ns and not measured(prepared.manifest, None):
        progress.say(f"what is due in the first {format_duration(plan.options.warmup_ns)} is sent, but not measured")
    if prepared.sampler is None:
        return
    if not plan.options.idle_ns:
        progress.say(
            "idle power is not measured (--idle 0): energy can be attributed only if the run has idle stretches"
        )
    await measure_idle(plan, prepared, progress, "before")
    if not all(engine.alive() for engine in prepared.engines):
        raise ReplayError("the server ended before the first request was sent")


async def measure_idle(plan: Plan, prepared: Prepared, progress: Progress, when: str) -> None:
    """Let the engines idle, and enter each GPU's power into the manifest; `when` is `before` or `after`."""
    sampler, length_ns = prepared.sampler, plan.options.idle_ns
    assert sampler is not None
    # Let power fall to idle, and the sensors' windows leave what was before.
    start_ns = now_ns() + (_SETTLE_NS if length_ns else 0)
    end_ns = start_ns + length_ns
    while (left_ns := end_ns - now_ns()) > 0:
        progress.status(f"measuring idle power {when} the run ({math.ceil(left_ns / NS_PER_S)} s)")
        await asyncio.sleep(min(_REDRAW_S, left_ns / NS_PER_S))
    await sampler.written_until(end_ns)
    window = pl.col("t_ns").is_between(start_ns, end_ns)
    power = pl.concat([rows.filter(window) for rows in table_batches(plan.run_dir, "power", POWER_READ)])
    key = {"before": "idle_power_w", "after": "idle_power_after_w"}[when]
    for entry in prepared.manifest["gpus"]:
        entry[key] = idle_power_w(power, entry["gpu"], start_ns, end_ns)
    write_manifest(plan.run_dir, prepared.manifest)


def clear_helpers(run_dir: Path) -> None:
    """Remove the recorders' logs, for what they say is in the tables, and a board that a kill left."""
    shutil.rmtree(run_dir / STEP_LOGS, ignore_errors=True)
    (run_dir / BOARD).unlink(missing_ok=True)
