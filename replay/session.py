"""One run from beginning to end: the module that wires clocks, sampler, engine, dispatch and records together.

Order matters: clocks are locked before the server starts (no permission is an error before anything is launched), idle
power is measured with the model loaded and the clock locked, and whatever was started ends in reverse order on every
way out. Until the first request is due, an error leaves no run directory.
"""

import asyncio
import contextlib
import math
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import aiohttp
import polars as pl

from replay.caps import Caps
from replay.client import CompletionsClient, Record
from replay.clock import NS_PER_S, now_ns
from replay.dispatch import StallMeter, dispatch
from replay.engines.attach import AttachedEngine
from replay.engines.base import Engine, Served
from replay.engines.process import check_port, free_port
from replay.engines.sim import SimEngine
from replay.engines.vllm import VllmEngine
from replay.finish import finish_run
from replay.gpu.base import Gpus, open_gpus
from replay.gpu.baseline import idle_power_w
from replay.gpu.clocks import ClockLock, nearest_clock
from replay.gpu.sampler import Sampler
from replay.gpu.sim import SimBoard
from replay.live import Progress
from replay.manifest import anchor, first_manifest, host
from replay.metrics import scrape
from replay.plan import Plan, RunOptions, fit_lengths, make_plan
from replay.prompts import completion_body, prompt_ids
from replay.records import RecordStore
from replay.rundir import MANIFEST, scan_table, write_manifest
from replay.sim.hardware import Hardware, load_profile
from replay.watchers import background, no_garbage_collection, show
from tracegen.errors import GpuError, ReplayError, WattraceError
from tracegen.schema import read_metadata, write_trace

_LEAD_NS = NS_PER_S // 2  # between the decision to start and the first scheduled time
_SETTLE_NS = NS_PER_S // 2  # between the last work and the idle baseline
_REDRAW_S = 0.25
_EXIT_INTERRUPTED = 130
_BOARD = ".board"  # the simulated driver's file, for as long as the run lasts


@dataclass
class _State:
    """What is known of the run so far."""

    manifest: dict[str, Any]
    trace: pl.DataFrame
    cancel: asyncio.Task[Any] | None = None  # what the first Ctrl-C cancels
    interrupted: bool = False
    engine_died: bool = False
    gpu_spec: str | None = None
    locked_mhz: int | None = None
    failure: Exception | None = None  # what ended the run, beside an interruption or the engine's death
    late_ns: list[int] = field(default_factory=list)


async def run(options: RunOptions, progress: Progress) -> Path:
    """Replay `options.trace` and return the run directory.

    Raises a `WattraceError` when the run cannot be started, `KeyboardInterrupt` when a signal ends it before that; a
    run that was started is always written, and says in its manifest how it ended (`complete`, `interrupted` or
    `failed`) and what to think of it (`verdicts`).
    """
    plan = make_plan(options)
    run_id = os.urandom(8).hex()
    state = _State(manifest=first_manifest(plan, run_id), trace=plan.trace)
    state.cancel = asyncio.current_task()
    if plan.engine == "sim":
        progress.say(f"SIMULATED: {plan.why_engine}; power, step times and GPUs come from profile {options.profile}")
    else:
        progress.say(f"engine: {plan.engine} ({plan.why_engine})")
    made = _claim(plan.run_dir)
    write_manifest(plan.run_dir, state.manifest)
    started = False
    try:
        with _signals(state, progress):
            async with AsyncExitStack() as stack:
                engine, served, sampler = await _prepare(plan, state, stack, progress)
                started = True
                await _measure(plan, state, engine, served, sampler, progress)
            # The server and the sampler have ended: all tables are written.
            progress.status("writing tables")
            await asyncio.to_thread(finish_run, plan.run_dir, state.manifest, engine, state.late_ns)
    except BaseException as error:  # noqa: BLE001 - raised again, in one line where the disk is to blame
        if not started:
            _clear(plan, error, keep_folder=not made)
        if state.interrupted and isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from None
        raise _in_one_line(plan, state.failure or error) from None
    if state.failure is not None:
        raise _in_one_line(plan, state.failure)
    return plan.run_dir


