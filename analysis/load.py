"""What attribution must know of a run before it reads the bulk of it: who ran where, when, and on which GPUs.

Segments are read by `analysis.members`, steps and power readings by `analysis.slabs`, some at a time.

All times are moved to the replayer's clock (`t - offset_ns` of the host that wrote them: the manifest's `offset_ns` is
that host's clock minus the replayer's) and given in seconds from the window's start, as float64: over a week that
still resolves 0.1 ns.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.checks import check_requests, check_segments, check_steps
from analysis.manifest import (
    by_host,
    check_manifest,
    gpu_entry,
    listed_instances,
    offset_ns,
    wanted_gpus,
    worker_offsets_ns,
)
from analysis.polled import read_polled
from analysis.streams import read_ahead
from replay.rundir import MANIFEST, Run, read_group, row_groups
from tracegen.errors import AnalysisError, RunError

Floats = NDArray[np.float64]
NS_PER_S = 1e9
HOLE_S = 0.5  # between readings of a GPU; the run's verdict on its sensor has the same bound
MANY = 3  # GPUs; more are not named one by one
_TIMES = ("sent_ns", "first_token_ns", "last_token_ns", "done_ns")
_SERVED = ("input_tokens", "output_tokens", "cached_tokens")


@dataclass(frozen=True)
class GpuData:
    """The readings of one GPU, one entry a poll, in order of time; a missing value is NaN."""

    host: str
    gpu: int
    t_s: Floats
    sensor_s: Floats  # when the instant sensor last updated
    instant_w: Floats
    average_w: Floats
    counter_j: Floats  # as counted, not from the run's start
    idle_before_w: Mapping[str, float]  # by source: counter, instant, average
    idle_after_w: Mapping[str, float]
    sensors: Mapping[str, Mapping[str, float]]  # by source: period_ns, window_ns, lag_ns
    sm_clock_mhz: Floats = field(default_factory=lambda: np.zeros(0))  # empty: nothing is known of it
    throttle_reasons: Floats = field(default_factory=lambda: np.zeros(0))  # NVML's bits; empty: nothing is known

    @property
    def name(self) -> str:
        """How messages call this GPU."""
        return f"gpu {self.gpu}" + (f" on {self.host}" if self.host else "")


@dataclass(frozen=True)
class CpuData:
    """The energy counter of one CPU domain, in order of time; polls that failed are left out, for the counter sums."""

    name: str  # package-0, dram-0, ...; with its host where the run has several
    t_s: Floats
    energy_j: Floats


@dataclass(frozen=True)
class InstanceData:
    """One engine instance and its GPUs, these without readings."""

    instance: int | None  # None: GPUs that no instance uses
    gpus: tuple[GpuData, ...]
    recorded: bool  # whether the engine wrote steps and segments
    offset_ns: int  # of its host's clock to the replayer's
    clock_error_s: float  # bound of that


@dataclass(frozen=True)
class RunData:
    """A run as attribution sees it; `window_ns` is on the replayer's clock, everything else counts from its start.

    `requests` has request_id, instance and status, sent_s, first_token_s, last_token_s and done_s, and where an
    instance has no step records input_tokens, output_tokens and cached_tokens.
    """

    run: Run
    window_ns: tuple[int, int]
    instances: tuple[InstanceData, ...]
    requests: pl.DataFrame
    unrecorded: pl.Series  # request ids of the trace that are not in requests.parquet, those of `early` first
    scope: str
    offsets_ns: Mapping[str, int]  # of each host's clock to the replayer's
    named_host: str | None  # the one host that the manifest names, which readings without a host are of
    notes: tuple[str, ...] = field(default=())
    cpu: tuple[CpuData, ...] | None = None  # None: the run has no table of it
    early: pl.DataFrame | None = None  # as `requests`, those of the warm-up; None: there was none

    @property
    def duration_s(self) -> float:
        """The window's length."""
        return (self.window_ns[1] - self.window_ns[0]) / NS_PER_S

    @property
    def ids(self) -> pl.Series:
        """Ids of the requests by row, then the trace's whose end was not recorded: their work is known as theirs."""
        return pl.concat([self.requests["request_id"], self.unrecorded])


