"""What attribution needs of a run directory, checked and brought onto one clock.

All times are moved to the replayer's clock (`t - offset_ns` of the host that wrote them: the manifest's `offset_ns` is
that host's clock minus the replayer's) and given in seconds from the window's start, as float64: over a week that
still resolves 0.1 ns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.checks import check_manifest, check_segments
from replay.rundir import MANIFEST, Run
from tracegen.errors import AnalysisError, RunError

Floats = NDArray[np.float64]
NS_PER_S = 1e9
MANY = 3  # GPUs; more are not named one by one
# A poll that failed, as of a GPU that fell off the bus.
_UNREAD = pl.all_horizontal(pl.col("power_instant_mw", "power_average_mw", "energy_mj").is_null())
HOLE_S = 0.5  # between readings of a GPU; the run's verdict on its sensor has the same bound


@dataclass(frozen=True)
class GpuData:
    """The readings of one GPU, one entry a poll, in order of time; a missing value is NaN."""

    host: str
    gpu: int
    t_s: Floats
    sensor_s: Floats  # when the instant sensor last updated
    instant_w: Floats
    average_w: Floats
    counter_j: Floats
    idle_before_w: Mapping[str, float]  # by source: counter, instant, average
    idle_after_w: Mapping[str, float]
    sensors: Mapping[str, Mapping[str, float]]  # by source: period_ns, window_ns, lag_ns

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
    """One engine instance: its GPUs and, where the engine wrote them, its steps and segments."""

    instance: int | None  # None: GPUs that no instance uses
    gpus: tuple[GpuData, ...]
    requests: pl.DataFrame  # request_id, sent_s, first_token_s, last_token_s, done_s, input_tokens, ...
    steps: pl.DataFrame | None  # STEPS and start_s, end_s, in order of time
    segments: pl.DataFrame | None
    clock_error_s: float  # bound of the host's clock offset


@dataclass(frozen=True)
class RunData:
    """A run as attribution sees it; `window_ns` is on the replayer's clock, everything else counts from its start."""

    run: Run
    window_ns: tuple[int, int]
    instances: tuple[InstanceData, ...]
    requests: pl.DataFrame
    unrecorded: pl.Series  # request ids of the trace that are not in requests.parquet
    scope: str
    notes: tuple[str, ...] = field(default=())
    cpu: tuple[CpuData, ...] | None = None  # None: the run has no table of it

    @property
    def duration_s(self) -> float:
        """The window's length."""
        return (self.window_ns[1] - self.window_ns[0]) / NS_PER_S


SCOPES = ("gpu", "node")


def open_run(path: str | Path) -> Run:
    """The run directory at `path`. Raises `RunError` when it is none, or a key of its manifest is of a wrong type."""
    run = Run.open(path)
    check_manifest(run)
    return run


def load_run(run: Run, scope: str = "gpu") -> RunData:
    """Collect what attribution needs from `run`.

    `scope` is `gpu` (the GPUs of the engine instances) or `node` (every GPU that was sampled). Raises `RunError` or
    `AnalysisError` with the file and column or key that is missing or wrong.
    """
    if scope not in SCOPES:
        raise AnalysisError(f"scope '{scope}' is unknown; use {' or '.join(SCOPES)}")
    check_manifest(run)
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
    power = run.scan("power").collect()
    if power.is_empty():
        raise AnalysisError(f"{run.path / 'power.parquet'}: has no rows, so there is no energy to attribute")
    hosts = _by_host(run)
    requests = _requests(run, hosts)
    steps = _steps(run, hosts)
    segments = run.scan("segments").collect() if run.has("segments") else None
    polled = _power(run, power, hosts)
    # Of a GPU that never had a value the rows stay: what is missing is said where they are read.
    power = polled.filter(~_UNREAD | _UNREAD.all().over("host", "gpu"))
    wanted = _wanted_gpus(run, power, scope)
    unrecorded, notes = _state(run, requests["request_id"])
    window, remarks = _window(run, requests, steps, power, wanted)
    notes += remarks
    if steps is not None and segments is not None:
        remark = check_segments(run, segments, steps)
        notes += [remark] if remark else []
    requests = _seconds(requests, window[0], ("scheduled_ns", "sent_ns", "first_token_ns", "last_token_ns", "done_ns"))
    steps = None if steps is None else _seconds(steps, window[0], ("start_ns", "end_ns"))
    instances = tuple(
        InstanceData(
            instance=instance,
            gpus=tuple(_gpu(run, power, host, gpu, window[0]) for host, gpu in gpus),
            requests=requests.filter(pl.col("instance") == instance) if instance is not None else requests.clear(),
            steps=_of(steps, instance),
            segments=_of(segments, instance),
            clock_error_s=float(hosts.get(gpus[0][0], {}).get("offset_error_ns") or 0) / NS_PER_S,
        )
        for instance, gpus in wanted
    )
    notes += _unread(polled, instances, window[0])
    notes += _holes(instances, (window[1] - window[0]) / NS_PER_S)
    cpu = _cpu(run, hosts, window[0])
    return RunData(run, window, instances, requests, unrecorded, scope, tuple(notes), cpu)


