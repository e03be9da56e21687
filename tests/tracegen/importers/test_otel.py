import json

import pytest

from tracegen.errors import TraceError

T0 = 1_581_452_772_000_000_321  # the specification's example
REQUEST = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.usage.input_tokens": 12,
    "gen_ai.usage.output_tokens": 8,
}


def value(found):
    if isinstance(found, int):
        return {"intValue": str(found)}  # 64 bits are text in OTLP JSON
    return {"stringValue": found}


def span(start_ns=T0, end_ns=None, **attributes):
    """A span as the file exporter writes it; attributes over those of a request, None leaves one out."""
    found = {**REQUEST, **{f"gen_ai.{key.replace('__', '.')}": value for key, value in attributes.items()}}
    return {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": "eee19b7ec3c1b174",
        "name": "chat gpt-4o",
        "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(end_ns or start_ns + 10**9),
        "attributes": [{"key": key, "value": value(each)} for key, each in found.items() if each is not None],
    }


def line(*spans):
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]}
    return json.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]})


def test_spans_are_requests_at_their_start_in_order(import_file):
    text = "\n".join([line(span(T0 + 5 * 10**9), span(T0 + 7)), line(span(T0))])
    frame, report = import_file(text, "spans.jsonl")
    assert report.format == "otel"
    assert frame["arrival_ns"].to_list() == [0, 7, 5 * 10**9]
    assert frame.select("input_tokens", "output_tokens", "model").unique().rows() == [(12, 8, "gpt-4o")]
    assert report.first_arrival == str(T0)
    assert frame["session_id"].null_count() == 3


def test_conversations_are_sessions_with_parents_and_think_times(import_file):
    text = line(
        span(T0, T0 + 3 * 10**9, conversation__id="conv-1"),
        span(T0 + 10**9, conversation__id="conv-2"),
        span(T0 + 10 * 10**9, conversation__id="conv-1"),
    )
    frame, _ = import_file(text, "spans.jsonl", "otel")
    first, other, second = frame["session_id"].to_list()
    assert first == second != other
    assert frame["parent_id"].to_list() == [None, None, 0]
    assert frame["think_ns"].to_list() == [None, None, 7 * 10**9]


def test_what_is_no_request_and_what_failed_are_dropped_and_counted(import_file):
    text = line(
        span(),
        span(operation__name="invoke_agent", usage__input_tokens=99),
        span(operation__name="embeddings"),
        {"name": "GET /", "startTimeUnixNano": str(T0), "attributes": []},
        span(usage__input_tokens=None, usage__output_tokens=None),
        span(usage__output_tokens=0),
    )
    frame, report = import_file(text, "spans.jsonl", "otel")
    assert frame.height == 1
    assert report.dropped == {
        "a span that is no request to a model": 3,
        "a request without usage: it failed, or usage was not recorded": 1,
        "a request without output tokens": 1,
    }


def test_bytes_that_are_no_text_and_values_of_other_kinds_are_no_accident(import_file):
    odd = span()
    odd["attributes"][0]["value"] = {"arrayValue": {"values": [{"stringValue": "chat"}]}}
    text = line(odd, span()).encode()
    frame, report = import_file(text, "spans.jsonl", "otel")
    assert (frame.height, report.rows_dropped) == (1, 1)
    with pytest.raises(TraceError, match=r"line 1: is no such row"):
        import_file(text.replace(b"chat", b"ch\xff"), "spans.jsonl", "otel")


def test_older_names_and_numbers_that_are_numbers_are_read(import_file):
    old = {
        "name": "llm_request",  # as vLLM writes them
        "startTimeUnixNano": T0,
        "endTimeUnixNano": T0 + 1,
        "attributes": [
            {"key": "gen_ai.usage.prompt_tokens", "value": {"intValue": 33}},
            {"key": "gen_ai.usage.completion_tokens", "value": {"doubleValue": 4.0}},
            {"key": "gen_ai.response.model", "value": {"stringValue": "llama"}},
        ],
    }
    frame, _ = import_file(line(old), "spans.jsonl", "otel")
    assert frame.select("input_tokens", "output_tokens", "model").rows() == [(33, 4, "llama")]


def test_one_document_over_many_lines_is_read(import_file):
    text = json.dumps(json.loads(line(span(), span(T0 + 1))), indent=2)
    frame, _ = import_file(text, "spans.json")
    assert frame["arrival_ns"].to_list() == [0, 1]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (line(span())[:-9], "is no such row"),
        ("", "is blank"),
        ('{"resourceMetrics": []}', "has no resourceSpans"),
        ('{"resourceSpans": 7}', "has no resourceSpans"),
        (line(span(usage__input_tokens="many")), "gen_ai.usage.input_tokens is not a whole number of tokens"),
        (line(span(usage__input_tokens=-1)), "gen_ai.usage.input_tokens is not a whole number of tokens"),
        (line(span(usage__output_tokens=2**32)), "gen_ai.usage.output_tokens is not a whole number of tokens"),
        (line(span(usage__input_tokens=0)), "gen_ai.usage.input_tokens is zero or missing"),
        (line(span(usage__input_tokens=None)), "gen_ai.usage.input_tokens is zero or missing"),
        (line({**span(), "startTimeUnixNano": "soon"}), "startTimeUnixNano is no time in nanoseconds"),
        (line({**span(), "startTimeUnixNano": "0"}), "startTimeUnixNano is no time in nanoseconds"),
        (line({**span(), "attributes": [7]}), "has attributes that are no pairs of key and value"),
    ],
)
def test_a_damaged_span_is_named_with_its_line_or_dropped(import_file, bad, said):
    text = "\n".join([line(span()), bad, line(span(T0 + 1))])
    with pytest.raises(TraceError, match=r"spans\.jsonl: line 2: ") as raised:
        import_file(text, "spans.jsonl", "otel")
    assert said in str(raised.value)
    frame, report = import_file(text, "spans.jsonl", "otel", skip_bad=True)
    assert frame["arrival_ns"].to_list() == [0, 1]
    assert report.rows_dropped == 1