SCOPES = ("gpu", "node")


def open_run(path: str | Path) -> Run:
    """The run directory at `path`. Raises `RunError` when it is none, or a key of its manifest is of a wrong type."""
    run = Run.open(path)
    check_manifest(run)
    return run


def load_run(run: Run, scope: str = "gpu") -> RunData:
    """What attribution needs to know of `run` first.

    `scope` is `gpu` (the GPUs of the engine instances) or `node` (every GPU that was sampled). Raises `RunError` or
    `AnalysisError` with the file and column or key that is missing or wrong.
    """
    if scope not in SCOPES:
        raise AnalysisError(f"scope '{scope}' is unknown; use {' or '.join(SCOPES)}")
    check_manifest(run)
    _check_power(run)
    hosts = by_host(run)
    offsets = {host: offset_ns(hosts, host) for host in hosts}
    named = {str(i["host"]) for i in listed_instances(run) if i.get("host")}
    host = named.pop() if len(named) == 1 else None
    in_steps, in_segments = _instances_of(run, "steps"), _instances_of(run, "segments")
    recorded = in_steps & in_segments
    of_host = {int(i["instance"]): offset_ns(hosts, i.get("host")) for i in listed_instances(run)}
    if in_steps - set(of_host):
        check_steps(run, run.scan("steps").collect().sort("instance", "step"))
    if in_segments - set(of_host):
        check_segments(run, run.scan("segments").collect(), run.scan("steps").collect())
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_requests, run, served=not recorded >= set(of_host))
        polled = read_polled(run, host, offsets)
        wanted = wanted_gpus(run, polled, scope)
        requests = reading.result()
    early = _requests(run, served=not recorded >= set(of_host), table="warmup") if run.has("warmup") else None
    warmed = requests["request_id"].clear() if early is None else early["request_id"]
    unrecorded, notes = _state(run, pl.concat([warmed, requests["request_id"]]))
    unrecorded = pl.concat([warmed, unrecorded])
    window, remarks = _window(run, requests, of_host, polled, wanted)
    instances = tuple(
        InstanceData(
            instance=number,
            gpus=tuple(_gpu(run, host, gpu) for host, gpu in gpus),
            recorded=number in recorded,
            offset_ns=of_host.get(-1 if number is None else number, 0),
            clock_error_s=float(hosts.get(gpus[0][0], {}).get("offset_error_ns") or 0) / NS_PER_S,
        )
        for number, gpus in wanted
    )
    return RunData(
        run=run,
        window_ns=window,
        instances=instances,
        requests=_seconds(requests, window[0], _TIMES),
        unrecorded=unrecorded,
        scope=scope,
        offsets_ns=offsets,
        named_host=host,
        notes=(*notes, *remarks, *_unread(polled, instances, window[0])),
        cpu=_cpu(run, hosts, window[0]),
        early=None if early is None else _seconds(early, window[0], _TIMES),
    )


def _check_power(run: Run) -> None:
    """Raise `AnalysisError` where `run` has no power readings at all."""
    if not run.has("power"):
        if run.manifest.get("state") in {"starting", "running"} and not run.has("requests"):
            raise AnalysisError(
                f"{run.path}: this run did not finish and left no tables (its manifest says "
                f"'{run.manifest['state']}'); wait for it if it still runs, else replay it again"
            )
        raise AnalysisError(
            f"{run.path}: has no power samples (power.parquet), so there is no energy to attribute; "
            "replay with GPUs that can be read (--gpus with an attached server) or with --engine sim"
        )


def _instances_of(run: Run, table: str) -> set[int | None]:
    """The instances that have rows in `table`, None where a row has none."""
    found: set[int | None] = set()
    if run.has(table):
        for group in row_groups(run.path, table, "instance"):
            if group.low is not None and group.low == group.high and "instance" in group.full:
                found.add(group.low)
            elif group.rows:
                found |= set(read_group(group, table, ("instance",))["instance"].unique().to_list())
    return found