def _claim(run_dir: Path) -> bool:
    """Make `run_dir` ours; whether the folder is new. Raises `ReplayError` when another run has it, or it cannot be."""
    made = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / MANIFEST).touch(exist_ok=False)
    except FileExistsError:
        raise ReplayError(f"{run_dir}: another run has just begun there; give another -o") from None
    except OSError as error:
        raise ReplayError(f"{run_dir}: cannot be made ({error.strerror}); give another -o") from None
    return made


def _in_one_line(plan: Plan, error: BaseException) -> BaseException:
    """A full or failing disk is nobody's bug; other errors stay what they are."""
    if not isinstance(error, OSError):
        return error
    what = "the run ended early; what was written before is there"
    return ReplayError(f"{plan.run_dir}: cannot be written ({error.strerror or error}); {what}, free some space first")


def _clear(plan: Plan, error: BaseException, *, keep_folder: bool) -> None:
    """Remove a run directory in which nothing was measured; a launched server's log is kept beside it."""
    log = plan.run_dir / "server.log"
    if plan.engine == "vllm" and isinstance(error, WattraceError) and log.is_file():
        kept = plan.run_dir.with_name(f"{plan.run_dir.name}.server.log")
        shutil.move(log, kept)
        error.args = (f"{error}; the whole log is in {kept}",)
    shutil.rmtree(plan.run_dir, ignore_errors=True)
    if keep_folder:  # the user made it
        plan.run_dir.mkdir(exist_ok=True)


@contextlib.contextmanager
def _signals(state: _State, progress: Progress) -> Any:
    """The first Ctrl-C (or SIGTERM) ends the run in order; the second at once.

    At once is safe: every child ends, and the clocks are given back, when our end of its pipe closes.
    """
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if state.interrupted:
            progress.__exit__(None, None, None)  # the terminal gets its cursor back
            os._exit(_EXIT_INTERRUPTED)
        state.interrupted = True
        if state.cancel is not None:
            state.cancel.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _prepare(
    plan: Plan, state: _State, stack: AsyncExitStack, progress: Progress
) -> tuple[Engine, Served, Sampler | None]:
    """Lock clocks, start sampler and server, measure idle power; everything is ended by `stack`."""
    options, run_dir = plan.options, plan.run_dir
    port = options.port or free_port()
    if options.port and plan.engine != "url":
        check_port(options.port)
    hardware = Hardware(load_profile(options.profile), plan.tp) if plan.engine == "sim" else None
    if hardware is not None:
        SimBoard.create(run_dir / _BOARD, hardware.profile, seed=options.seed).close()
        stack.callback((run_dir / _BOARD).unlink, missing_ok=True)
        state.gpu_spec = f"sim:{run_dir / _BOARD}"
    elif plan.gpus:
        state.gpu_spec = "nvml"
    sampler = None
    uuids: list[str] = []
    if state.gpu_spec is not None:
        gpus = open_gpus(state.gpu_spec)
        stack.callback(gpus.close)
        uuids = _describe_gpus(plan, state, gpus, progress)
        if state.locked_mhz is not None:
            await stack.enter_async_context(ClockLock(state.gpu_spec, plan.gpus, state.locked_mhz))
        indices = [entry["gpu"] for entry in state.manifest["gpus"]]
        sampler = await stack.enter_async_context(Sampler(state.gpu_spec, indices, run_dir, host()))
    engine = await stack.enter_async_context(_make_engine(plan, hardware, port, uuids, progress))
    served = await engine.ready()
    _take_served(plan, state, served, progress)
    if sampler is not None and not options.idle_ns:
        progress.say(
            "idle power is not measured (--idle 0): energy can be attributed only if the run has idle stretches"
        )
    if sampler is not None:
        _record_idle(plan, state, "idle_power_w", await _idle(options.idle_ns, sampler, progress, "before"))
    return engine, served, sampler


