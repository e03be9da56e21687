"""Whether a run is whole, valid and reproducible, and which commands repeat it: `replay check`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from replay.again import find_trace, options_of, replay_command
from replay.clock import NS_PER_S
from replay.plan import RunOptions, simulated_profile
from replay.records import left_over
from replay.rundir import Run, row_groups, table_batches
from replay.sim.profile import constants, profile_of_constants
from replay.summary import ENDED, judged, last_on_record, measured, open_run, stretches, was_killed, what_now
from replay.tables import TABLES
from replay.verdicts import SENSOR_BOUND, SENSOR_GAP_NS
from tracegen.commands import commands_of
from tracegen.console import plural
from tracegen.errors import ReplayError, RunError, WattraceError
from tracegen.schema import read_metadata

_NAMED = 3  # requests that are named where more are concerned
Ids = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Finding:
    """One question and its answer; `ok` is None where the question does not arise or does not decide."""

    name: str
    ok: bool | None
    why: str


def check(run_dir: Path) -> dict[str, Any]:
    """`whole`, `valid`, `reproducible` (true or false; `valid` null before a run was judged), why, and `commands`.

    Reads every byte of every table, and changes nothing. Raises `RunError` where there is no run that `replay` made.
    """
    run = open_run(run_dir)
    whole = list(_wholeness(run))
    options, again = _reproducibility(run)
    answer = judged(run.manifest)
    return {
        "run": str(run_dir),
        "state": run.manifest["state"],
        "simulated": run.simulated,
        "whole": all(finding.ok is not False for finding in whole),
        **answer,
        "reproducible": all(finding.ok is not False for finding in again),
        "wholeness": [asdict(finding) for finding in whole],
        "reproducibility": [asdict(finding) for finding in again],
        "commands": [] if options is None else _commands(run, options),
    }


def good(found: Mapping[str, Any]) -> bool:
    """Whether the run is whole and valid; the rest is a remark."""
    return bool(found["whole"] and found["valid"])


def _wholeness(run: Run) -> Iterable[Finding]:
    """Whether all is there that the run was to measure."""
    state, manifest = run.manifest["state"], run.manifest
    ended = state
    if was_killed(run):
        ended += f": it was killed; {what_now(run)}"
    elif state not in ENDED:
        ended += ": it still goes on"
    yield Finding("state", state == "complete", ended + (f": {manifest['failure']}" if "failure" in manifest else ""))
    damaged, rows = {}, {}
    for table in (name for name in TABLES if (run.path / f"{name}.parquet").exists()):
        try:
            rows[table] = _read_through(run, table)
        except RunError as error:
            damaged[table] = str(error)
    fine = f"every checksum is right; rows: {', '.join(f'{table} {count:,}' for table, count in rows.items())}"
    yield Finding("tables", not damaged, "; ".join(damaged.values()) or fine)
    for look in (_requests, _power, _steps):
        try:
            found = look(run)
        except RunError:  # a table that it needs is damaged, which was said
            continue
        yield found
    yield _left_over(run)


def _read_through(run: Run, table: str) -> int:
    """Read all of `table`; its number of rows. Raises `RunError` where it is damaged."""
    if not run.has(table):
        return 0  # a folder in which no part was written yet
    columns = [*TABLES[table]]
    paths = {group.path for group in row_groups(run.path, table, columns[0])}
    extra = {name for path in paths for name in pq.read_schema(path).names} - set(columns)
    return sum(batch.height for batch in table_batches(run.path, table, [*columns, *sorted(extra)]))


def _ids(run: Run, table: str) -> Ids:
    """The request ids of `table`, in its order."""
    parts = [batch["request_id"].to_numpy() for batch in run.batches(table, ["request_id"])] if run.has(table) else []
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _requests(run: Run) -> Finding:
    """Whether each request of the trace is on record exactly once."""
    name = "requests"
    if not run.has("trace"):
        return Finding(name, False, "there is no trace.parquet that says what was to be sent")
    planned, early = _ids(run, "trace"), _ids(run, "warmup")
    recorded = np.concatenate([_ids(run, name), early])
    unrecorded = np.setdiff1d(planned, recorded)
    once, counts = np.unique(recorded, return_counts=True)
    wrong = [
        _some(unrecorded, "without a record") + _due(run, unrecorded),
        _some(once[counts > 1], "on record more than once"),
        _some(np.setdiff1d(once, planned), "on record that the trace lacks"),
    ]
    said = [text for text in wrong if text]
    asked = run.manifest["arguments"].get("warmup_ns")
    if asked and unrecorded.size and run.manifest["state"] == "complete" and not run.has("warmup"):
        said.append("warmup.parquet, which has what was due in the warm-up, is missing")
    if logged := left_over(run.path):
        said.append(f"{plural(logged, 'record')} still in the load workers' logs: 'replay run --resume' stores them")
    why = f"; {'; '.join(said)}" if said else ", each once" + (f", {early.size:,} in the warm-up" if early.size else "")
    of = plural(planned.size, "request")
    return Finding(name, not said, f"{np.isin(planned, once).sum():,} of {of} on record{why}")


def _due(run: Run, ids: Ids) -> str:
    """How many of the requests were due before the last moment on record; empty where that tells nothing."""
    last_ns = last_on_record(run)
    windows = stretches(run.manifest, last_ns)
    if not ids.size or last_ns is None or len(windows) != 1:  # of a run that went on, times have moved on the trace's
        return ""
    until = pl.col("request_id").is_in(ids) & (pl.col("arrival_ns") <= last_ns - windows[0][0])
    due = sum(batch.filter(until).height for batch in run.batches("trace", ["request_id", "arrival_ns"]))
    return f", {due:,} of them due before the last moment on record"


def _some(ids: Ids, what: str) -> str:
    """How many requests, and the first of them; empty for none."""
    if not ids.size:
        return ""
    more = ", ..." if ids.size > _NAMED else ""
    return f"{ids.size:,} {what} (request_id {', '.join(map(str, ids[:_NAMED].tolist()))}{more})"


def _power(run: Run) -> Finding:
    """How much of the window no power was read in, on the GPU that was read worst."""
    name, gpus = "power", [gpu for entry in run.manifest["instances"] for gpu in entry["gpus"]]
    if not run.has(name):
        return Finding(name, None if not gpus else False, "no power was read")
    windows = measured(run.manifest, last_on_record(run))
    if not windows:
        return Finding(name, None, "the run had not begun, or was in its warm-up")
    unread_ns: dict[int, int] = defaultdict(int)
    last_ns = dict.fromkeys(gpus, windows[0][0])
    told = ~pl.all_horizontal(pl.col("power_instant_mw", "power_average_mw", "energy_mj").is_null())
    wanted = ["t_ns", "gpu", "power_instant_mw", "power_average_mw", "energy_mj"]
    for batch in run.batches(name, wanted):
        for readings in batch.filter(told & pl.col("gpu").is_in(gpus)).sort("t_ns").partition_by("gpu"):
            gpu, t_ns = readings["gpu"][0], readings["t_ns"].to_numpy()
            unread_ns[gpu] += _gaps_ns(np.concatenate([[last_ns[gpu]], t_ns]), windows)
            last_ns[gpu] = int(t_ns[-1])
    for gpu in gpus:
        unread_ns[gpu] += _gaps_ns(np.array([last_ns[gpu], windows[-1][1]]), windows)
    lasted_ns = sum(end_ns - start_ns for start_ns, end_ns in windows)
    worst = max(gpus, key=lambda gpu: unread_ns[gpu], default=None)
    silent_ns = 0 if worst is None else unread_ns[worst]
    of = "" if not silent_ns else f" on GPU {worst}"
    why = f"{silent_ns / NS_PER_S:,.1f} of {lasted_ns / NS_PER_S:,.1f} s without a reading{of}"
    return Finding(name, silent_ns <= (1 - SENSOR_BOUND) * lasted_ns, why)


def _gaps_ns(t_ns: npt.NDArray[np.int64], windows: Iterable[tuple[int, int]]) -> int:
    """How much of the `windows` lies between readings at `t_ns` that are too far apart."""
    long = np.diff(t_ns) > SENSOR_GAP_NS
    starts, ends = t_ns[:-1][long], t_ns[1:][long]
    return int(sum(np.clip(np.minimum(ends, b) - np.maximum(starts, a), 0, None).sum() for a, b in windows))


def _steps(run: Run) -> Finding:
    """Whether the engines' steps are without gaps."""
    name = "steps"
    if not run.has(name):
        return Finding(name, None, run.manifest.get("no_steps") or "no engine steps are on record")
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    count: dict[int, int] = defaultdict(int)
    for batch in run.batches(name, ["instance", "step"]):
        ends = batch.group_by("instance").agg(low=pl.col("step").min(), high=pl.col("step").max(), rows=pl.len())
        for instance, low, high, rows in ends.iter_rows():
            first[instance] = min(low, first.get(instance, low))
            last[instance] = max(high, last.get(instance, high))
            count[instance] += rows
    missing = sum(last[i] - first[i] + 1 - count[i] for i in count)
    return Finding(name, missing == 0, f"{sum(count.values()):,} engine steps, {missing:,} missing")


