"""Both paths against servers that answer in every way, right and wrong: they give the same records."""

import asyncio
import json
import socket
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.stream import EventStream, Record
from replay.tally import Tally

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"
STALL, RESET = object(), object()  # what a script can do besides writing


def event(text=" a", *, finish=None, prompt=7, completion=None, cached=None):
    """A chunk in vLLM's form; `completion`: its running usage."""
    document = {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if completion is not None:
        document["usage"] = usage(completion, prompt, cached)
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def usage(completion, prompt=7, cached=None):
    details = None if cached is None else {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}


def closing(completion, **more):
    return b"data: " + json.dumps({"choices": [], "usage": usage(completion, **more)}).encode() + b"\n\n"


def counts(row):
    return None if row.chunk_tokens is None else row.chunk_tokens.tolist()


def record(wanted=3):
    return Record(request_id=42, instance=0, scheduled_ns=0, output_tokens_wanted=wanted)


@pytest.fixture(params=["fast", "general"])
def exchange(request, send_rows):  # noqa: C901 - a server and a client in one
    """The record of one request to a server that plays `script`, and the bytes that the server got."""

    def exchange(*script, wanted=3, cancel_when=None, **options):
        return asyncio.run(main(script, wanted, cancel_when, options))

    async def main(script, wanted, cancel_when, options):
        got, stalled = bytearray(), asyncio.Event()

        async def serve(reader, writer):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            got.extend(head + await reader.readexactly(length))
            for act in script:
                if act is STALL:
                    stalled.set()
                    await reader.read()  # until the client goes away
                elif act is RESET:
                    await asyncio.sleep(0.1)  # let the client read what came before
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return
                else:
                    writer.write(act)
                    await writer.drain()
            writer.close()

        handlers = set()

        async def served(reader, writer):
            handlers.add(asyncio.current_task())
            try:
                await serve(reader, writer)
            except asyncio.IncompleteReadError:  # opened ahead and not used
                writer.close()

        server = await asyncio.start_server(served, "127.0.0.1", 0, limit=2**22)
        port = server.sockets[0].getsockname()[1]
        async with server:
            sending = send_rows(request.param, f"http://127.0.0.1:{port}", [(0, 3, wanted)], **options)
            task = asyncio.create_task(asyncio.to_thread(sending.run))
            if cancel_when is not None:
                await stalled.wait()
                while not all(cancel_when(job.record) for job in sending.path._in_flight):
                    await asyncio.sleep(0.01)
                sending.stop()
            (row,) = await task
            await asyncio.wait(handlers)
        return row, bytes(got)

    return exchange


def test_a_whole_answer_is_stamped_in_order_and_counted_by_usage(exchange):
    row, got = exchange(
        HEAD, event(completion=1, cached=2), event(completion=2), event(finish="length", completion=3), closing(3), DONE
    )
    assert (row.status, row.error, row.http_status) == ("ok", None, 200)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (7, 3, 2)
    assert counts(row) == [1, 1, 1]
    times = [row.sent_ns, row.headers_ns, row.first_token_ns, row.last_token_ns, row.done_ns]
    assert times == sorted(times)
    assert (row.chunk_ns[0], row.chunk_ns[-1]) == (row.first_token_ns, row.last_token_ns)
    assert b"x-request-id: 42\r\n" in got.lower()
    assert got.endswith(b'"min_tokens":3}')
    assert got.startswith(b"POST /v1/completions HTTP/1.1\r\n")


def test_a_chunk_of_several_tokens_counts_by_usage(exchange):
    row, _ = exchange(HEAD, event(completion=4), event(finish="stop", completion=9), DONE, wanted=9)
    assert (row.status, row.output_tokens, counts(row)) == ("ok", 9, [4, 5])


def test_usage_at_the_end_alone_leaves_the_tokens_of_chunks_unknown(exchange):
    row, _ = exchange(HEAD, event(), event(), event("", finish="length"), closing(3, cached=0), DONE)
    assert (row.status, row.output_tokens, row.input_tokens, row.cached_tokens) == ("ok", 3, 7, 0)
    assert row.chunk_tokens is None
    assert len(row.chunk_ns) == 2, "an empty text bears no token"


def test_usage_at_the_end_counts_chunks_where_there_were_as_many_as_tokens(exchange):
    row, _ = exchange(HEAD, event(), event(), event(finish="length"), closing(3), DONE)
    assert (row.status, row.output_tokens, counts(row)) == ("ok", 3, [1, 1, 1])
    assert len(row.chunk_ns) == 3


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([event(), event(finish="length"), closing(2)], 1),
        ([event(), event(finish="length"), closing(3)], 0),
        ([event(completion=1), event(completion=2, finish="length")], 0),
    ],
)
def test_a_worker_tells_how_many_answers_chunks_were_counted_for(events, told):
    row, tally = record(), Tally()
    stream = EventStream(row)
    for data in [*events, DONE]:
        stream.feed(data, 1)
    stream.judge()
    tally.end(row)
    assert tally.message([])["by_chunks"] == told