def _state(run: Run, recorded: pl.Series) -> tuple[pl.Series, list[str]]:
    """The trace's requests that requests.parquet lacks, and what the manifest says against the run."""
    manifest, notes = run.manifest, []
    planned, pieces = 0, []
    for piece in _planned_ids(run):
        if not piece.equals(recorded[planned : planned + len(piece)]):
            pieces.append(piece)
        planned += len(piece)
    unrecorded = pl.concat(pieces) if pieces else recorded.clear()
    if pieces:
        unrecorded = unrecorded.filter(~unrecorded.is_in(recorded.implode())).unique(maintain_order=True)
    if manifest.get("state") != "complete":
        count = (manifest.get("requests") or {}).get("planned") or planned or "an unknown number of"
        notes.append(
            f"the run is not complete (state: {manifest.get('state')}): {len(recorded)} of {count} planned requests "
            "recorded"
        )
    if torn := run.torn():
        notes.append(f"left out, for they were not written to their ends: {', '.join(torn)}")
    failed = [str(v.get("name")) for v in manifest.get("verdicts") or [] if v.get("ok") is False]
    if failed:
        notes.append(f"the run failed its verdicts {', '.join(failed)}")
    return unrecorded, notes


def _planned_ids(run: Run) -> Iterator[pl.Series]:
    """The ids of the trace's requests, a row group at a time."""
    groups = row_groups(run.path, "trace", "request_id") if run.has("trace") else []
    for rows in read_ahead(groups, partial(read_group, table="trace", columns=("request_id",))):
        yield rows["request_id"]


def _unread(polled: pl.DataFrame, instances: tuple[InstanceData, ...], zero_ns: int) -> list[str]:
    """What to say of GPUs that could not be read at times: the sampler then writes rows without values."""
    said = []
    for gpu in (gpu for instance in instances for gpu in instance.gpus):
        row = polled.row(by_predicate=(pl.col("host") == gpu.host) & (pl.col("gpu") == gpu.gpu), named=True)
        if row["unread"]:
            first_s = (row["unread_ns"] - zero_ns) / NS_PER_S
            said.append(f"{gpu.name}: {row['unread']} polls failed, the first at {first_s:.0f} s")
    return said


def _cpu(run: Run, hosts: Mapping[str, Mapping[str, Any]], zero_ns: int) -> tuple[CpuData, ...] | None:
    """The CPUs' energy counters on the replayer's clock; None where the run has none."""
    if not run.has("cpu_energy"):
        return None
    domains = run.scan("cpu_energy").collect().sort("t_ns").partition_by("host", "domain", as_dict=True)
    one_host = len({host for host, _ in domains}) == 1
    result = []
    for host, domain in sorted(domains, key=str):
        read = domains[host, domain].drop_nulls("energy_uj")
        t_s = (read["t_ns"] - (zero_ns + offset_ns(hosts, host))).cast(pl.Float64) / NS_PER_S
        # From its own lowest value: a double would not tell the microjoules of a counter near 2^64.
        energy_j = (read["energy_uj"] - read["energy_uj"].min()).cast(pl.Float64) / 1e6
        result.append(CpuData(str(domain) if one_host else f"{domain} on {host}", t_s.to_numpy(), energy_j.to_numpy()))
    return tuple(result)


def names(gpus: Sequence[str]) -> str:
    """Several GPUs as messages call them, each once."""
    unique = list(dict.fromkeys(gpus))
    return ", ".join(unique) if len(unique) <= MANY else f"{len(unique)} GPUs ({unique[0]} to {unique[-1]})"


def _requests(run: Run, *, served: bool, table: str = "requests") -> pl.DataFrame:
    """Whose requests these are and their times on the replayer's clock; `served`: with the tokens counted."""
    columns = ["request_id", "instance", "status", "worker", *_TIMES, *(_SERVED if served else ())]
    groups = row_groups(run.path, table, "request_id")
    frames = list(read_ahead(groups, partial(read_group, table=table, columns=columns)))
    frame = pl.concat(frames) if frames else run.scan(table, columns).collect()
    check_requests(run, frame)
    offsets = worker_offsets_ns(run)
    if any(offsets.values()):
        offset = pl.col("worker").replace_strict(offsets, default=0, return_dtype=pl.Int64)
        frame = frame.with_columns(pl.col(_TIMES) - offset)
    return frame.drop("worker")


