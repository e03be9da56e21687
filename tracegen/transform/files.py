"""The transforms on files: each returns the new trace and metadata to write with it, which lead back to its origin."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import polars as pl

from tracegen.errors import TraceError
from tracegen.schema import file_sha256, read_metadata, read_trace
from tracegen.transform import rates, rows, several

Trace = tuple[pl.DataFrame, dict[str, Any]]


def scale_trace(path: str | Path, target_rps: float, seed: int) -> Trace:
    """`scale` for the trace at `path`; raises `TraceError` as `scale` does."""
    frame, done = rates.scale(read_trace(path), target_rps, seed)
    return frame, _metadata(path, "scale", done, seed)


def warp_trace(path: str | Path, time_scale: float) -> Trace:
    """`warp` for the trace at `path`; raises `TraceError` as `warp` does."""
    return rates.warp(read_trace(path), time_scale), _metadata(path, "warp", {"time_scale": time_scale})


def slice_trace(path: str | Path, start_ns: int, duration_ns: int) -> Trace:
    """`cut` for the trace at `path`; raises `TraceError` as `cut` does."""
    frame = rows.cut(read_trace(path), start_ns, duration_ns)
    return frame, _metadata(path, "slice", {"start_ns": start_ns, "duration_ns": duration_ns})


def clamp_trace(path: str | Path, max_context: int, how: Literal["drop", "clip"]) -> Trace:
    """`clamp` for the trace at `path`; raises `TraceError` as `clamp` does."""
    frame, changed = rows.clamp(read_trace(path), max_context, how, read_metadata(path).get("block_tokens"))
    return frame, _metadata(path, "clamp", {"max_context": max_context, "how": how, "changed": changed})


def sample_trace(path: str | Path, requests: int, seed: int) -> Trace:
    """`sample` for the trace at `path`; raises `TraceError` as `sample` does."""
    frame = rows.sample(read_trace(path), requests, seed)
    return frame, _metadata(path, "sample", {"requests": requests}, seed)


def relabel_trace(path: str | Path, label: str, only: str | None = None) -> Trace:
    """`relabel` for the trace at `path`; raises `TraceError` as `relabel` does."""
    frame, changed = rows.relabel(read_trace(path), label, only)
    return frame, _metadata(path, "relabel", {"label": label, "only": only, "changed": changed})


def repeat_trace(path: str | Path, times: int, seed: int) -> Trace:
    """`repeat` for the trace at `path`; raises `TraceError` as `repeat` does."""
    return several.repeat(read_trace(path), times, seed), _metadata(path, "repeat", {"times": times}, seed)


def merge_traces(paths: Sequence[str | Path]) -> Trace:
    """`merge` for the traces at `paths`, named after their files.

    Raises `TraceError` as `merge` does, and for prefix hashes of blocks of different lengths.
    """
    frames = [read_trace(path) for path in paths]
    sources = [_source(path) for path in paths]
    blocks = {
        str(p): s["metadata"]["block_tokens"]
        for p, s in zip(paths, sources, strict=True)
        if "block_tokens" in s["metadata"]
    }
    if len(set(blocks.values())) > 1:
        said = ", ".join(f"{path}: {tokens}" for path, tokens in blocks.items())
        raise TraceError(f"cannot merge prefix hashes of blocks of different lengths in tokens ({said})")
    frame = several.merge(frames, [Path(path).stem for path in paths])
    found = {"block_tokens": next(iter(blocks.values()))} if blocks else {}
    return frame, {"generator": "tracegen merge", "parameters": {}, "sources": sources, **found}


def chain(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps by which a trace with this file metadata was made, from its origin to the last.

    Each has `generator`, `parameters`, `seed` and `file`, the file that it was made from, as far as known. A merge ends
    the way back: its `files` are named, and their own chains are in the metadata under `sources`.
    """
    source = metadata.get("source") or {}
    step = {key: metadata[key] for key in ("generator", "parameters", "seed") if key in metadata}
    if "file" in source:
        step["file"] = source["file"]
    if "sources" in metadata:
        step["files"] = [part.get("file") for part in metadata["sources"]]
    before = chain(source["metadata"]) if source.get("metadata") else []
    return [*before, step] if step else before


def _metadata(path: str | Path, command: str, parameters: dict[str, Any], seed: int | None = None) -> dict[str, Any]:
    """Metadata that name the file a trace was made from, with that file's own: the whole way back to its origin."""
    source = _source(path)
    kept = {key: source["metadata"][key] for key in ("block_tokens",) if key in source["metadata"]}
    seeded = {} if seed is None else {"seed": seed}
    return {"generator": f"tracegen {command}", "parameters": parameters, **seeded, "source": source, **kept}


def _source(path: str | Path) -> dict[str, Any]:
    return {"file": Path(path).name, "sha256": file_sha256(path), "metadata": read_metadata(path)}
