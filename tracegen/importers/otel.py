"""Spans of the OpenTelemetry conventions for generative AI, as the collector's file exporter writes them.

Format (OpenTelemetry Protocol File Exporter; Semantic conventions for generative client AI spans 1.37): JSON Lines of
`{"resourceSpans": [{"scopeSpans": [{"spans": [...]}]}]}`; numbers of 64 bits are texts. A request is a span with
`gen_ai.operation.name` chat, text_completion or generate_content, or without one but with usage (vLLM's own spans):
its arrival is the span's start, its lengths are `gen_ai.usage.input_tokens` and `output_tokens` (before 1.27
`prompt_tokens` and `completion_tokens`), its session is `gen_ai.conversation.id`. Spans of agents and tools are passed
over: an agent's usage is the sum of its requests'. Spans are written when they end, so rows are sorted.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import polars as pl

from tracegen.importers.base import BATCH, Batches, Format, Options
from tracegen.importers.columns import ID, MAX_TIME_NS, MAX_TOKENS
from tracegen.importers.jsonvalues import json_values
from tracegen.importers.textfiles import JsonRows, json_rows
from tracegen.importers.turns import link_turns
from tracegen.sources import Source

REQUESTS = {"chat", "text_completion", "generate_content"}
OTHER = "a span that is no request to a model"
NO_USAGE = "a request without usage: it failed, or usage was not recorded"
NO_OUTPUT = "a request without output tokens"
_UNQUOTED = {None, OTHER, NO_USAGE, NO_OUTPUT}  # of many spans; no message quotes them
_USAGE = {
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
}
_SCHEMA = pl.Schema(
    {
        **BATCH,
        "elapsed_ns": pl.Int64(),
        "session_id": pl.String(),
        "model": pl.String(),
    }
)


def _recognises(start: bytes) -> bool:
    return start.lstrip()[:1] in {b"{", b"["} and b'"resourceSpans"' in start


def _read(source: Source, options: Options) -> Batches:
    for rows in _documents(source):
        found = [
            row
            for line, text, document, why in zip(rows.numbers, rows.texts, rows.found, rows.whys, strict=True)
            for row in _rows(line, text, document, why)
        ]
        yield pl.DataFrame(found, schema=_SCHEMA, orient="row").with_columns(
            pl.col("session_id").fill_null("").map_batches(ID.parse, return_dtype=pl.UInt64)
        )


def _documents(source: Source) -> Iterator[JsonRows]:
    """The documents of the file: one a line, or, where the first is broken over lines, one behind another."""
    try:
        msgspec.json.decode(source.start.lstrip().partition(b"\n")[0])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        if source.start.strip().startswith((b"{\n", b"{\r", b"[")):
            for line, value in json_values(source):
                yield JsonRows([line], [str(value)[:200]], [value], [None])
            return
    yield from json_rows(source, msgspec.json.Decoder().decode)


def _rows(line: int, text: str, document: Any, why: str | None) -> Iterator[tuple[Any, ...]]:
    """The rows of a document; one that says why it has none."""
    if why is None:
        try:
            spans = [
                span
                for resource in document["resourceSpans"]
                for scope in resource.get("scopeSpans", resource.get("instrumentationLibrarySpans", ()))
                for span in scope.get("spans", ())
            ]
        except (KeyError, TypeError, AttributeError):
            why = "has no resourceSpans with scopeSpans with spans"
    if why is not None:
        yield line, text, None, why, None, None, None, None, None, None
        return
    for span in spans:
        said, wrong, *values = _request(span)
        yield line, text if wrong in _UNQUOTED else str(span)[:200], said, wrong, *values


def _request(span: Any) -> tuple[Any, ...]:
    """What a span says: its start as written, why it is no row, and a row's values."""
    nothing = (None, None, None, None, None, None)
    try:
        attributes = {each["key"]: next(iter(each["value"].values()), None) for each in span.get("attributes", ())}
    except (KeyError, TypeError, AttributeError):
        return None, "has attributes that are no pairs of key and value", *nothing
    said = str(span.get("startTimeUnixNano"))
    tokens = {side: next((attributes[key] for key in keys if key in attributes), None) for side, keys in _USAGE.items()}
    operation = attributes.get("gen_ai.operation.name")
    other = tokens["input_tokens"] is None if operation is None else str(operation) not in REQUESTS
    if other:
        return said, OTHER, *nothing
    if tokens["input_tokens"] is None and tokens["output_tokens"] is None:
        return said, NO_USAGE, *nothing
    start_ns = _whole(span.get("startTimeUnixNano"), 1, MAX_TIME_NS)
    if start_ns is None:
        return said, "startTimeUnixNano is no time in nanoseconds", *nothing
    counts = {side: _whole(tokens[side], 0, MAX_TOKENS) for side in _USAGE}
    for side, keys in _USAGE.items():
        if counts[side] is None and tokens[side] is not None:
            return said, f"{keys[0]} is not a whole number of tokens", *nothing
    if not counts["output_tokens"]:
        return said, NO_OUTPUT, *nothing
    if not counts["input_tokens"]:
        return said, "gen_ai.usage.input_tokens is zero or missing", *nothing
    end_ns = _whole(span.get("endTimeUnixNano"), start_ns, MAX_TIME_NS)
    return said, None, start_ns, *counts.values(), *_rest(attributes, None if end_ns is None else end_ns - start_ns)


def _rest(attributes: Mapping[str, Any], elapsed_ns: int | None) -> tuple[int | None, str | None, str | None]:
    """How long a request took, its conversation and its model."""
    model = attributes.get("gen_ai.request.model") or attributes.get("gen_ai.response.model")
    session = attributes.get("gen_ai.conversation.id")
    return elapsed_ns, None if session is None else str(session), None if model is None else str(model)


def _whole(value: Any, least: int, most: int) -> int | None:
    """A whole number between two, which may be a text as in OTLP; null for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if least <= number <= most and (isinstance(value, str) or number == value) else None


FORMAT = Format(
    name="otel",
    title="OpenTelemetry spans of generative AI (OTLP JSON)",
    recognises=_recognises,
    read=_read,
    in_order=False,
    expected=frozenset({OTHER, NO_USAGE, NO_OUTPUT}),
    stage=link_turns,
)