def test_usage_on_the_finishing_chunk_is_no_token_of_its_own():
    stream, row = EventStream(record()), record()
    stream._record = row
    for at_ns, data in enumerate([event(), event(), event("", finish="length", completion=3)]):
        stream.feed(data, at_ns)
    assert (row.first_token_ns, row.last_token_ns, row.output_tokens, counts(row)) == (0, 1, 3, None)


def test_without_usage_lengths_stay_unknown_and_nothing_is_made_up(exchange):
    row, _ = exchange(HEAD, event(), event(finish="length"), DONE)
    assert (row.status, row.output_tokens, row.input_tokens, row.cached_tokens) == ("ok", None, None, None)
    assert row.chunk_tokens is None
    assert row.first_token_ns is not None


def test_an_opening_chunk_without_tokens_is_not_the_first_token():
    row = record()
    stream = EventStream(row)
    for at_ns, data in enumerate([event("", completion=0), event(completion=1), event("", completion=2)]):
        stream.feed(data, at_ns)
    assert (row.first_token_ns, row.last_token_ns, counts(row)) == (1, 2, [1, 1])


EVENTS = [event(completion=1), b": a comment\n\n", event(completion=3), closing(3), DONE]


@given(st.sets(st.integers(1, len(b"".join(EVENTS)) - 1)), st.booleans())
def test_events_may_be_cut_and_joined_anywhere(cuts, crlf):
    data = b"".join(EVENTS)
    if crlf:
        data = data.replace(b"\n", b"\r\n")
    row, edges = record(), [0, *sorted(cuts), len(data)]
    stream = EventStream(row)
    for at_ns, (start, end) in enumerate(pairwise(edges)):
        stream.feed(data[start:end], at_ns)
    assert stream.done
    assert stream.error is None
    assert (row.output_tokens, counts(row)) == (3, [1, 2])
    # A token's time is that of the read which ended its line.
    first_end = data.index(b"\n") + 1
    assert row.first_token_ns == next(i for i, end in enumerate(edges[1:]) if end >= first_end)


def test_a_cut_at_every_byte_boundary_gives_the_same():
    data = b"".join(EVENTS)
    for cut in range(1, len(data)):
        row = record()
        stream = EventStream(row)
        stream.feed(data[:cut], 1)
        stream.feed(data[cut:], 2)
        assert (stream.done, row.output_tokens, counts(row)) == (True, 3, [1, 2])


def test_crlf_lines_over_http(exchange):
    body = b"".join([event(completion=3, finish="length"), DONE]).replace(b"\n", b"\r\n")
    row, _ = exchange(HEAD, body)
    assert (row.status, row.output_tokens) == ("ok", 3)


def test_a_line_of_128_kb_over_http(exchange):
    row, _ = exchange(HEAD, event("x" * 131_072, completion=2), event(completion=3, finish="length"), DONE)
    assert (row.status, row.output_tokens, counts(row)) == ("ok", 3, [2, 1])


def test_several_events_in_one_read(exchange):
    row, _ = exchange(HEAD + b"".join(event(completion=i + 1) for i in range(3)) + closing(3) + DONE)
    assert (row.status, row.output_tokens, counts(row)) == ("ok", 3, [1, 1, 1])


def test_an_error_event_in_the_stream_is_told_in_the_servers_words(exchange):
    error = b'data: {"error": {"message": "out of\\nmemory", "code": 500}}\n\n'
    row, _ = exchange(HEAD, event(completion=1), error, DONE)
    assert (row.status, row.http_status, row.output_tokens) == ("stream_error", 200, 1)
    assert "out of" in row.error
    assert "\n" not in row.error
    assert row.done_ns is not None


def test_a_null_error_is_none(exchange):
    row, _ = exchange(HEAD, event(completion=3, finish="length").replace(b'{"id"', b'{"error": null, "id"'), DONE)
    assert (row.status, row.error) == ("ok", None)


