"""One run in virtual time from beginning to end: trace in, run directory out."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from replay.clock import NS_PER_S
from replay.gpu.baseline import idle_power_w
from replay.gpu.sim import SimBoard, SimGpus
from replay.hold import hold
from replay.live import Progress
from replay.manifest import first_manifest, host
from replay.plan import Plan, RunOptions, check_by_priority, make_plan
from replay.prepare import Prepared, check_settings, describe
from replay.router import Router
from replay.rundir import scan_table, write_manifest
from replay.session import claim, clear
from replay.sim.arguments import capped
from replay.sim.blocks import RecordArray, mix
from replay.sim.compiled import compiled
from replay.sim.hardware import Hardware
from replay.sim.sensors import Ints
from replay.sim.truth import shapley_truth
from replay.sim.virtual import ARRIVAL, Output, VirtualEngines
from replay.source import Survey, TraceSource
from replay.tables import ARRIVALS, POWER, REQUESTS, REQUESTS_OPTIONAL, SEGMENTS, TRUTH
from replay.verdicts import validity
from replay.virtual.judge import Judge
from replay.virtual.node import Block, NodePower
from replay.virtual.tables import (
    STEPS_OF_SIM,
    Columns,
    TableWriter,
    TokenTimes,
    TraceWriter,
    Window,
    segment_columns,
    step_columns,
)  # fmt: skip
from tracegen.durations import format_duration
from tracegen.errors import ReplayError
from tracegen.schema import read_metadata, write_parquet

BEGIN_NS = 10 * NS_PER_S  # when the sensors are first read, on a clock that starts with the node
_SETTLE_NS = NS_PER_S // 2  # as in wall time: between the last work and idle power, and before the first request
TRUTH_REQUESTS = 2000  # runs of more have no truth.parquet unless it is asked for
CHUNK_TOKENS = 10_000_000  # runs of more output tokens do not keep the time of each
# Asked while the trace is fed: seconds since its first request, requests fed, in the trace, waiting in the engines.
# A text is why the run is to end.
Watch = Callable[[float, int, int, int], str | None]
_LOOKS, _LEAST_ROWS = 64, 16  # looks at a run that is watched; each costs a row group in every table
_LOADING = "loading the simulated engine (its first use on a machine compiles it, half a minute)"


def run_virtual(options: RunOptions, progress: Progress, watch: Watch | None = None) -> Path:
    """Serve `options.trace` in virtual time and return the run directory.

    `watch` may end the run early, which is then `interrupted`: what was sent by then is served to its end.
    Raises a `WattraceError` when it cannot be done. Whatever ends it early, Ctrl-C too, leaves no run directory.
    """
    plan = make_plan(options)
    assert plan.profile is not None
    progress.say(f"SIMULATED in virtual time: step times, power and GPUs are computed: {plan.profile.name}")
    for line in plan.profile.assumed:
        progress.say(f"  {line}")
    hardware = Hardware(capped(plan.profile, options.power_cap_w), plan.tp)
    source = TraceSource(
        options.trace, options.duration_ns, options.num_prompts, plan.profile.max_model_len, options.overlong
    )
    progress.status(f"reading the trace, then {_LOADING}")  # one line: a log has no second one for five seconds
    survey = source.survey()
    if survey.prioritized:
        check_by_priority(plan.engine, options)
    progress.status(_LOADING)
    made = claim(plan.run_dir)
    try:
        with signals_as_interrupt(), hold(plan.run_dir):
            manifest = _manifest(plan, survey, progress)
            write_manifest(plan.run_dir, manifest)
            with ExitStack() as stack:
                _Run(plan, hardware, source, survey, manifest, progress, stack, watch).serve()
            if survey.requests <= TRUTH_REQUESTS if options.truth is None else options.truth:
                progress.status("computing what each request truly cost")
                _write_truth(plan.run_dir, hardware)
            write_manifest(plan.run_dir, manifest)
    except BaseException as error:
        clear(plan, error, keep_folder=not made)
        if isinstance(error, OSError):  # a full or failing disk is nobody's bug
            why = error.strerror or error
            raise ReplayError(f"{plan.run_dir}: cannot be written ({why}); free some space first") from None
        raise
    return plan.run_dir


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run as Ctrl-C does; only a process's main thread can see to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """Everything that a run in virtual time keeps while it goes on."""

    def __init__(
        self,
        plan: Plan,
        hardware: Hardware,
        source: TraceSource,
        survey: Survey,
        manifest: dict[str, Any],
        progress: Progress,
        stack: ExitStack,
        watch: Watch | None,
    ) -> None:
        """`stack` closes the tables; `manifest` grows."""
        options, profile = plan.options, hardware.profile
        self._plan, self._source, self._survey = plan, source, survey
        self._manifest, self._progress, self._watch = manifest, progress, watch
        self._lock_mhz = manifest["instances"][0]["freq_mhz"] or profile.clocks_mhz.max
        self._before_ns = BEGIN_NS + _SETTLE_NS, BEGIN_NS + _SETTLE_NS + options.idle_ns
        self._zero_ns = self._before_ns[1] + _SETTLE_NS
        self._keys, self._keys_at = _content_keys(source.prefixes())
        self._engines = VirtualEngines(
            hardware, self._lock_mhz, instances=len(plan.groups), keys=self._keys, key_tokens=plan.block_tokens
        )
        self._router = Router(options.router, len(plan.groups))
        self._node = NodePower(hardware, plan.groups, self._lock_mhz, begin_ns=BEGIN_NS, seed=options.seed)
        self._window = Window(self._zero_ns)
        self._tokens = TokenTimes() if options.save_chunks and survey.output_tokens <= CHUNK_TOKENS else None
        held_mhz = profile.time.sustained_mhz
        self._judge = Judge(survey, plan.gpus, manifest["instances"][0]["freq_mhz"], self._zero_ns, held_mhz)
        requests = REQUESTS if self._tokens is None else pl.Schema({**REQUESTS, **REQUESTS_OPTIONAL})
        schemas = {
            "requests": requests,
            "steps": STEPS_OF_SIM,
            "segments": SEGMENTS,
            "arrivals": ARRIVALS,
            "power": POWER,
        }
        self._tables = {n: stack.enter_context(TableWriter(plan.run_dir, n, schema)) for n, schema in schemas.items()}
        self._trace = stack.enter_context(TraceWriter(plan.run_dir, read_metadata(options.trace)))
        self._kept: list[Columns] = []  # of requests that wait for the times of their tokens
        self._idle: list[pl.DataFrame] = []  # readings around the run
        self._memory_mhz, self._host = profile.memory_clock_mhz, host()
        self._fed = self._ended = 0
        self._last_ns = self._zero_ns  # end of the latest step
        self._started_s = time.monotonic()

    def serve(self) -> None:
        """Serve the whole trace; afterwards the tables are there, and the manifest says what to think of them."""
        stopped: str | None = None
        for batch in self._watched_batches():
            self._trace.append(batch)
            self._window.admit(batch)
            for output in self._engines.feed(self._arrivals(batch)):
                self._take(output)
            if (stopped := self._look(int(batch["arrival_ns"][-1]))) is not None:
                break
        for output in self._engines.finish():
            self._take(output)
        end_ns = max(self._last_ns, self._zero_ns + 1)
        after_ns = end_ns + _SETTLE_NS, end_ns + _SETTLE_NS + self._plan.options.idle_ns
        self._write_power(self._node.end(after_ns[1]), end_ns)
        self._write_token_times()
        self._trace.commit()
        for table in self._tables.values():
            table.commit()
        self._conclude(end_ns, after_ns, stopped)

    def _watched_batches(self) -> Iterator[pl.DataFrame]:
        """The trace in batches, which are short where somebody looks between them."""
        rows = max(_LEAST_ROWS, self._survey.requests // _LOOKS)
        for batch in self._source.batches():
            yield from [batch] if self._watch is None else batch.iter_slices(rows)

    def _look(self, last_ns: int) -> str | None:
        """Why the run is to end now, after the request that arrived at `last_ns`; None where it goes on."""
        if self._watch is None:
            return None
        at_s = (last_ns - self._survey.first_ns) / NS_PER_S
        why = self._watch(at_s, self._fed, self._survey.requests, self._engines.waiting)
        if why is not None:
            self._judge.stop(self._fed, last_ns)
        return why

    def _arrivals(self, batch: pl.DataFrame) -> RecordArray:
        """The rows of `batch` as the engines take them; their time begins with the trace."""
        rows = np.zeros(batch.height, ARRIVAL)
        rows["arrival_ns"], rows["instance"] = batch["arrival_ns"].to_numpy(), self._router.assign(batch)
        rows["prompt"], rows["output"] = batch["input_tokens"].to_numpy(), batch["output_tokens"].to_numpy()
        if self._keys is not None:
            bounds = self._keys_at[self._fed : self._fed + batch.height + 1]
            rows["keys_at"] = bounds[:-1]
            rows["keys_count"] = np.diff(bounds)
        if "priority" in batch.columns:
            rows["priority"] = batch["priority"].fill_null(0).to_numpy()
        self._fed += batch.height
        return rows

    def _take(self, output: Output) -> None:
        """Write what the engines did."""
        steps, segments = output.steps, output.segments
        ids = self._window.add(output)
        self._tables["steps"].append(step_columns(steps, self._zero_ns, self._lock_mhz), steps.size)
        self._tables["segments"].append(segment_columns(segments, ids), segments.size)
        self._judge.output(output)
        if self._tokens is not None:
            self._tokens.add(output)
        columns, rows = self._window.take()
        self._judge.requests(columns, rows)
        arrived = {"arrival_ns": columns["scheduled_ns"], **{n: columns[n] for n in ("instance", "request_id")}}
        self._tables["arrivals"].append(arrived, rows)
        if self._tokens is not None:
            self._kept.append(columns)
        else:
            self._tables["requests"].append(columns, rows)
        if steps.size:
            self._last_ns = max(self._last_ns, int(steps["end_ns"].max()) + self._zero_ns)
            for instance in range(len(self._plan.groups)):
                mine = steps if len(self._plan.groups) == 1 else steps[steps["instance"] == instance]
                self._write_power(self._node.run(instance, mine, self._zero_ns))
            self._write_power(self._node.rest(-1, self._last_ns))
        self._ended += rows
        self._report()

    def _write_power(self, blocks: Iterable[Block], end_ns: int | None = None) -> None:
        """Write readings; `end_ns`: when the run ended, once that is known."""
        for block in blocks:
            shown = block.readings
            constant = {"host": self._host, "mem_clock_mhz": self._memory_mhz}
            columns = {**shown._asdict(), **constant, "t_ns": shown.sensor_ns, "gpu": block.gpu}
            self._tables["power"].append(columns, block.gpu.size)
            self._judge.power(block, end_ns)
            early = shown.sensor_ns <= self._before_ns[1]
            wanted = early if end_ns is None else early | (shown.sensor_ns >= end_ns)
            if wanted.any():
                names = ("t_ns", "sensor_ns", "gpu", "power_instant_mw", "power_average_mw", "energy_mj")
                self._idle.append(pl.DataFrame({name: columns[name][wanted] for name in names}))

    def _write_token_times(self) -> None:
        """Write the requests that have waited for the times of their tokens."""
        if self._tokens is None:
            return
        requests = {name: [columns[name] for columns in self._kept] for name in self._kept[0]}
        whole = {n: np.concatenate(c) if isinstance(c[0], np.ndarray) else c[0] for n, c in requests.items()}
        times_ns, offsets = self._tokens.take(whole["input_tokens"], whole["output_tokens"])
        whole["chunk_ns"] = pa.LargeListArray.from_arrays(offsets, times_ns + self._zero_ns)
        whole["chunk_tokens"] = pa.LargeListArray.from_arrays(offsets, np.ones(times_ns.size, np.uint16))
        self._tables["requests"].append(whole, offsets.size - 1)

    def _conclude(self, end_ns: int, after_ns: tuple[int, int], stopped: str | None) -> None:
        """Enter into the manifest what was measured, and the verdicts; `stopped`: why the run ended early."""
        manifest, power = self._manifest, pl.concat(self._idle)
        for entry in manifest["gpus"]:
            entry["idle_power_w"] = idle_power_w(power, entry["gpu"], *self._before_ns)
            entry["idle_power_after_w"] = idle_power_w(power, entry["gpu"], *after_ns)
        mine = [entry for entry in manifest["gpus"] if entry["gpu"] in self._plan.gpus]
        judged = self._judge.verdicts(end_ns, mine)
        state = "complete" if stopped is None else "interrupted"
        manifest |= {
            "state": state,
            **({} if stopped is None else {"stopped_early": stopped, "failure": stopped}),
            "measure_start_ns": self._zero_ns,
            "measure_end_ns": end_ns,
            "stretches": [{"start_ns": self._zero_ns, "end_ns": end_ns, "boot_id": None}],
            "client_error": None,  # no client is between
            "requests": {"planned": self._survey.requests, "sent": self._fed, "ended": self._ended},
            "preemptions": self._engines.preemptions,
            "verdicts": [asdict(verdict) for verdict in judged],
            **validity(state, judged, stopped),
        }

    def _report(self) -> None:
        """Say how far the run is."""
        simulated_ns = self._last_ns - self._zero_ns
        speed = simulated_ns / NS_PER_S / max(1e-3, time.monotonic() - self._started_s)
        self._progress.status(
            f"{self._ended:,} of {self._survey.requests:,} requests, {format_duration(simulated_ns)} simulated, "
            f"{speed:,.0f} times real time"
        )


def _manifest(plan: Plan, survey: Survey, progress: Progress) -> dict[str, Any]:
    """What is known of the run before it begins. Raises `GpuError` for GPUs and clocks that the node does not have."""
    prepared = Prepared(first_manifest(plan, os.urandom(8).hex()))
    manifest = prepared.manifest
    assert plan.profile is not None
    with tempfile.TemporaryDirectory() as folder:
        board = Path(folder) / "board"
        SimBoard.create(board, plan.profile).close()
        with closing(SimGpus(board)) as gpus:
            describe(plan, prepared, gpus)
            check_settings(plan, prepared, gpus, progress)
    for entry in manifest["instances"]:
        entry["max_model_len"] = plan.profile.max_model_len
    if survey.changed:
        rule = plan.options.overlong
        done = {"drop": "dropped", "clip": "clipped"}[rule]
        progress.say(f"{done} {survey.changed} requests longer than the model's {plan.profile.max_model_len} tokens")
        manifest["overlong"] = {"rule": rule, "requests": survey.changed}
    return manifest | {"state": "running", "clock": "virtual", "clock_anchors": []}


def _write_truth(run_dir: Path, hardware: Hardware) -> None:
    """Write `truth.parquet` from the run's tables."""
    steps, segments = (scan_table(run_dir, name).collect() for name in ("steps", "segments"))
    segments = segments.sort("instance", "first_step", "request_id")  # as in wall time: sampled orders follow the rows
    truth = shapley_truth(steps, segments, hardware).select(TRUTH.names())
    write_parquet(truth.to_arrow(compat_level=pl.CompatLevel.oldest()), run_dir / "truth.parquet")


def _content_keys(prefixes: pl.Series | None) -> tuple[npt.NDArray[np.uint64] | None, Ints]:
    """Content keys of all requests, one for each prefix hash, and [requests + 1] where each request's begin."""
    if prefixes is None:
        return None, np.zeros(1, np.int64)
    counts = prefixes.list.len().fill_null(0).to_numpy()
    hashes = prefixes.drop_nulls().explode(empty_as_null=False).to_numpy().astype(np.uint64)
    bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return _chained(hashes, bounds), bounds


@compiled
def _chained(hashes: npt.NDArray[np.uint64], bounds: Ints) -> npt.NDArray[np.uint64]:
    """A key for each hash that stands for all hashes of its request up to it."""
    keys = np.empty_like(hashes)
    for i in range(len(bounds) - 1):
        key = np.uint64(0)
        for j in range(bounds[i], bounds[i + 1]):
            key = mix(key, hashes[j])
            keys[j] = key
    return keys
