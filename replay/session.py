"""One run from beginning to end: the module that wires clocks, sampler, engine, dispatch and records together.

Whatever was started ends in reverse order on every way out. Until the first request is due, an error leaves no run
directory.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import aiohttp

from replay.clock import NS_PER_S, now_ns
from replay.cut import Due, Load, check_descriptors, cut, worker_count
from replay.engines.attach import bearer
from replay.engines.base import Engine
from replay.engines.kept import KeptServers
from replay.finish import finish_killed, finish_run
from replay.hold import hold
from replay.live import Progress
from replay.manifest import anchor, first_manifest, host
from replay.metrics import scrape
from replay.plan import Plan, RunOptions, make_plan
from replay.prepare import Prepared, clear_helpers, idle_engine, measure_idle, prepare, run_prefix, settle
from replay.records import RecordStore, check_space, reserve, sent_again_early
from replay.resume import TakenUp, begin_stretch, end_stretch, resumed_options, take_up
from replay.router import Router
from replay.rundir import MANIFEST, write_manifest
from replay.source import Survey, TraceSource
from replay.watchers import background, show, warn_of_gpus, warn_of_server
from replay.workers import LoadWorkers, yielding
from replay.workload import Config, plain_http, through_proxies
from tracegen.console import note, plural
from tracegen.errors import ReplayError, WattraceError

_LEAD_NS = NS_PER_S // 2  # between the decision to start and the first scheduled time
_WATCH_S = 0.25
_EXIT_INTERRUPTED = 130


@dataclass
class _State:
    """What is known of the run so far."""

    prepared: Prepared
    survey: Survey  # of what is sent
    cancel: asyncio.Task[Any] | None = None  # what the first Ctrl-C cancels
    interrupted: bool = False
    engine_died: bool = False
    failure: Exception | None = None  # what ended the run, beside an interruption or the engine's death
    late_ns: Sequence[int] = ()
    taken: TakenUp | None = None  # the run that goes on
    due: Due = field(default_factory=lambda: Due(0))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands."""
        return self.prepared.manifest


async def run(options: RunOptions, progress: Progress, servers: KeptServers | None = None) -> Path:
    """Replay `options.trace` and return the run directory.

    `servers` are started by the first run that they are given to, and go on after it.

    Raises a `WattraceError` when the run cannot be started, `KeyboardInterrupt` when a signal ends it before that; a
    run that was started is always written, and says in its manifest how it ended (`complete`, `interrupted` or
    `failed`) and what to think of it (`verdicts`).
    """
    if options.resume is not None:
        options = resumed_options(options)
        if options.resume is None:
            progress.say(f"{options.output}: was killed before a request was due; it begins anew")
    plan = await asyncio.to_thread(make_plan, options)
    _check_load(plan)
    state = _State(
        Prepared(first_manifest(plan, os.urandom(8).hex()), servers=servers), plan.survey, asyncio.current_task()
    )
    if plan.profile is not None:
        progress.say(f"SIMULATED: {plan.why_engine}; power, step times and GPUs are computed: {plan.profile.name}")
        for line in plan.profile.assumed:
            progress.say(f"  {line}")
    else:
        progress.say(f"engine: {plan.engine} ({plan.why_engine}){_takes(plan)}")
    made = options.resume is None and claim(plan.run_dir)
    with hold(plan.run_dir):
        if options.resume is not None:
            state.taken = taken = await asyncio.to_thread(take_up, plan.run_dir)
            progress.say(taken.news)
            if not taken.remaining.requests:
                await asyncio.to_thread(finish_killed, plan.run_dir, taken.manifest, idle_engine(plan, progress))
                return plan.run_dir
            fresh = taken.goes_on(state.manifest)
            state.prepared = Prepared(fresh, first_steps=taken.first_steps, counters=taken.counters)
        write_manifest(plan.run_dir, state.manifest)
        await _carry_out(plan, state, progress, keep_folder=not made)
    return plan.run_dir