@pytest.mark.parametrize("text", ["{oops", '{"choices": 3}', '{"choices": [], "usage": {"completion_tokens": -1}}'])
def test_an_event_that_is_no_chunk_is_shown(exchange, text):
    row, _ = exchange(HEAD, event(completion=1), f"data: {text}\n\n".encode(), DONE)
    assert (row.status, row.error) == ("stream_error", f"not a completion chunk: {text}")


def test_what_a_server_says_cannot_redraw_a_terminal(exchange):
    said = "data: \x1b[31mred\x9b2J \u202eback\x07 \u00e9\n\n".encode()
    row, _ = exchange(HEAD, said, DONE)
    assert row.error == r"not a completion chunk: \x1b[31mred\x9b2J \u202eback\x07 " + "\u00e9"


@pytest.mark.parametrize("status", [400, 500])
def test_an_http_error_keeps_status_and_body(exchange, status):
    body = b'{"error": {"message": "prompt too long"}}'
    head = b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
    row, _ = exchange(head + body)
    assert (row.status, row.http_status) == ("http_error", status)
    assert "prompt too long" in row.error
    assert row.headers_ns is not None
    assert row.first_token_ns is None


@pytest.mark.parametrize("kind", ["fast", "general"])
def test_a_refused_connection(send_rows, kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (row,) = send_rows(kind, f"http://127.0.0.1:{port}", [(0, 3, 3)]).run()
    assert (row.status, row.http_status, row.headers_ns) == ("connect_error", None, None)
    assert "Connect" in row.error
    assert row.done_ns >= row.sent_ns


def test_a_reset_before_headers(exchange):
    row, _ = exchange(RESET)
    assert (row.status, row.http_status, row.headers_ns) == ("connect_error", None, None)
    assert row.done_ns is not None


def test_a_reset_after_two_tokens_keeps_them(exchange):
    row, _ = exchange(HEAD, event(completion=1), event(completion=2), RESET)
    assert (row.status, row.output_tokens, counts(row)) == ("stream_error", 2, [1, 1])
    assert row.first_token_ns is not None
    assert row.done_ns is not None


def test_a_stream_that_just_ends_is_an_error(exchange):
    row, _ = exchange(HEAD, event(completion=1), event(completion=2))
    assert (row.status, row.error) == ("stream_error", "the stream ended without a finish reason or [DONE]")


def test_a_finish_reason_without_done_is_an_end(exchange):
    row, _ = exchange(HEAD, event(completion=3, finish="length"))
    assert row.status == "ok"


@pytest.mark.parametrize("before", [(), (HEAD, event(completion=1))])
def test_a_stalled_server_ends_by_timeout(exchange, before):
    row, _ = exchange(*before, STALL, request_timeout_s=0.3)
    assert (row.status, row.error) == ("timeout", "no end within 0.3 s")
    assert row.done_ns - row.sent_ns >= 0.299e9, "event loops round to a millisecond"
    assert (row.first_token_ns is not None) == bool(before)


@pytest.mark.parametrize("counted", [2, 4])
def test_a_wrong_length_is_a_mismatch(exchange, counted):
    row, _ = exchange(HEAD, event(completion=counted, finish="length"), DONE)
    assert (row.status, row.output_tokens) == ("length_mismatch", counted)
    assert row.error == f"{counted} output tokens, 3 wanted"


def test_a_cancelled_request_is_aborted_and_has_no_end(exchange):
    row, _ = exchange(HEAD, event(completion=1), STALL, cancel_when=lambda row: row.first_token_ns is not None)
    assert (row.status, row.done_ns, row.output_tokens) == ("aborted", None, 1)


def test_usage_that_shrinks_or_jumps_still_fits_the_table(exchange):
    row, _ = exchange(HEAD, event(completion=5), event(completion=2), event(completion=70_000, finish="stop"), DONE)
    assert (row.status, row.output_tokens, counts(row)) == ("length_mismatch", 70_000, None)


def test_an_answer_that_is_no_stream_is_an_error(exchange):
    body = b'{"choices": [{"text": "abc", "finish_reason": "length"}]}'
    row, _ = exchange(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
    assert row.status == "stream_error"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "b'SSH-2.0-OpenSSH'"),
        (b"\x15\x03\x01\x00\x02\x02F", r"b'\x15\x03\x01\x00\x02\x02F'"),  # a server that wants TLS
        (b"<" * 100, repr(b"<" * 40)),
    ],
)
def test_bytes_that_are_no_http_are_shown(exchange, data, said):
    row, _ = exchange(data)
    assert (row.status, row.http_status, row.error) == ("http_error", None, f"not HTTP: {said}")
    assert row.done_ns is not None