def _state(run: Run, recorded: pl.Series) -> tuple[pl.Series, list[str]]:
    """The trace's requests that requests.parquet lacks, and what the manifest says against the run."""
    manifest, notes = run.manifest, []
    planned = run.scan("trace").select("request_id").collect().to_series() if run.has("trace") else recorded.clear()
    unrecorded = planned.filter(~planned.is_in(recorded.implode())).unique(maintain_order=True)
    if manifest.get("state") != "complete":
        count = (manifest.get("requests") or {}).get("planned") or len(planned) or "an unknown number of"
        notes.append(
            f"the run is not complete (state: {manifest.get('state')}): {len(recorded)} of {count} planned requests "
            "recorded"
        )
    failed = [str(v.get("name")) for v in manifest.get("verdicts") or [] if v.get("ok") is False]
    if failed:
        notes.append(f"the run failed its verdicts {', '.join(failed)}")
    return unrecorded, notes


def _unread(polled: pl.DataFrame, instances: tuple[InstanceData, ...], zero_ns: int) -> list[str]:
    """What to say of GPUs that could not be read at times: the sampler then writes rows without values."""
    said = []
    for gpu in (gpu for instance in instances for gpu in instance.gpus):
        t_ns = polled.filter(_UNREAD & (pl.col("host") == gpu.host) & (pl.col("gpu") == gpu.gpu))["t_ns"]
        if len(t_ns):
            first_s = (t_ns[0] - zero_ns) / NS_PER_S
            said.append(f"{gpu.name}: {len(t_ns)} polls failed, the first at {first_s:.0f} s")
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
        t_s = (read["t_ns"] - (zero_ns + _offset_ns(hosts, host))).cast(pl.Float64) / NS_PER_S
        # From its own lowest value: a double would not tell the microjoules of a counter near 2^64.
        energy_j = (read["energy_uj"] - read["energy_uj"].min()).cast(pl.Float64) / 1e6
        result.append(CpuData(str(domain) if one_host else f"{domain} on {host}", t_s.to_numpy(), energy_j.to_numpy()))
    return tuple(result)


def _holes(instances: tuple[InstanceData, ...], duration_s: float) -> list[str]:
    """What to say of stretches in the window without a reading of a GPU."""
    said: dict[str, list[str]] = {}
    for gpu in (gpu for instance in instances for gpu in instance.gpus):
        gap_s = np.where((gpu.t_s[1:] > 0) & (gpu.t_s[:-1] < duration_s), np.diff(gpu.t_s), 0.0)
        if np.any(gap_s > HOLE_S):
            i = int(np.argmax(gap_s))
            text = f"no power reading for {gap_s[i]:.1f} s at {gpu.t_s[i]:.0f} s, among {np.sum(gap_s > HOLE_S)} holes"
            said.setdefault(f"{text} of more than {HOLE_S} s", []).append(gpu.name)
    return [f"{names(gpus)}: {text}" for text, gpus in said.items()]


def names(gpus: Sequence[str]) -> str:
    """Several GPUs as messages call them, each once."""
    unique = list(dict.fromkeys(gpus))
    return ", ".join(unique) if len(unique) <= MANY else f"{len(unique)} GPUs ({unique[0]} to {unique[-1]})"


def _by_host(run: Run) -> dict[str, dict[str, Any]]:
    """The manifest's `hosts` by name."""
    return {str(entry.get("host")): entry for entry in run.manifest.get("hosts") or []}


def _offset_ns(hosts: Mapping[str, Mapping[str, Any]], host: Any) -> int:
    """Clock of `host` minus the replayer's."""
    return int(hosts.get(str(host), {}).get("offset_ns") or 0)