async def _carry_out(plan: Plan, state: _State, progress: Progress, *, keep_folder: bool) -> None:
    """Prepare, measure and finish; until the first request is due an error leaves things as they were."""
    started = False
    try:
        with _signals(state, progress):
            async with AsyncExitStack() as stack:
                await prepare(plan, state.prepared, stack, progress)
                _fit(plan, state, progress)
                await settle(plan, state.prepared, progress, _salt(state))
                if state.taken is not None:
                    state.taken.keep_idle(state.manifest)
                workers = await stack.enter_async_context(LoadWorkers(_cut(plan, state)))
                started = True
                await _measure(plan, state, workers, progress)
            # The servers, the sampler and who follows the steps have ended: all tables are written.
            progress.status("writing tables")
            _end_of_helpers(plan, state, progress)
            await asyncio.to_thread(finish_run, plan.run_dir, state.manifest, state.prepared.engines[0], state.late_ns)
    except BaseException as error:  # noqa: BLE001 - raised again, in one line where the disk is to blame
        if not started and state.taken is not None:
            write_manifest(plan.run_dir, state.taken.manifest)
        elif not started:
            clear(plan, error, keep_folder=keep_folder)
        if state.interrupted and isinstance(error, asyncio.CancelledError):
            raise KeyboardInterrupt from None
        raise _in_one_line(plan, state.failure or error) from None
    if state.failure is not None:
        raise _in_one_line(plan, state.failure)


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
            note("ended at once; 'replay check' says what is on record, 'replay run --resume' goes on")
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
    if state.taken is not None:  # its trace was fitted when it was begun
        state.survey = state.taken.remaining
        return
    limit, source = state.prepared.served[0].max_model_len, plan.source
    if limit is not None and plan.survey.longest_tokens > limit:
        source = replace(source, max_model_len=limit, overlong=plan.options.overlong)
        state.survey = source.survey()
        done, changed = {"drop": "dropped", "clip": "clipped"}[source.overlong], state.survey.changed
        progress.say(f"{done} {plural(changed, 'request')} longer than the model's {limit} tokens")
        state.manifest["overlong"] = {"rule": source.overlong, "requests": changed}
    source.write(plan.run_dir / "trace.parquet")
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
    clear_helpers(plan.run_dir)
    settings = state.prepared.settings
    if settings is not None and settings.not_restored is not None:
        state.manifest["not_restored"] = settings.not_restored
        progress.warn(f"{settings.not_restored}; see 'replay clocks show' and 'replay clocks reset'")


def _check_load(plan: Plan) -> None:
    """Raise `ReplayError` where this machine cannot send the load, or keep its records."""
    options = plan.options
    if _in_one_place(options) and (options.workers or 1) > 1:
        raise ReplayError(
            f"--workers {options.workers} with a cap or --router least-loaded: they count all requests in one place; "
            "leave --workers out"
        )
    fast = plan.engine != "url" or plain_http(options.engine)
    check_descriptors(plan.survey.load, _worker_count(options, plan.survey.load, fast=fast), options.max_concurrency)
    check_space(plan.run_dir, plan.survey.requests, plan.survey.output_tokens, save_chunks=options.save_chunks)


def _in_one_place(options: RunOptions) -> bool:
    """Whether what was asked for must know of all requests."""
    caps = options.max_concurrency is not None or options.max_rate_rps is not None
    return caps or options.router == "least-loaded"


def _worker_count(options: RunOptions, load: Load, *, fast: bool) -> int:
    return worker_count(load, fast=fast, one=_in_one_place(options), asked=options.workers)


def _cut(plan: Plan, state: _State) -> list[Config]:
    """Cut the trace into shards; what each load worker is told."""
    options, served = plan.options, state.prepared.served
    fast = all(plain_http(server.base_url) for server in served)
    workers = _worker_count(options, state.survey.load, fast=fast)
    route = Router(options.router, len(served)).assign
    source = TraceSource(plan.run_dir / "trace.parquet") if state.taken is None else state.taken.source
    state.due = Due(state.survey.last_ns)
    cut(state.due.noting(source.batches()), route, workers, plan.run_dir, think_time=options.think_time)
    reserve(plan.run_dir)
    state.manifest["workers"] = [{"worker": number, "host": host()} for number in range(workers)]
    return [
        Config(
            run_dir=str(plan.run_dir),
            worker=number,
            fast=fast,
            base_urls=[server.base_url for server in served],
            model=served[0].model,
            salt=_salt(state),
            block_tokens=plan.block_tokens,
            exact=options.exact,
            name_prefix=run_prefix(state.manifest) if state.prepared.followers else "",
            api_key=served[0].api_key,
            endpoint=options.endpoint,
            stream=options.stream,
            request_timeout_s=options.request_timeout_s,
            save_chunks=options.save_chunks,
            think_time=options.think_time,
            max_concurrency=options.max_concurrency,
            max_rate_rps=options.max_rate_rps,
        )
        for number in range(workers)
    ]


