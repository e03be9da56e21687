"""What a manifest says of hosts, engine instances and their GPUs: who ran where, and whose clock is how far off.

And what it must keep to before it is believed (`check_manifest`): other programs write manifests too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import polars as pl

from replay.rundir import MANIFEST, Run
from tracegen.errors import AnalysisError, RunError

_NUMBER = (int, float)
_MOST_NS = 2**61  # 73 years; the sum of two such times fits Int64


@dataclass(frozen=True)
class _Within:
    """A number, what it is, and its bounds, inclusive; beyond them it is of another unit or cannot be."""

    types: Any
    what: str
    low: float
    high: float


_MOST = 2**16 - 1  # UInt16: what columns `instance`, `gpu` and `worker` hold
_NUMBERED = _Within(int, "a number", 0, _MOST)
_GPU = _Within(int, "an NVML index", 0, _MOST)
_TIME_NS = _Within(int, "a time in ns", -_MOST_NS, _MOST_NS)
_OFFSET_NS = _Within(_NUMBER, "ns between two clocks", -_MOST_NS, _MOST_NS)
_SPAN_NS = _Within(_NUMBER, "a stretch of ns", 0, 3.6e12)  # an hour: the slowest sensors known average over a second
MOST_BOARD_W = 10_000.0  # NVIDIA's hungriest, the B300, may draw 1,400 W
_BOARD_W = _Within(_NUMBER, "watts of one GPU", 0, MOST_BOARD_W)
_CLOCK_MHZ = _Within(_NUMBER, "a GPU's clock in MHz", 1, 10_000)  # the fastest go at some 3,000
_WATTS = {"*": _BOARD_W}
# What analysis reads of a manifest: a list of one shape, an object by key (`*`: any other key), or a scalar's types,
# with bounds where it has any.
_SHAPES: dict[str, Any] = {
    "state": str,
    "engine": str,
    "trace_sha256": str,
    "measure_start_ns": _TIME_NS,
    "measure_end_ns": _TIME_NS,
    "stretches": [{"start_ns": _TIME_NS, "end_ns": _TIME_NS}],
    "paused_s": _NUMBER,
    "requests": {"planned": int},
    "instances": [
        {
            "instance": _NUMBERED,
            "host": str,
            "gpus": [_GPU],
            "tp": _Within(int, "a number of GPUs", 1, _MOST),
            "freq_mhz": _CLOCK_MHZ,
            "power_cap_w": _Within(_NUMBER, _BOARD_W.what, 1, _BOARD_W.high),
            "model": str,
            "max_model_len": _Within(int, "a number of tokens", 1, 2**31),
            "recorder": {"steps": int, "missing": int, "overhead_us_mean": _NUMBER},
        },
    ],
    "gpus": [
        {
            "host": str,
            "gpu": _GPU,
            "idle_power_w": _WATTS,
            "idle_power_after_w": _WATTS,
            "sensors": {"*": {"period_ns": _SPAN_NS, "window_ns": _SPAN_NS, "lag_ns": _SPAN_NS}},
        },
    ],
    "hosts": [{"host": str, "offset_ns": _OFFSET_NS, "offset_error_ns": _SPAN_NS}],
    "workers": [{"worker": _NUMBERED, "host": str}],
    "clock_anchors": [{"monotonic_ns": int, "unix_ns": int}],
    "verdicts": [{"name": str, "ok": bool}],
}
_TYPE_NAMES = {list: "a list", dict: "an object", int: "a whole number", str: "a text", bool: "true or false"}


def check_manifest(run: Run) -> None:
    """Raise `RunError` naming the key of `run`'s manifest whose value is of another type, or cannot be.

    A missing key is none of that, but for the `gpu` that an entry of `gpus` is about.
    """
    source = f"{run.path / MANIFEST}"
    check_keys(run.manifest, _SHAPES, source)
    _check_owners(run.manifest.get("instances") or [], source)
    for i, entry in enumerate(run.manifest.get("gpus") or []):
        if entry.get("gpu") is None:
            raise RunError(f"{source}: key 'gpus[{i}]' has no key 'gpu', so no readings belong to it")
    for key, what in (("gpus", ("host", "gpu")), ("hosts", ("host",)), ("workers", ("worker",))):
        _check_once(run.manifest.get(key) or [], key, what, source)


def check_keys(document: Mapping[str, Any], shapes: Mapping[str, Any], source: str) -> None:
    """Raise `RunError` where what `document` has under a key of `shapes` is of another shape; null is of any.

    A shape is a type, a list of one shape, or an object of shapes by key (`*`: any other key). `source` names the file.
    """
    for key, shape in shapes.items():
        if document.get(key) is not None:
            _check(document[key], shape, key, source)


def _check_once(entries: Sequence[Mapping[str, Any]], key: str, what: Sequence[str], source: str) -> None:
    """Raise where two of the `entries` of a list are about the same: which of them holds is not known."""
    first: dict[tuple[str, ...], int] = {}
    for i, entry in enumerate(entries):
        if entry.get(what[-1]) is None:
            continue
        before = first.setdefault(tuple(str(entry.get(name)) for name in what), i)
        if before != i:
            named = ", ".join(f"{name} {entry[name]}" for name in what if entry.get(name) is not None)
            raise RunError(f"{source}: key '{key}[{i}]' is about {named}, as is '{key}[{before}]'; keep one")


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
            owner = str(entry.get("host") or ""), gpu
            if owner in owned:
                key = f"{source}: key 'instances[{i}].gpus[{k}]' is {gpu}"
                raise RunError(f"{key}, which is given out already; a GPU belongs to one instance, once")
            owned.add(owner)


def _check(value: Any, shape: Any, key: str, source: str) -> None:
    """Compare `value` with `shape`, and what is in it."""
    bounds = shape if isinstance(shape, _Within) else None
    wanted: Any = list if isinstance(shape, list) else dict if isinstance(shape, dict) else shape
    wanted = wanted if bounds is None else bounds.types
    odd = isinstance(value, bool) if shape is not bool else False
    odd = odd or (isinstance(value, float) and not math.isfinite(value))  # JSON has no NaN, but Python's reader does
    if odd or not isinstance(value, wanted):
        raise RunError(f"{source}: key '{key}' is {_shown(str(value))!r}, not {_TYPE_NAMES.get(wanted, 'a number')}")
    if bounds is not None and not bounds.low <= value <= bounds.high:
        most = f"from {bounds.low:,.12g} to {bounds.high:,.12g}"
        raise RunError(f"{source}: key '{key}' is {_shown(f'{value:,}')}, not {bounds.what} {most}")
    for name, inner, item in _within(value, shape):
        _check(item, inner, f"{key}{name}", source)


def _shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _within(value: Any, shape: Any) -> Iterator[tuple[str, Any, Any]]:
    """Of what is in `value` the name, the shape and itself, as far as `shape` says anything of it."""
    if isinstance(shape, list):
        yield from ((f"[{i}]", shape[0], item) for i, item in enumerate(value))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            inner = shape.get(name, shape.get("*"))
            if inner is not None and item is not None:
                yield f".{name}", inner, item


def by_host(run: Run) -> dict[str, dict[str, Any]]:
    """The manifest's `hosts` by name."""
    return {str(entry.get("host")): entry for entry in run.manifest.get("hosts") or []}