def _left_over(run: Run) -> Finding:
    """What a run that ended would have put together or removed."""
    parts = [path.name for path in run.path.glob("*.parquet") if path.is_dir()]
    others = [path.name + "/" * path.is_dir() for path in run.path.iterdir() if path.name.startswith(".")]
    others += [f"{path.name}/" for path in run.path.glob("*.log") if path.is_dir()]
    said = [f"still in parts: {', '.join(sorted(parts))}"] * bool(parts)
    said += [f"left over: {', '.join(sorted(others))}"] * bool(others)
    whole = not said or run.manifest["state"] != "complete"  # what is left of a run that has not ended is no fault
    return Finding("left_over", whole, "; ".join(said) or "every table is one file, and nothing else is left")


def _reproducibility(run: Run) -> tuple[RunOptions | None, list[Finding]]:
    """The run's options, where they are known, and what stands against repeating it."""
    manifest = run.manifest
    try:
        options = options_of(manifest)
    except RunError as error:
        return None, [Finding("arguments", False, str(error))]
    found = [Finding("arguments", True, "all are in the manifest, but for keys and tokens"), _trace(run, options)]
    if manifest["engine"] == "attached" or options.engine.startswith(("http://", "https://")):
        why = f"the server at {options.engine} was started by somebody else, who has to start it as it was"
        found.append(Finding("engine", None, why))
    elif manifest.get("simulated_profile"):
        found.append(_constants(manifest["simulated_profile"], options))
    found.append(Finding("seed", True, f"seed {options.seed}"))
    return options, [*found, _versions(manifest["versions"])]