def _describe_gpus(plan: Plan, state: _State, gpus: Gpus, progress: Progress) -> list[str]:
    """Enter all GPUs of this host into the manifest, choose the clock; return the UUIDs of those that serve."""
    devices = {device.gpu: device for device in gpus.devices()}
    for gpu in plan.gpus:
        if gpu not in devices:
            raise GpuError(f"GPU {gpu} does not exist: this host has {len(devices)} (--tp {plan.tp}, --gpus)")
    state.manifest["gpus"] = [
        {
            "host": host(),
            "gpu": device.gpu,
            "uuid": device.uuid,
            "name": device.name,
            "sensors": {name: asdict(sensor) for name, sensor in gpus.sensors(device.gpu).items()},
        }
        for device in devices.values()
    ]
    asked = plan.options.freq_mhz
    if asked is not None:
        state.locked_mhz = nearest_clock(gpus, plan.gpus, asked)
        if state.locked_mhz != asked:
            progress.say(f"--freq {asked}: not a clock of this GPU; locking the nearest, {state.locked_mhz} MHz")
    state.manifest["instances"][0]["freq_mhz"] = state.locked_mhz
    return [devices[gpu].uuid for gpu in plan.gpus]


def _make_engine(plan: Plan, hardware: Hardware | None, port: int, uuids: Sequence[str], progress: Progress) -> Engine:
    """The engine that the plan names, not yet started."""
    options = plan.options
    if hardware is not None:
        return SimEngine(
            hardware, plan.gpus, plan.model or "", port, plan.run_dir / _BOARD, plan.run_dir,
            options.ready_timeout_s, progress.status,
        )  # fmt: skip
    if plan.engine == "vllm":
        return VllmEngine(
            plan.model or "", plan.tp, uuids, port, options.vllm_python, options.vllm_args,
            plan.run_dir / "server.log", options.ready_timeout_s, progress.status,
        )  # fmt: skip
    return AttachedEngine(options.engine, options.model, timeout_s=10.0)


def _take_served(plan: Plan, state: _State, served: Served, progress: Progress) -> None:
    """Fit the trace to the model that answered, and write what will be replayed."""
    state.trace, changed = fit_lengths(plan.trace, served.max_model_len, plan.options.overlong)
    if changed:
        done = {"drop": "dropped", "clip": "clipped"}[plan.options.overlong]
        progress.say(f"{done} {changed} requests longer than the model's {served.max_model_len} tokens")
        state.manifest["overlong"] = {"rule": plan.options.overlong, "requests": changed}
    write_trace(state.trace, plan.run_dir / "trace.parquet", read_metadata(plan.options.trace))
    if served.simulated:  # also when somebody else started it
        state.manifest["engine"] = "simulated"
        if plan.engine == "url":
            progress.say("SIMULATED: the server says that it is a simulated engine")
    state.manifest["instances"][0] |= {"model": served.model, "max_model_len": served.max_model_len}
    write_manifest(plan.run_dir, state.manifest)


async def _idle(length_ns: int, sampler: Sampler, progress: Progress, when: str) -> tuple[int, int]:
    """Let the engine idle for `length_ns`; the interval, all readings of which are written."""
    # Let power fall to idle, and the sensors' windows leave what was before.
    start_ns = now_ns() + (_SETTLE_NS if length_ns else 0)
    end_ns = start_ns + length_ns
    while (left_ns := end_ns - now_ns()) > 0:
        progress.status(f"measuring idle power {when} the run ({math.ceil(left_ns / NS_PER_S)} s)")
        await asyncio.sleep(min(_REDRAW_S, left_ns / NS_PER_S))
    await sampler.written_until(end_ns)
    return start_ns, end_ns


def _record_idle(plan: Plan, state: _State, key: str, interval: tuple[int, int]) -> None:
    """Enter the idle power of each GPU over `interval` into the manifest."""
    power = scan_table(plan.run_dir, "power").collect()
    for entry in state.manifest["gpus"]:
        entry[key] = idle_power_w(power, entry["gpu"], *interval)
    write_manifest(plan.run_dir, state.manifest)


