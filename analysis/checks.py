"""What a run directory must keep to before it is believed: the manifest's types, and segments that fit their steps."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from replay.rundir import MANIFEST, Run
from tracegen.errors import RunError

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
        {"instance": int, "host": str, "gpus": [int], "tp": int, "freq_mhz": _NUMBER, "model": str},
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
    "verdicts": [{"name": str, "ok": bool}],
}


def check_manifest(run: Run) -> None:
    """Raise `RunError` naming the key of `run`'s manifest whose value is of another type; a missing key is none."""
    for key, shape in _SHAPES.items():
        if run.manifest.get(key) is not None:
            _check(run.manifest[key], shape, key, f"{run.path / MANIFEST}")


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


def check_segments(run: Run, segments: pl.DataFrame, steps: pl.DataFrame) -> str | None:
    """Raise `RunError` where `segments` contradict themselves or a complete run's `steps`.

    Of a run that was cut off, segments may reach beyond the last step written: what to say about that, else None.
    """
    source = run.path / "segments.parquet"
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