def _requests(run: Run, hosts: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame:
    """requests.parquet with times on the replayer's clock."""
    frame = run.scan("requests").collect()
    if frame["request_id"].null_count() or frame["request_id"].n_unique() < frame.height:
        raise RunError(f"{run.path / 'requests.parquet'}: column 'request_id' has a null or a repeated id")
    workers = [w for w in run.manifest.get("workers") or [] if w.get("worker") is not None]
    offsets = {int(w["worker"]): _offset_ns(hosts, w.get("host")) for w in workers}
    if any(offsets.values()):
        offset = pl.col("worker").replace_strict(offsets, default=0, return_dtype=pl.Int64)
        frame = frame.with_columns(pl.col("^.*_ns$").exclude("chunk_ns") - offset)
    return frame


def _steps(run: Run, hosts: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame | None:
    """steps.parquet with times on the replayer's clock, in order of instance and step; None where there is none."""
    if not run.has("steps"):
        return None
    path = run.path / "steps.parquet"
    frame = run.scan("steps").collect()
    needed = ("instance", "step", "start_ns", "end_ns", "prefill_tokens", "decode_tokens")
    for name in (*needed, "context_tokens", "prefill_attention"):
        if frame[name].null_count():
            raise RunError(f"{path}: column '{name}' has a null in row {frame[name].is_null().arg_max()}")
    frame = frame.sort("instance", "step")
    offsets = {int(i["instance"]): _offset_ns(hosts, i.get("host")) for i in _manifest_instances(run)}
    if any(offsets.values()):
        offset = pl.col("instance").replace_strict(offsets, default=0, return_dtype=pl.Int64)
        frame = frame.with_columns(pl.col("start_ns") - offset, pl.col("end_ns") - offset)
    wrong = frame.filter(pl.col("end_ns") < pl.col("start_ns"))
    if wrong.height:
        raise RunError(f"{path}: instance {wrong['instance'][0]}, step {wrong['step'][0]}: end_ns is before start_ns")
    twice = frame.filter(pl.struct("instance", "step").is_duplicated())
    if twice.height:
        raise RunError(f"{path}: instance {twice['instance'][0]}, step {twice['step'][0]} occurs twice")
    return frame


def _power(run: Run, power: pl.DataFrame, hosts: Mapping[str, Mapping[str, Any]]) -> pl.DataFrame:
    """power.parquet with times on the replayer's clock; a null host is '' unless the run has only one."""
    path = run.path / "power.parquet"
    for name in ("t_ns", "gpu"):
        if power[name].null_count():
            raise RunError(f"{path}: column '{name}' has a null in row {power[name].is_null().arg_max()}")
    named = {str(i["host"]) for i in _manifest_instances(run) if i.get("host")}
    power = power.with_columns(pl.col("host").fill_null(named.pop() if len(named) == 1 else ""))
    offsets = {host: _offset_ns(hosts, host) for host in power["host"].unique()}
    offset = pl.col("host").replace_strict(offsets, default=0, return_dtype=pl.Int64)
    return power.with_columns(pl.col("t_ns") - offset, pl.col("sensor_ns") - offset).sort("t_ns", maintain_order=True)


def _manifest_instances(run: Run) -> list[dict[str, Any]]:
    """The manifest's `instances`, each with its number."""
    instances = run.manifest.get("instances")
    if not isinstance(instances, list) or not instances:
        raise RunError(f"{run.path / MANIFEST}: 'instances' is missing or empty; it says which GPUs an engine used")
    for entry in instances:
        if entry.get("instance") is None:
            raise RunError(f"{run.path / MANIFEST}: an entry of 'instances' has no key 'instance'")
    return instances


def _wanted_gpus(run: Run, power: pl.DataFrame, scope: str) -> list[tuple[int | None, list[tuple[str, int]]]]:
    """Per instance the (host, gpu) pairs to account for; with scope `node` the unused GPUs come last, under None."""
    sampled = set(power.select("host", "gpu").unique().iter_rows())
    wanted: list[tuple[int | None, list[tuple[str, int]]]] = []
    for entry in _manifest_instances(run):
        number = int(entry["instance"])
        if not entry.get("gpus"):
            raise AnalysisError(
                f"{run.path / MANIFEST}: instance {number} names no 'gpus', so no power belongs to it; "
                "replay with --gpus where the server is attached"
            )
        host = str(entry.get("host") or "")
        if not any(name == host for name, _ in sampled) and len({name for name, _ in sampled}) == 1:
            host = next(name for name, _ in sampled)  # one host only: whatever the writer called it
        gpus = [(host, int(gpu)) for gpu in entry["gpus"]]
        for host_gpu in gpus:
            if host_gpu not in sampled:
                raise AnalysisError(
                    f"{run.path / 'power.parquet'}: has no readings of gpu {host_gpu[1]}"
                    f"{f' on {host}' if host else ''}, which {MANIFEST} gives to instance {number}"
                )
        wanted.append((number, gpus))
    used = {gpu for _, gpus in wanted for gpu in gpus}
    if scope == "node" and sampled - used:
        wanted.append((None, sorted(sampled - used)))
    return wanted


def _window(
    run: Run,
    requests: pl.DataFrame,
    steps: pl.DataFrame | None,
    power: pl.DataFrame,
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
        ends.append(None if steps is None else steps["end_ns"].max())
        end = max((int(e) for e in ends if isinstance(e, int)), default=None)
        notes.append("measure_end_ns is missing: the window ends with the last response or engine step")
    if not isinstance(start, int) or not isinstance(end, int):
        raise AnalysisError(f"{run.path}: no request was sent, so there is no window to account for")
    if end <= start:
        raise RunError(f"{run.path / MANIFEST}: measure_end_ns is not after measure_start_ns")
    schema = {"host": pl.String, "gpu": pl.UInt16}
    gpus = pl.DataFrame([gpu for _, group in wanted for gpu in group], schema=schema, orient="row")
    rows = power.join(gpus, on=["host", "gpu"]).group_by("host", "gpu")
    read = rows.agg(a=pl.col("t_ns").min(), b=pl.col("t_ns").max())
    cut = (max(start, *read["a"].to_list()), min(end, *read["b"].to_list()))
    if cut[1] <= cut[0]:
        raise AnalysisError(f"{run.path / 'power.parquet'}: has no readings within the window ({start} to {end} ns)")
    lost_s = ((cut[0] - start) + (end - cut[1])) / NS_PER_S
    if lost_s > 0:
        notes.append(f"power readings leave out {lost_s:.3f} s at the window's edges, so it was cut to what they cover")
    return cut, notes


def _seconds(frame: pl.DataFrame, zero_ns: int, names: tuple[str, ...]) -> pl.DataFrame:
    """`frame` with a `*_s` column from `zero_ns` beside each of the `*_ns` columns `names`."""
    return frame.with_columns(((pl.col(n) - zero_ns) / NS_PER_S).alias(n.removesuffix("_ns") + "_s") for n in names)


def _of(frame: pl.DataFrame | None, instance: int | None) -> pl.DataFrame | None:
    """The rows of `instance`, or None where there are none."""
    if frame is None or instance is None:
        return None
    rows = frame.filter(pl.col("instance") == instance)
    return rows if rows.height else None


def _gpu(run: Run, power: pl.DataFrame, host: str, gpu: int, zero_ns: int) -> GpuData:
    """The readings and the manifest's figures of one GPU."""
    rows = power.filter((pl.col("host") == host) & (pl.col("gpu") == gpu))

    def column(expr: pl.Expr) -> Floats:
        return rows.select(expr.cast(pl.Float64).fill_null(float("nan"))).to_series().to_numpy()

    entries = [e for e in run.manifest.get("gpus") or [] if e.get("gpu") == gpu]
    entry = next((e for e in entries if str(e.get("host") or host) == host), entries[0] if len(entries) == 1 else {})
    return GpuData(
        host=host,
        gpu=gpu,
        t_s=column((pl.col("t_ns") - zero_ns) / NS_PER_S),
        sensor_s=column((pl.col("sensor_ns") - zero_ns) / NS_PER_S),
        instant_w=column(pl.col("power_instant_mw") / 1e3),
        average_w=column(pl.col("power_average_mw") / 1e3),
        counter_j=column((pl.col("energy_mj") - pl.col("energy_mj").min()) / 1e3),
        idle_before_w=_watts(entry.get("idle_power_w")),
        idle_after_w=_watts(entry.get("idle_power_after_w")),
        sensors={k: v for k, v in (entry.get("sensors") or {}).items() if isinstance(v, dict)},
    )


def _watts(document: Any) -> dict[str, float]:
    """The sources that have a figure."""
    return {k: float(v) for k, v in document.items() if v is not None} if isinstance(document, dict) else {}