async def _measure(
    plan: Plan, state: _State, engine: Engine, served: Served, sampler: Sampler | None, progress: Progress
) -> None:
    """Send the trace and wait for the answers; afterwards the manifest says how it ended."""
    options = plan.options
    store = RecordStore(plan.run_dir, save_chunks=options.save_chunks)
    epoch_ns = now_ns() + _LEAD_NS
    schedule_ns = (epoch_ns + state.trace["arrival_ns"]).to_list()
    state.manifest |= {"state": "running", "measure_start_ns": epoch_ns}
    state.manifest["clock_anchors"].append(anchor())
    write_manifest(plan.run_dir, state.manifest)
    stalls = StallMeter()
    # No limit: how many streams are open is the load's business. Idle connections are dropped before uvicorn, which
    # serves vLLM, closes them after 5 s: a request sent into that moment would fail for no fault of the server.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ttl_dns_cache=3600)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
        client = CompletionsClient(session, served.base_url, options.request_timeout_s)
        sending = asyncio.create_task(_send_all(plan, state, served, client, store, schedule_ns))
        state.cancel = sending
        watchers = [
            stalls.run(),
            store.flush_forever(),
            scrape(session, served.base_url, plan.run_dir, 0),
            _watch(engine, sending, state),
            show(schedule_ns, state.manifest["instances"][0]["gpus"], store, sampler, progress),
        ]
        try:
            with no_garbage_collection():
                async with background(watchers, sending):
                    with contextlib.suppress(asyncio.CancelledError):
                        await sending
            await store.flush()
        except Exception as error:  # noqa: BLE001 - raised again when what there is has been written
            state.failure = error
            with contextlib.suppress(OSError):  # a full disk stays full
                await store.flush()
    state.late_ns = stalls.late_ns
    whole = not (state.interrupted or state.engine_died or state.failure)
    state.manifest |= {
        "state": "finishing" if whole else "interrupted" if state.interrupted else "failed",
        "measure_end_ns": now_ns(),
        "requests": {"planned": state.trace.height, "sent": store.sent, "ended": store.ended},
    }
    state.manifest["clock_anchors"].append(anchor())
    write_manifest(plan.run_dir, state.manifest)
    state.cancel = None
    if sampler is None or not sampler.alive:
        return
    if not whole:
        await sampler.written_until(state.manifest["measure_end_ns"])
        return
    resting = asyncio.create_task(_idle(options.idle_ns, sampler, progress, "after"))
    state.cancel = resting
    try:
        _record_idle(plan, state, "idle_power_after_w", await resting)
    except asyncio.CancelledError:
        progress.say("interrupted: idle power after the run is not measured")


async def _send_all(
    plan: Plan, state: _State, served: Served, client: CompletionsClient, store: RecordStore, schedule_ns: list[int]
) -> None:
    """Dispatch every request at its time and wait for all answers; cancelled, abort what is in flight."""
    options, rows = plan.options, state.trace.rows(named=True)
    salt = int.from_bytes(blake2b(state.manifest["run_id"].encode(), digest_size=8).digest())
    caps = Caps(options.max_concurrency, options.max_rate_rps)

    def prepare(i: int) -> bytes:
        row = rows[i]
        ids = prompt_ids(
            salt, row["request_id"], row["input_tokens"], row.get("prefix_hashes") or (), plan.block_tokens
        )
        return completion_body(served.model, ids, row["output_tokens"], exact=options.exact)

    async def send(i: int, body: bytes) -> None:
        row = rows[i]
        record = Record(row["request_id"], 0, schedule_ns[i], row["output_tokens"])
        try:
            async with caps.open():
                store.start(record)
                await client.send(record, body)
        finally:
            store.end(record)

    await dispatch(schedule_ns, prepare, send)


async def _watch(engine: Engine, sending: asyncio.Task[None], state: _State) -> None:
    """End the sending when the server has died: nobody is left to answer."""
    while engine.alive():  # noqa: ASYNC110 - an attached server cannot tell us
        await asyncio.sleep(_REDRAW_S)
    state.engine_died = True
    sending.cancel()
    await asyncio.Event().wait()