async def _measure(plan: Plan, state: _State, workers: LoadWorkers, progress: Progress) -> None:
    """Send the trace and wait for the answers; afterwards the manifest says how it ended."""
    options, prepared = plan.options, state.prepared
    start_ns = now_ns() + _LEAD_NS
    # What is left of a run is due at once, at its own distances.
    epoch_ns = start_ns - (0 if state.taken is None else state.survey.first_ns)
    measure_ns = begin_stretch(state.manifest, start_ns, epoch_ns + options.warmup_ns)
    early = sent_again_early(plan.run_dir, state.manifest)
    store = RecordStore(plan.run_dir, save_chunks=options.save_chunks, measure_start_ns=measure_ns, early=early)
    simulated = state.manifest["engine"] == "simulated"
    state.manifest["clock_anchors"].append(anchor())
    write_manifest(plan.run_dir, state.manifest)
    workers.begin(epoch_ns)
    first = prepared.served[0]
    proxies = through_proxies(first.base_url)
    async with aiohttp.ClientSession(headers=bearer(first.api_key), trust_env=proxies) as session:
        sending = asyncio.create_task(workers.wait())
        state.cancel = sending
        watchers = [
            store.store_forever(),
            *(scrape(session, s.base_url, plan.run_dir, i) for i, s in enumerate(prepared.served)),
            _watch(prepared.engines, sending, state),
            show(epoch_ns, state.due, plan.gpus, workers, prepared.sampler, progress, simulated=simulated),
            warn_of_gpus(prepared.sampler, plan.gpus, prepared.locked_mhz, progress),
            warn_of_server(workers, progress),
        ]
        try:
            with yielding():
                async with background(watchers, sending):
                    with contextlib.suppress(asyncio.CancelledError):
                        await sending
            await workers.stop()
            await store.close()
        except Exception as error:  # noqa: BLE001 - raised again when what there is has been written
            state.failure = error
            await workers.stop()
            with contextlib.suppress(OSError):  # a full disk stays full
                await store.close()
    _note_end(state, workers, progress)
    write_manifest(plan.run_dir, state.manifest)
    state.cancel = None
    await _idle_after(plan, state, progress)


async def _idle_after(plan: Plan, state: _State, progress: Progress) -> None:
    """Measure idle power after a run that went to its end; have power written up to the end of any other."""
    prepared = state.prepared
    sampler = prepared.sampler
    if sampler is None or not sampler.alive:
        return
    if state.manifest["state"] != "finishing":
        await sampler.written_until(state.manifest["measure_end_ns"])
        return
    resting = asyncio.create_task(measure_idle(plan, prepared, progress, "after"))
    state.cancel = resting
    try:
        await resting
    except asyncio.CancelledError:
        progress.say("interrupted: idle power after the run is not measured")


def _note_end(state: _State, workers: LoadWorkers, progress: Progress) -> None:
    """Enter into the manifest how the sending ended."""
    state.late_ns = workers.stall_ns
    why = "the server ended while requests were sent; see server.log" if state.engine_died else workers.died
    if isinstance(state.failure, OSError):  # of which a launched server dies too
        why = f"the run directory could not be written ({state.failure.strerror or state.failure})"
    whole = not (state.interrupted or why or state.failure)
    before = 0 if state.taken is None else state.taken.recorded
    ended = {
        "state": "finishing" if whole else "interrupted" if state.interrupted else "failed",
        **end_stretch(state.manifest, now_ns()),
        "requests": {
            "planned": state.survey.requests + before,
            "sent": workers.total("sent") + before,
            "ended": workers.total("ended") + before,
        },
        "client_error": workers.client_error(),
    }
    state.manifest.update(ended)
    if why is not None and not state.interrupted:
        state.manifest["failure"] = why
        if state.failure is None:  # else it is raised when what there is has been written
            progress.warn(why)
    state.manifest["clock_anchors"].append(anchor())


async def _watch(engines: list[Engine], sending: asyncio.Task[None], state: _State) -> None:
    """End the sending when a server has died: nobody is left to answer for it."""
    while all(engine.alive() for engine in engines):  # noqa: ASYNC110 - an attached server cannot tell us
        await asyncio.sleep(_WATCH_S)
    state.engine_died = True
    sending.cancel()
    await asyncio.Event().wait()