def _window(
    run: Run,
    requests: pl.DataFrame,
    offsets: Mapping[int, int],
    polled: pl.DataFrame,
    wanted: list[tuple[int | None, list[tuple[str, int]]]],
) -> tuple[tuple[int, int], list[str]]:
    """The measured window in ns, cut to what the power readings cover, and what there is to say about that."""
    notes = []
    start, end = run.manifest.get("measure_start_ns"), run.manifest.get("measure_end_ns")
    if start is None:
        start = requests["sent_ns"].min()
        notes.append("measure_start_ns is missing: the window begins with the first request sent")
    if end is None:
        ends = [requests["done_ns"].max(), requests["last_token_ns"].max()]
        ends.append(_last_step_ns(run, offsets))
        end = max((int(e) for e in ends if isinstance(e, int)), default=None)
        notes.append("measure_end_ns is missing: the window ends with the last response or engine step")
    if not isinstance(start, int) or not isinstance(end, int):
        raise AnalysisError(f"{run.path}: no request was sent, so there is no window to account for")
    if end <= start:
        raise RunError(f"{run.path / MANIFEST}: measure_end_ns is not after measure_start_ns")
    schema = {"host": pl.String, "gpu": pl.UInt16}
    gpus = pl.DataFrame([gpu for _, group in wanted for gpu in group], schema=schema, orient="row")
    read = polled.join(gpus, on=["host", "gpu"])
    cut = (max(start, *read["first_ns"].to_list()), min(end, *read["last_ns"].to_list()))
    if cut[1] <= cut[0]:
        raise AnalysisError(f"{run.path / 'power.parquet'}: has no readings within the window ({start} to {end} ns)")
    lost_s = ((cut[0] - start) + (end - cut[1])) / NS_PER_S
    if lost_s > 0:
        notes.append(f"power readings leave out {lost_s:.3f} s at the window's edges, so it was cut to what they cover")
    return cut, notes


def _last_step_ns(run: Run, offsets: Mapping[int, int]) -> int | None:
    """When the last engine step ended, on the replayer's clock."""
    if not run.has("steps"):
        return None
    offset = pl.col("instance").replace_strict(dict(offsets), default=0, return_dtype=pl.Int64)
    ends = [
        rows.select((pl.col("end_ns") - offset).max()).item() for rows in run.batches("steps", ["instance", "end_ns"])
    ]
    return max((int(end) for end in ends if end is not None), default=None)


def _seconds(frame: pl.DataFrame, zero_ns: int, names: tuple[str, ...]) -> pl.DataFrame:
    """`frame` with the `*_ns` columns `names` as `*_s` from `zero_ns`."""
    seconds = (((pl.col(n) - zero_ns) / NS_PER_S).alias(n.removesuffix("_ns") + "_s") for n in names)
    return frame.with_columns(seconds).drop(names)


def _gpu(run: Run, host: str, gpu: int) -> GpuData:
    """The manifest's figures of one GPU."""
    entry = gpu_entry(run, host, gpu)
    none = np.zeros(0)
    return GpuData(
        host=host,
        gpu=gpu,
        t_s=none,
        sensor_s=none,
        instant_w=none,
        average_w=none,
        counter_j=none,
        idle_before_w=_watts(entry.get("idle_power_w")),
        idle_after_w=_watts(entry.get("idle_power_after_w")),
        sensors={k: v for k, v in (entry.get("sensors") or {}).items() if isinstance(v, dict)},
    )


def _watts(document: Any) -> dict[str, float]:
    """The sources that have a figure."""
    return {k: float(v) for k, v in document.items() if v is not None} if isinstance(document, dict) else {}
