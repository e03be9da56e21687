"""What a run directory must keep to before it is believed: the manifest's types, and tables that fit each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from replay.rundir import MANIFEST, Run
from tracegen.errors import RunError

MOST_GPU = 65535  # what column `gpu` holds
MOST_STEP = 2**62  # no engine gets that far; beyond 2^63 a number fits no signed integer
BACKWARDS_NS = 10_000_000  # steps may overlap; one that begins or ends earlier by more is out of order
_NUMBER = (int, float)
_WATTS = {"*": _NUMBER}
# What analysis reads of a manifest: a list of one shape, an object by key (`*`: any other key), or a scalar's types.
_SHAPES: dict[str, Any] = {
    "state": str,
    "engine": str,
    "trace_sha256": str,
    "measure_start_ns": int,
    "measure_end_ns": int,
    "requests": {"planned": int},
    "instances": [
        {
            "instance": int,
            "host": str,
            "gpus": [int],
            "tp": int,
            "freq_mhz": _NUMBER,
            "power_cap_w": _NUMBER,
            "model": str,
            "recorder": {"steps": int, "missing": int, "overhead_us_mean": _NUMBER},
        },
    ],
    "gpus": [
        {
            "host": str,
            "gpu": int,
            "idle_power_w": _WATTS,
            "idle_power_after_w": _WATTS,
            "sensors": {"*": {"*": _NUMBER}},
        },
    ],
    "hosts": [{"host": str, "offset_ns": _NUMBER, "offset_error_ns": _NUMBER}],
    "workers": [{"worker": int, "host": str}],
    "clock_anchors": [{"monotonic_ns": int, "unix_ns": int}],
    "verdicts": [{"name": str, "ok": bool}],
}


def check_manifest(run: Run) -> None:
    """Raise `RunError` naming the key of `run`'s manifest whose value is of another type, or cannot be.

    A missing key is none of that.
    """
    for key, shape in _SHAPES.items():
        if run.manifest.get(key) is not None:
            _check(run.manifest[key], shape, key, f"{run.path / MANIFEST}")
    _check_owners(run.manifest.get("instances") or [], f"{run.path / MANIFEST}")
    for i, gpu in enumerate(run.manifest.get("gpus") or []):
        sensors = {f"sensors.{name}": figures for name, figures in (gpu.get("sensors") or {}).items()}
        known = {key: gpu.get(key) for key in ("idle_power_w", "idle_power_after_w")} | sensors
        for key, figures in known.items():
            low = {name: value for name, value in (figures or {}).items() if value is not None and value < 0}
            for name, value in low.items():
                raise RunError(
                    f"{run.path / MANIFEST}: key 'gpus[{i}].{key}.{name}' is {value:g}; it cannot be negative"
                )


def _check_owners(instances: Sequence[Mapping[str, Any]], source: str) -> None:
    """Raise where two instances have one number, or a GPU is given out twice: its joules would count twice."""
    numbers: set[int] = set()
    owned: set[tuple[str, int]] = set()
    for i, entry in enumerate(instances):
        number = entry.get("instance")
        if number in numbers:
            raise RunError(f"{source}: key 'instances[{i}].instance' is {number}, as is another's")
        numbers |= set() if number is None else {number}
        for k, gpu in enumerate(entry.get("gpus") or []):
            key = f"{source}: key 'instances[{i}].gpus[{k}]' is {gpu}"
            if not 0 <= gpu <= MOST_GPU:
                raise RunError(f"{key}, not an NVML index from 0 to {MOST_GPU}")
            owner = str(entry.get("host") or ""), gpu
            if owner in owned:
                raise RunError(f"{key}, which is given out already; a GPU belongs to one instance, once")
            owned.add(owner)


def _check(value: Any, shape: Any, key: str, source: str) -> None:
    """Compare `value` with `shape`, and what is in it."""
    wanted = list if isinstance(shape, list) else dict if isinstance(shape, dict) else shape
    if not isinstance(value, wanted) or (isinstance(value, bool) and shape is not bool):
        names = {list: "a list", dict: "an object", int: "a whole number", str: "a text", bool: "true or false"}
        text = str(value)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise RunError(f"{source}: key '{key}' is {shown!r}, not {names.get(wanted, 'a number')}")
    if isinstance(shape, list):
        for i, item in enumerate(value):
            _check(item, shape[0], f"{key}[{i}]", source)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            inner = shape.get(name, shape.get("*"))
            if inner is not None and item is not None:
                _check(item, inner, f"{key}.{name}", source)


def check_requests(run: Run, requests: pl.DataFrame) -> None:
    """Raise `RunError` where `requests` have an id twice, an instance that is none, or an end before its beginning.

    Times of one row may be on any one clock.
    """
    source = run.path / "requests.parquet"
    rows = requests.with_row_index("row")
    _no_nulls(rows, ("request_id",), source)
    twice = rows.filter(~pl.col("request_id").is_first_distinct())
    if twice.height:
        row, request = twice.select("row", "request_id").row(0)
        raise RunError(f"{source}: row {row}, column 'request_id': {request} occurs twice")
    _known_instances(run, rows, source)
    for name, since in (("first_token_ns", "sent_ns"), ("last_token_ns", "first_token_ns"), ("done_ns", "sent_ns")):
        wrong = rows.filter(pl.col(name) < pl.col(since))
        if wrong.height:
            row, request = wrong.select("row", "request_id").row(0)
            raise RunError(f"{source}: row {row}, column '{name}': is before {since} (request {request})")


def check_steps(run: Run, steps: pl.DataFrame) -> None:
    """Raise `RunError` where `steps`, in order of instance and step, are no engine's.

    That is where they end before they begin, come twice, belong to no instance, or go back in time.
    """
    source = run.path / "steps.parquet"
    _known_instances(run, steps.with_row_index("row"), source, rows_are_sorted=True)
    earlier = pl.col("start_ns", "end_ns").shift().over("instance")
    rows = steps.with_columns(earlier.name.prefix("before_"), pl.col("step").shift().over("instance").alias("last"))
    back = [(f"{n}_ns", pl.col(f"{n}_ns") < pl.col(f"before_{n}_ns") - BACKWARDS_NS) for n in ("start", "end")]
    for where, why in (
        (pl.col("end_ns") < pl.col("start_ns"), ": end_ns is before start_ns"),
        (pl.col("step") == pl.col("last"), " occurs twice"),
        (pl.col("step") > MOST_STEP, f"column 'step' is beyond {MOST_STEP}"),
        *(
            (where, f": {name} is before that of step {{last}}; an engine's steps follow each other")
            for name, where in back
        ),
    ):
        wrong = rows.filter(where)
        if wrong.height:
            row = wrong.row(0, named=True)
            raise RunError(f"{source}: instance {row['instance']}, step {row['step']}{why.format(**row)}")


def _known_instances(run: Run, rows: pl.DataFrame, source: Path, *, rows_are_sorted: bool = False) -> None:
    """Raise where column `instance` has a number that the manifest does not have; null is for who reads it to judge."""
    known = sorted(int(i["instance"]) for i in run.manifest.get("instances") or [] if i.get("instance") is not None)
    strange = rows.filter(~pl.col("instance").is_in(known))
    if strange.height and known:
        row, instance = strange.select("row", "instance").row(0)
        where = "" if rows_are_sorted else f"row {row}, "
        raise RunError(
            f"{source}: {where}column 'instance': {instance} is none of {MANIFEST}'s instances "
            f"({', '.join(map(str, known))})"
        )


def _no_nulls(rows: pl.DataFrame, names: Sequence[str], source: Path) -> None:
    """Raise naming the first row that has a null in one of `names`."""
    for name in names:
        if rows[name].null_count():
            raise RunError(f"{source}: column '{name}' has a null in row {rows[name].is_null().arg_max()}")


def check_segments(run: Run, segments: pl.DataFrame, steps: pl.DataFrame) -> str | None:
    """Raise `RunError` where `segments` contradict themselves or a complete run's `steps`.

    Of a run that was cut off, segments may reach beyond the last step written: what to say about that, else None.
    """
    source = run.path / "segments.parquet"
    _no_nulls(segments, ("instance",), source)
    _known_instances(run, segments.with_row_index("row"), source)
    rows = segments.with_row_index("row").sort("instance", "request_id", "first_step", "row")
    before = pl.col("last_step").shift().over("instance", "request_id")
    twice = rows.filter(pl.col("request_id").is_not_null() & (pl.col("first_step") <= before)).sort("row")
    if twice.height:
        row = twice.row(0, named=True)
        raise RunError(
            f"{source}: row {row['row']}, column 'first_step': request {row['request_id']} is in step "
            f"{row['first_step']} by another row already; a request has at most one segment a step"
        )
    last = steps.group_by("instance").agg(pl.col("step").max().alias("end"))
    beyond = rows.join(last, on="instance").filter(pl.col("last_step") > pl.col("end")).sort("row")
    if beyond.is_empty():
        return None
    if run.manifest.get("state") == "complete":
        row = beyond.row(0, named=True)
        raise RunError(
            f"{source}: row {row['row']}, column 'last_step': {row['last_step']} is beyond the last step "
            f"{row['end']} in steps.parquet of instance {row['instance']}, though the run is complete: rows of "
            "steps.parquet were lost; replay again"
        )
    return f"{beyond.height} segments reach beyond the last engine step recorded and were cut there"
