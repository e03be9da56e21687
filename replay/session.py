"""One run from beginning to end: the module that wires clocks, sampler, engine, dispatch and records together.

Whatever was started ends in reverse order on every way out. Until the first request is due, an error leaves no run
directory.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import aiohttp
import polars as pl

from replay.caps import Caps
from replay.client import CompletionsClient, Record
from replay.clock import NS_PER_S, now_ns
from replay.dispatch import StallMeter, dispatch
from replay.engines.attach import bearer
from replay.engines.base import Engine
from replay.finish import finish_run
from replay.live import Progress
from replay.manifest import anchor, first_manifest
from replay.metrics import scrape
from replay.plan import LEAST_LOADED, Plan, Router, RunOptions, fit_lengths, make_plan
from replay.prepare import Prepared, clear_step_logs, measure_idle, prepare, run_prefix, settle
from replay.prompts import completion_body, prompt_ids
from replay.records import RecordStore
from replay.rundir import MANIFEST, write_manifest
from replay.watchers import background, no_garbage_collection, show, warn_of_gpus
from tracegen.errors import ReplayError, WattraceError
from tracegen.schema import read_metadata, write_trace

_LEAD_NS = NS_PER_S // 2  # between the decision to start and the first scheduled time
_WATCH_S = 0.25
_EXIT_INTERRUPTED = 130


@dataclass
class _State:
    """What is known of the run so far."""

    prepared: Prepared
    trace: pl.DataFrame
    cancel: asyncio.Task[Any] | None = None  # what the first Ctrl-C cancels
    interrupted: bool = False
    engine_died: bool = False
    failure: Exception | None = None  # what ended the run, beside an interruption or the engine's death
    late_ns: list[int] = field(default_factory=list)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands."""
        return self.prepared.manifest


async def run(options: RunOptions, progress: Progress) -> Path:
    """Replay `options.trace` and return the run directory.

    Raises a `WattraceError` when the run cannot be started, `KeyboardInterrupt` when a signal ends it before that; a
    run that was started is always written, and says in its manifest how it ended (`complete`, `interrupted` or
    `failed`) and what to think of it (`verdicts`).
    """
    plan = await asyncio.to_thread(make_plan, options)
    state = _State(Prepared(first_manifest(plan, os.urandom(8).hex())), plan.trace, asyncio.current_task())
    if plan.profile is not None:
        progress.say(f"SIMULATED: {plan.why_engine}; power, step times and GPUs are computed: {plan.profile.name}")
        for line in plan.profile.assumed:
            progress.say(f"  {line}")
    else:
        progress.say(f"engine: {plan.engine} ({plan.why_engine}){_takes(plan)}")
    made = claim(plan.run_dir)
    write_manifest(plan.run_dir, state.manifest)
    started = False
    try:
        with _signals(state, progress):
            async with AsyncExitStack() as stack:
                await prepare(plan, state.prepared, stack, progress)
                _fit(plan, state, progress)
                await settle(plan, state.prepared, progress, _salt(state))
                started = True
                await _measure(plan, state, progress)
            # The servers, the sampler and who follows the steps have ended: all tables are written.
            progress.status("writing tables")
            _end_of_helpers(plan, state, progress)
            await asyncio.to_thread(finish_run, plan.run_dir, state.manifest, state.prepared.engines[0], state.late_ns)
    except BaseException as error:  # noqa: BLE001 - raised again, in one line where the disk is to blame
        if not started:
            clear(plan, error, keep_folder=not made)
        if state.interrupted and isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from None
        raise _in_one_line(plan, state.failure or error) from None
    if state.failure is not None:
        raise _in_one_line(plan, state.failure)
    return plan.run_dir


def claim(run_dir: Path) -> bool:
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


def clear(plan: Plan, error: BaseException, *, keep_folder: bool) -> None:
    """Remove a run directory in which nothing was measured; launched servers' logs are kept beside it."""
    kept = []
    for log in sorted(plan.run_dir.glob("server*.log")):
        if plan.engine == "vllm" and isinstance(error, WattraceError):
            kept.append(plan.run_dir.with_name(f"{plan.run_dir.name}.{log.name}"))
            shutil.move(log, kept[-1])
    if kept:
        error.args = (f"{error}; the whole log is in {', '.join(map(str, kept))}",)
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
        progress.say("stopping in order; Ctrl-C again ends at once")
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


def _takes(plan: Plan) -> str:
    """What the run takes, for the first line."""
    model = f"; {plan.model}" if plan.model else ""
    gpus = f"; TP {plan.tp} on GPUs {','.join(map(str, plan.gpus))}" if plan.gpus else ""
    clock = f"; {plan.options.freq_mhz} MHz" if plan.options.freq_mhz else "; clocks as they are"
    return model + gpus + (clock if plan.gpus else "")


def _salt(state: _State) -> int:
    """What makes this run's prompts its own."""
    return int.from_bytes(blake2b(state.manifest["run_id"].encode(), digest_size=8).digest())


def _fit(plan: Plan, state: _State, progress: Progress) -> None:
    """Fit the trace to the model that answered, and write what will be replayed."""
    limit = state.prepared.served[0].max_model_len
    state.trace, changed = fit_lengths(plan.trace, limit, plan.options.overlong)
    if changed:
        done = {"drop": "dropped", "clip": "clipped"}[plan.options.overlong]
        progress.say(f"{done} {changed} requests longer than the model's {limit} tokens")
        state.manifest["overlong"] = {"rule": plan.options.overlong, "requests": changed}
    write_trace(state.trace, plan.run_dir / "trace.parquet", read_metadata(plan.options.trace))
    write_manifest(plan.run_dir, state.manifest)