def offset_ns(hosts: Mapping[str, Mapping[str, Any]], host: Any) -> int:
    """Clock of `host` minus the replayer's."""
    return int(hosts.get(str(host), {}).get("offset_ns") or 0)


def worker_offsets_ns(run: Run) -> dict[int, int]:
    """By load worker the clock of its host minus the replayer's: what is to be taken off its times."""
    hosts = by_host(run)
    workers = [w for w in run.manifest.get("workers") or [] if w.get("worker") is not None]
    return {int(w["worker"]): offset_ns(hosts, w.get("host")) for w in workers}


def pauses_ns(run: Run) -> list[tuple[int, int]]:
    """From when to when a run that was resumed lay between its stretches, on the replayer's clock."""
    stretches = run.manifest.get("stretches") or []
    return [
        (before["end_ns"], after["start_ns"])
        for before, after in pairwise(stretches)
        if before.get("end_ns") is not None and after.get("start_ns") is not None
    ]


def listed_instances(run: Run) -> list[dict[str, Any]]:
    """The manifest's `instances`, each with its number."""
    instances = run.manifest.get("instances")
    if not isinstance(instances, list) or not instances:
        raise RunError(f"{run.path / MANIFEST}: 'instances' is missing or empty; it says which GPUs an engine used")
    for entry in instances:
        if entry.get("instance") is None:
            raise RunError(f"{run.path / MANIFEST}: an entry of 'instances' has no key 'instance'")
    return instances


def wanted_gpus(run: Run, polled: pl.DataFrame, scope: str) -> list[tuple[int | None, list[tuple[str, int]]]]:
    """Per instance the (host, gpu) pairs to account for; with scope `node` the unused GPUs come last, under None."""
    sampled = set(polled.select("host", "gpu").iter_rows())
    wanted: list[tuple[int | None, list[tuple[str, int]]]] = []
    for entry in listed_instances(run):
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


def gpu_entry(run: Run, host: str, gpu: int) -> dict[str, Any]:
    """The entry of the manifest's `gpus` for one GPU; empty where there is none."""
    entries: list[dict[str, Any]] = [e for e in run.manifest.get("gpus") or [] if e.get("gpu") == gpu]
    alone = entries[0] if len(entries) == 1 else {}  # whatever its writer called the host
    return next((e for e in entries if str(e.get("host") or host) == host), alone)