def _trace(run: Run, options: RunOptions) -> Finding:
    """Whether the trace is there, or at least the run's own copy of what was sent."""
    path, sha = find_trace(run, options), str(run.manifest["trace_sha256"])
    if path is not None:
        return Finding("trace", True, f"{path} is the file that was replayed (sha256 {sha[:12]}...)")
    gone = f"{options.trace} is {'another file now' if options.trace.exists() else 'not there'}"
    if not run.has("trace"):
        return Finding("trace", False, f"{gone}, and the run has no trace.parquet")
    return Finding("trace", True, f"{gone}; the run's own trace.parquet has the requests that it was to send")


def _constants(then: Mapping[str, Any], options: RunOptions) -> Finding:
    """Whether the simulator still has the constants that the run was computed with."""
    try:
        same = constants(profile_of_constants(then["constants"])) == constants(simulated_profile(options))
    except (ReplayError, KeyError) as error:
        return Finding("simulator", False, f"its node or model cannot be loaded any more: {error}")
    if same:
        return Finding("simulator", True, "its constants are the same today")
    return Finding("simulator", False, "its constants have changed since; the manifest has those of then")


def _versions(then: Mapping[str, str]) -> Finding:
    """Which packages are others today."""
    others = []
    for package, was in then.items():
        if package in {"python", "platform"} or package.startswith("engine "):
            continue
        try:
            now = version(package)
        except PackageNotFoundError:
            now = "not installed"
        if now != was:
            others.append(f"{package} {was} then, {now} now")
    served = [f"{name.removeprefix('engine ')} {was}" for name, was in then.items() if name.startswith("engine ")]
    why = "; ".join(others) or "the packages here are those of then"
    return Finding("versions", None if others else True, why + (f"; served by {', '.join(served)}" if served else ""))


def _commands(run: Run, options: RunOptions) -> list[str]:
    """The lines that make the trace, where it says how it was made, and replay it as the run did."""
    path, own = find_trace(run, options), run.path / "trace.parquet"
    output = run.path.with_name(f"{run.name}-again")
    made: list[str] = []
    try:
        made = commands_of(read_metadata(path or own), str(path or options.trace))
    except WattraceError:
        return made  # neither is readable: there is nothing to replay
    if path is not None:
        return [*made, replay_command(options, output)]
    return [replay_command(options, output, own)]


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `check` found, for people, but for the commands."""
    marks = {True: "ok  ", False: "FAIL", None: "-   "}
    mark = "SIMULATED  " if found["simulated"] else ""
    valid = found["valid"]
    said = [f"{mark}{found['run']}"]
    whole = "yes" if found["whole"] else "NO"
    said += [f"whole: {whole}", *(f"  {marks[f['ok']]}  {f['name']:<10} {f['why']}" for f in found["wholeness"])]
    said.append(f"valid: {'not judged, the run has not ended' if valid is None else 'yes' if valid else 'NO'}")
    said += [f"  FAIL  {why}" for why in found["invalid_because"] or ()]
    said.append(f"reproducible: {'yes' if found['reproducible'] else 'NO'}")
    said += [f"  {marks[f['ok']]}  {f['name']:<10} {f['why']}" for f in found["reproducibility"]]
    return said