def _end_of_helpers(plan: Plan, state: _State, progress: Progress) -> None:
    """Note what the processes beside the run said at their end."""
    instances = state.manifest["instances"]
    for entry, follower in zip(instances, state.prepared.followers, strict=False):
        if follower.error is None:
            entry["recorder"] = follower.summary
        elif "no_steps" not in state.manifest:
            state.manifest["no_steps"] = follower.error
            progress.warn(f"engine steps are not whole: {follower.error}")
    clear_step_logs(plan.run_dir)
    settings = state.prepared.settings
    if settings is not None and settings.not_restored is not None:
        state.manifest["not_restored"] = settings.not_restored
        progress.warn(f"{settings.not_restored}; see 'replay clocks show' and 'replay clocks reset'")


async def _measure(plan: Plan, state: _State, progress: Progress) -> None:
    """Send the trace and wait for the answers; afterwards the manifest says how it ended."""
    options, prepared = plan.options, state.prepared
    store = RecordStore(plan.run_dir, save_chunks=options.save_chunks)
    epoch_ns = now_ns() + _LEAD_NS
    schedule_ns = (epoch_ns + state.trace["arrival_ns"]).to_list()
    state.manifest.update({"state": "running", "measure_start_ns": epoch_ns})
    state.manifest["clock_anchors"].append(anchor())
    write_manifest(plan.run_dir, state.manifest)
    stalls = StallMeter()
    # No limit: how many streams are open is the load's business. Idle connections are dropped before uvicorn, which
    # serves vLLM, closes them after 5 s: a request sent into that moment would fail for no fault of the server.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ttl_dns_cache=3600)
    key = bearer(prepared.served[0].api_key)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(), headers=key) as session:
        sending = asyncio.create_task(_send_all(plan, state, session, store, schedule_ns))
        state.cancel = sending
        watchers = [
            stalls.run(),
            store.flush_forever(),
            *(scrape(session, s.base_url, plan.run_dir, i) for i, s in enumerate(prepared.served)),
            _watch(prepared.engines, sending, state),
            show(schedule_ns, plan.gpus, store, prepared.sampler, progress),
            warn_of_gpus(prepared.sampler, plan.gpus, prepared.locked_mhz, progress),
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
    ended = {
        "state": "finishing" if whole else "interrupted" if state.interrupted else "failed",
        "measure_end_ns": max(now_ns(), epoch_ns + 1),
        "requests": {"planned": state.trace.height, "sent": store.sent, "ended": store.ended},
    }
    state.manifest.update(ended)
    if state.engine_died:
        state.manifest["failure"] = "the server ended while requests were sent; see server.log"
        progress.warn(state.manifest["failure"])
    state.manifest["clock_anchors"].append(anchor())
    write_manifest(plan.run_dir, state.manifest)
    state.cancel = None
    sampler = prepared.sampler
    if sampler is None or not sampler.alive:
        return
    if not whole:
        await sampler.written_until(state.manifest["measure_end_ns"])
        return
    resting = asyncio.create_task(measure_idle(plan, prepared, progress, "after"))
    state.cancel = resting
    try:
        await resting
    except asyncio.CancelledError:
        progress.say("interrupted: idle power after the run is not measured")


async def _send_all(
    plan: Plan, state: _State, session: aiohttp.ClientSession, store: RecordStore, schedule_ns: list[int]
) -> None:
    """Dispatch every request at its time and wait for all answers; cancelled, abort what is in flight."""
    options, served, rows = plan.options, state.prepared.served, state.trace.rows(named=True)
    salt, routes = _salt(state), Router(options.router, len(served)).assign(state.trace).tolist()
    in_flight = [0] * len(served)
    clients = [CompletionsClient(session, server.base_url, options.request_timeout_s) for server in served]
    caps = Caps(options.max_concurrency, options.max_rate_rps)
    prefix = run_prefix(state.manifest) if state.prepared.followers else ""

    def prepare_body(i: int) -> bytes:
        row = rows[i]
        ids = prompt_ids(
            salt, row["request_id"], row["input_tokens"], row.get("prefix_hashes") or (), plan.block_tokens
        )
        priority = row.get("priority") or 0
        return completion_body(served[0].model, ids, row["output_tokens"], exact=options.exact, priority=priority)

    async def send(i: int, body: bytes) -> None:
        row = rows[i]
        instance = in_flight.index(min(in_flight)) if routes[i] == LEAST_LOADED else routes[i]
        record = Record(row["request_id"], instance, schedule_ns[i], row["output_tokens"])
        in_flight[instance] += 1
        try:
            async with caps.open():
                store.start(record)
                await clients[instance].send(record, body, f"{prefix}-{record.request_id}" if prefix else None)
        finally:
            in_flight[instance] -= 1
            store.end(record)

    await dispatch(schedule_ns, prepare_body, send)


async def _watch(engines: list[Engine], sending: asyncio.Task[None], state: _State) -> None:
    """End the sending when a server has died: nobody is left to answer for it."""
    while all(engine.alive() for engine in engines):  # noqa: ASYNC110 - an attached server cannot tell us
        await asyncio.sleep(_WATCH_S)
    state.engine_died = True
    sending.cancel()
    await asyncio.Event().wait()
